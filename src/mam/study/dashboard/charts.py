"""Curves on the page: a chart per task, a line per algorithm."""

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from nicegui import ui
from nicegui.events import GenericEventArguments

from mam.runs.sinks import RETURN
from mam.study.dashboard.curves import Axis, Curve, Curves, Window, groups, labels_of, metrics_of
from mam.study.dashboard.details import grid
from mam.study.dashboard.runs import LiveRun
from mam.study.dashboard.style import GREY, LEGEND, TOGGLE
from mam.study.report.figures import styles_of

_MOST_CHARTS = 12  # tasks that are drawn at once
_FEW = 40  # points up to which each has a mark
# ECharts' words for Matplotlib's.
_DASHES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": [8, 3, 2, 3]}

Looks = dict[str, tuple[str, str]]  # colour and dashes, by label


class Charts:
    """All charts, and what they show.

    Args:
        curves: answers shared by all pages.
        everything: all runs, whichever are selected: they decide names and colours.
        metric: the only metric to show; the user chooses if None.
    """

    def __init__(
        self,
        curves: Curves,
        everything: Callable[[], Collection[LiveRun]],
        *,
        metric: str | None = None,
    ):
        self._curves, self._everything, self._runs = curves, everything, list[LiveRun]()
        self._charts: dict[str, Chart] = {}
        with ui.row().classes("mam-bar"):
            self._metric = ui.select(
                [metric or f"evaluation/{RETURN}"], value=metric or f"evaluation/{RETURN}"
            )
            self._metric.props(
                "dense options-dense borderless use-input hide-selected fill-input"
            ).mark("metric")
            self._metric.style("width: 260px")
            self._metric.set_visibility(metric is None)
            axes = {"steps": "steps", "time": "wall-clock"}
            self._axis = ui.toggle(axes, value="steps").props(TOGGLE)
            groupings = {False: "by algorithm", True: "by run"}
            self._apart = ui.toggle(groupings, value=False).props(TOGGLE)
            self._note = ui.label().classes("mam-faint")
        self._grid = ui.element("div").classes("mam-charts")
        self._chosen = metric is not None
        for control in (self._metric, self._axis, self._apart):
            control.on_value_change(self._redraw)

    async def refresh(self, runs: Sequence[LiveRun]) -> None:
        """Show what is new in these runs."""
        self._runs = list(runs)
        if not self._chosen:
            found = metrics_of(self._runs)
            if self._metric.value not in found:
                found = [self._metric.value, *found]
            if found != self._metric.options:
                self._metric.set_options(found)
        metric, axis = str(self._metric.value), self._axis.value
        everything = self._everything()
        labels = (
            {run.name: run.name for run in everything}
            if self._apart.value
            else labels_of(everything)
        )
        grouped = groups(self._runs, labels)
        looks = {
            label: (colour, dashes)
            for label, (colour, dashes, _) in styles_of(set(labels.values())).items()
        }
        shown = dict(list(grouped.items())[:_MOST_CHARTS])
        more = len(grouped) - len(shown)
        self._note.text = f"{more} more tasks: select runs to see them" if more else ""
        for task in self._charts.keys() - shown.keys():
            self._charts.pop(task).delete()
        for place, (task, of_label) in enumerate(shown.items()):
            if task not in self._charts:
                with self._grid:
                    self._charts[task] = Chart(task, self._curves)
            self._charts[task].put(place)
            await self._charts[task].show(of_label, looks, metric, axis)

    async def _redraw(self) -> None:
        await self.refresh(self._runs)


class Chart:
    """One task's curves; the part that is zoomed into gets points of its own."""

    def __init__(self, task: str, curves: Curves):
        self._curves = curves
        self._asked: tuple[dict[str, list[LiveRun]], Looks, str, Axis] | None = None
        self._window: Window | None = None
        self._place = -1
        self._layout: tuple = ()  # what else than its data decides how it looks
        self._sent: dict[str, tuple] = {}  # what each curve was made of
        with ui.element("div").classes("mam-card") as self._card:
            ui.label(task).classes("mam-card-title")
            self._chart = ui.echart({"series": []}).classes("mam-chart")
            self._empty = ui.label("nothing recorded yet").classes("mam-faint")
            self._empty.set_visibility(False)  # until that is known
        zoomed = f"""() => {{
            const zoom = getElement({self._chart.id}).chart.getOption().dataZoom[0];
            emit(zoom.start > 0.1 || zoom.end < 99.9 ? [zoom.startValue, zoom.endValue] : null);
        }}"""
        self._chart.on(
            "chart:datazoom", self._zoom, js_handler=zoomed, throttle=0.12, leading_events=False
        )

    def delete(self) -> None:
        """Take the chart off the page."""
        self._card.delete()

    def put(self, place: int) -> None:
        """Move the chart to its place among the others."""
        if place != self._place:
            self._place = place
            self._card.style(f"order: {place}")

    async def show(
        self, runs: dict[str, list[LiveRun]], looks: Looks, metric: str, axis: Axis
    ) -> None:
        """Draw the curves of some runs by label, as far as they have changed."""
        if self._asked and self._asked[2:] != (metric, axis):
            self._window = None
        asked = self._asked = (runs, looks, metric, axis)
        window = self._window

        def answers() -> dict[str, tuple[tuple, Curve | None]]:
            return {
                label: self._curves.of(some, metric, axis, window) for label, some in runs.items()
            }

        found = {
            label: answer
            for label, answer in (await asyncio.to_thread(answers)).items()
            if answer[1] is not None
        }
        if self._asked is not asked or self._window != window or self._chart.is_deleted:
            return  # something else was asked for meanwhile
        self._empty.set_visibility(not found)
        self._chart.set_visibility(bool(found))
        layout = (metric, axis, tuple((label, looks[label]) for label in found))
        made_of = {label: (answer[0], window) for label, answer in found.items()}
        new = [
            label
            for label in found
            if layout != self._layout or self._sent.get(label) != made_of[label]
        ]
        series = [one for label in new for one in _series(label, found[label][1], *looks[label])]
        if layout != self._layout:
            options = _options(axis) | {"series": series}
            self._chart._props["options"] = options
            self._chart.update()
        elif series:
            self._chart.run_chart_method("setOption", {"series": series})
        self._layout, self._sent = layout, made_of

    async def _zoom(self, event: GenericEventArguments) -> None:
        values = event.args
        window = (float(values[0]), float(values[1])) if values else None
        if window != self._window and self._asked:
            self._window = window
            await self.show(*self._asked)


class Speeds:
    """Steps per second, of each run as a whole and over time, and where its time goes."""

    def __init__(self, charts: Charts):
        self._charts = charts
        with ui.element("div").classes("mam-card").style("width: 100%; margin-top: 12px"):
            ui.label("median over all updates, environment steps per second of all seeds").classes(
                "mam-card-title"
            )
            self._table = ui.html("", sanitize=False).classes("mam-scroll")

    async def refresh(self, runs: Sequence[LiveRun]) -> None:
        """Show what is new in these runs."""
        await self._charts.refresh(runs)
        self._table.set_content(await asyncio.to_thread(self._describe, list(runs)))

    @staticmethod
    def _describe(runs: list[LiveRun]) -> str:
        speeds = sorted(
            ((one.median_speed(), one) for one in runs),
            key=lambda pair: -np.nan_to_num(pair[0], nan=-1),
        )
        rows = [
            [
                one.name,
                f"{speed:,.0f}" if np.isfinite(speed) else "–",
                one.num_seeds,
                one.versions().get("device", "–"),
                one.times() or "–",
            ]
            for speed, one in speeds
        ]
        return grid(["run", "steps/s", "seeds", "device", "wall-clock time"], rows, "lrrll")


def _series(label: str, curve: Curve | None, colour: str, dashes: str) -> list[dict[str, Any]]:
    """Describe a line and its band, which ECharts stacks of its lower edge and its height."""
    assert curve is not None
    x, middle, low, high = (
        _numbers(array) for array in (curve.x, curve.mean, curve.low, curve.high)
    )
    with np.errstate(invalid="ignore"):
        height = _numbers(curve.high - curve.low)
    common = {"type": "line", "name": label, "animation": False, "color": colour}
    edge = common | {
        "symbol": "none",
        "silent": True,
        "stack": f"band {label}",
        "stackStrategy": "all",
        "lineStyle": {"opacity": 0},
        "z": 1,
    }
    return [
        edge | {"id": f"low {label}", "data": list(map(list, zip(x, low, strict=True)))},
        edge
        | {
            "id": f"band {label}",
            "data": list(map(list, zip(x, height, strict=True))),
            "areaStyle": {"color": colour, "opacity": 0.16},
        },
        common
        | {
            "id": f"mean {label}",
            "data": list(map(list, zip(x, middle, low, high, strict=True))),
            "symbol": "circle",
            "symbolSize": 5,
            "showSymbol": len(x) <= _FEW,
            "lineStyle": {"width": 2, "type": _DASHES[dashes]},
            "emphasis": {"disabled": True},
            "z": 3,
        },
    ]


def _numbers(array: np.ndarray) -> list[float | None]:
    """Round to six digits, more than a screen shows; NaN becomes None."""
    return [float(f"{value:.6g}") if value == value else None for value in array.tolist()]


def _options(axis: Axis) -> dict[str, Any]:
    form = "short" if axis == "steps" else "time"
    line = {"lineStyle": {"color": GREY, "opacity": 0.22}}
    text = {"color": GREY, "fontSize": 11}
    return {
        "textStyle": {"fontFamily": "inherit"},
        "grid": {"left": 8, "right": 14, "top": 32, "bottom": 36, "containLabel": True},
        "legend": LEGEND | {"textStyle": text | {"fontSize": 12}, ":formatter": "mam.name"},
        "tooltip": {"trigger": "axis", "confine": True, ":formatter": f"mam.tooltip('{form}')"}
        | {"axisPointer": {"lineStyle": {"color": GREY}}, "textStyle": {"fontSize": 12}},
        "xAxis": {
            "type": "value",
            "min": 0,
            "axisLabel": text | {":formatter": f"mam.{form}", "hideOverlap": True},
        }
        | {
            "splitLine": {"show": False},
            "axisLine": line,
            "axisTick": {"show": False},
            "max": "dataMax",
        },
        "yAxis": {"type": "value", "scale": True, "axisLabel": text | {":formatter": "mam.short"}}
        | {"splitLine": line},
        "dataZoom": [
            {
                "type": "inside",
                "filterMode": "none",
                "zoomOnMouseWheel": "ctrl",
                "moveOnMouseWheel": False,
            },
            {
                "type": "slider",
                "filterMode": "none",
                "height": 12,
                "bottom": 8,
                "showDataShadow": False,
            }
            | {
                "borderColor": "transparent",
                "brushSelect": False,
                "showDetail": False,
                "handleSize": "110%",
            }
            | {
                "fillerColor": "rgba(0,114,178,.14)",
                "backgroundColor": "rgba(128,128,128,.10)",
                "moveHandleSize": 0,
            },
        ],
    }
