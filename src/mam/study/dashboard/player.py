"""Replays on the page: choose, play, and look at an episode step by step."""

import asyncio
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from nicegui import ui

from mam.errors import UserError
from mam.study.dashboard.details import grid
from mam.study.dashboard.map import Map, scene
from mam.study.dashboard.replay import Players, Replay, replays_of
from mam.study.dashboard.runs import LiveRun
from mam.study.dashboard.style import GREY, LEGEND, TOGGLE
from mam.study.report.figures import COLOURS

_MOST_AGENTS = 64  # rows of the table of decisions
_MOST_LINES = 12  # agents whose values are drawn
_SPEEDS = (2, 7, 15, 30, 60)  # steps a second
_TRAILS = {0: "none", 10: "10 steps", 50: "50 steps"}


class Player:
    """The replay of an episode.

    Args:
        load: reads an episode, with the key to its frames.
        players: play others.
    """

    def __init__(self, load: Callable[[Path], tuple[str, Replay]], players: Players):
        self._load, self._players = load, players
        self._runs: dict[str, LiveRun] = {}
        self._replays: dict[str, Path] = {}
        self._key, self._opened = "", 0
        self._replay: Replay | None = None
        with ui.row().classes("mam-bar"):
            select = "dense options-dense borderless"
            self._run = (
                ui.select([], label="run", on_change=self._choose_run)
                .props(select)
                .mark("replay run")
            )
            self._seed = ui.select([], label="seed").props(select).style("min-width: 64px")
            self._greedy = ui.toggle({False: "sampled", True: "greedy"}, value=False).props(TOGGLE)
            self._episode = ui.number("episode", value=0, min=0, precision=0).props(
                "dense borderless"
            )
            self._episode.style("width: 80px")
            self._play = (
                ui.button("play", on_click=self._make)
                .props("no-caps unelevated size=sm padding='5px 16px'")
                .mark("make replay")
            )
            self._spinner = ui.spinner(size="sm")
            self._said = ui.label().classes("mam-faint").mark("replay status")
        self._spinner.set_visibility(False)
        self._choice = ui.select([], label="episodes played", on_change=self._open)
        self._choice.props("dense options-dense borderless").style("min-width: 180px").mark(
            "replays"
        )
        with ui.element("div").classes("mam-replay") as self._stage:
            with ui.element("div").classes("mam-card"):
                self._picture = ui.interactive_image().classes("mam-frame").mark("frame")
                self._missing = ui.label().classes("mam-faint")
                self._map = Map(self._follow)
                self._build_controls(select)
            with ui.element("div").classes("mam-card"):
                self._about = ui.label().classes("mam-card-title")
                self._step = ui.label().classes("mam-faint").mark("replay step")
                self._decisions = ui.html("", sanitize=False).mark("decisions")
                self._decisions.classes("mam-scroll mam-decisions")
                self._mixing = ui.html("", sanitize=False).classes("mam-scroll").mark("mixing")
                self._course = ui.echart({"series": []}).classes("mam-course")
                self._map.mark_on(self._course)
        self._stage.set_visibility(False)

    def _build_controls(self, select: str) -> None:
        """Lay out what an episode is played with."""
        with ui.row().classes("mam-bar").style("flex-wrap: nowrap"):
            # The map plays, and is told at once, not by way of the server.
            themap = f"getElement({self._map.id})"
            self._button = ui.button(icon="play_arrow").props("flat round dense")
            self._button.on("click", js_handler=f"() => {themap}.toggle()")
            self._slider = ui.slider(min=0, max=1, value=0, on_change=self._show).mark("step")
            self._slider.on("update:model-value", js_handler=f"state => {themap}.seek(state)")
        with ui.row().classes("mam-bar"):
            speeds = {speed: f"{speed} steps/s" for speed in _SPEEDS}
            self._speed = ui.select(speeds, label="speed", value=7, on_change=self._look)
            self._drawing = ui.toggle(["map", "picture"], value="map", on_change=self._look)
            self._colour = ui.toggle(
                {"value": "by value", "order": "by order"}, value="value", on_change=self._look
            )
            self._trail = ui.select(_TRAILS, label="trails", value=10, on_change=self._look)
            for one in (self._speed, self._trail):
                one.props(select)
            for one in (self._drawing, self._colour):
                one.props(TOGGLE)
        self._look()

    async def refresh(self, runs: Sequence[LiveRun]) -> None:
        """Offer these runs."""
        self._runs = {one.name: one for one in runs if one.config}
        names = list(self._runs)
        if names != self._run.options:
            value = self._run.value if self._run.value in names else (names[0] if names else None)
            self._run.set_options(names, value=value)
        self._list()

    @property
    def _chosen(self) -> LiveRun | None:
        return self._runs.get(str(self._run.value))

    @property
    def _state(self) -> int:
        return int(self._slider.value or 0)

    def _choose_run(self) -> None:
        one = self._chosen
        seeds = (
            list(range(one.config.seed, one.config.seed + one.num_seeds))
            if one and one.config
            else []
        )
        self._seed.set_options(seeds, value=seeds[0] if seeds else None)
        refusal = self._players.refusal(one) if one else ""
        self._said.text = refusal
        self._play.set_enabled(not refusal)
        self._replays = {}
        self._list()

    def _list(self) -> None:
        """Offer the episodes of the run; of another run, open the newest."""
        found = replays_of(one) if (one := self._chosen) else {}
        if found != self._replays:
            self._replays = found
            names = list(found)
            value = (
                self._choice.value
                if self._choice.value in names and self._replay
                else (names or [None])[0]
            )
            self._choice.set_options(names, value=value)
        self._choice.set_visibility(bool(found))

    async def _make(self) -> None:
        if not (one := self._chosen):
            return
        self._play.disable()
        self._spinner.set_visibility(True)
        self._said.text = "starting…"
        try:
            path = await self._players.play(
                one,
                policy_seed=int(self._seed.value),
                greedy=bool(self._greedy.value),
                seed=int(self._episode.value or 0),
                say=self._say,
            )
        except UserError as error:
            self._said.text = str(error)
        else:
            self._choice.value = None
            self._list()
            self._choice.value = path.stem
        finally:
            self._play.enable()
            self._spinner.set_visibility(False)

    def _say(self, line: str) -> None:
        self._said.text = line

    async def _open(self) -> None:
        self._button.props("icon=play_arrow")
        path = self._replays.get(str(self._choice.value))
        self._replay = None
        self._stage.set_visibility(False)
        if path is None:
            return
        try:
            self._key, self._replay = await asyncio.to_thread(self._load, path)
        except UserError as error:
            self._said.text = str(error)
            return
        about = self._replay.about
        how = "greedy" if about.get("greedy") else "sampled"
        self._about.text = (
            f"{about.get('algorithm', '')} on {about.get('env', '')} · "
            f"seed {about.get('policy_seed', '–')}, {how}, "
            f"episode {about.get('seed', '–')} · return {about['episode_return']:.3f}"
        )
        episode = scene(self._key, self._replay)
        drawn, mapped = bool(self._replay.frames), "box" in episode
        self._missing.text = (
            ""
            if drawn or mapped
            else f"{about.get('undrawn') or 'there is no picture'}: only what was decided"
        )
        self._drawing.set_visibility(drawn and mapped)
        crowd = len(self._replay.agents) > _MOST_AGENTS
        self._drawing.value = "map" if mapped and (crowd or not drawn) else "picture"
        self._opened += 1
        self._map.set(episode=episode | {"opened": self._opened})
        self._look()
        self._stage.set_visibility(True)
        self._course._props["options"] = _course(self._replay)
        self._course.update()
        self._slider.props(f"max={self._replay.last}")
        self._slider.set_value(0)
        self._show()

    def _show(self) -> None:
        """Show the state at the slider."""
        if not (replay := self._replay):
            return
        state = min(self._state, replay.last)
        if (frame := replay.frame(state)) is not None:
            self._picture.set_source(f"/frames/{self._key}/{frame}.png")
        so_far = f"reward so far {replay.reward_so_far(state):.3f}"
        if state >= replay.length:
            how = "terminated" if replay.about.get("terminated") else "cut off by the time limit"
            self._step.text = f"after step {replay.length}: {how} · {so_far}"
            return
        self._step.text = f"step {state + 1} of {replay.length} · {so_far}"
        self._decisions.set_content(_decisions(replay, state))
        self._mixing.set_content(_mixing(replay, state))

    def _look(self) -> None:
        """Show the map or the picture, as it was chosen."""
        mapped = self._drawing.value == "map"
        self._map.set(
            shown=mapped,
            speed=self._speed.value,
            colour=self._colour.value,
            trail=self._trail.value,
        )
        self._picture.set_visibility(not mapped and bool(self._replay and self._replay.frames))
        for one in (self._colour, self._trail):
            one.set_visibility(mapped)

    def _follow(self, opened: int, state: int, playing: bool) -> None:
        """Show what the map has come to, unless that episode was closed since."""
        if self._replay and opened == self._opened:
            self._slider.set_value(state)
            self._button.props(f"icon={'pause' if playing else 'play_arrow'}")


def _decisions(replay: Replay, step: int) -> str:
    """Tabulate what each agent decided at a step, as HTML."""
    trace = {name: array[step] for name, array in replay.trace.items()}
    place = np.empty(len(trace["order"]), int)
    place[trace["order"].astype(int)] = np.arange(1, len(place) + 1)
    rows, decimals = [], replay.decimals
    for agent in range(min(len(place), _MOST_AGENTS)):
        shown = ", ".join(f"{part:.{decimals}f}" for part in np.atleast_1d(trace["action"][agent]))
        numbers = [f"{trace[name][agent]:.3f}" for name in ("log_prob", "value", "reward")]
        rows.append([replay.agents[agent], place[agent], shown, *numbers])
    header = ["agent", "decides", "action", "log-prob.", "value", "reward"]
    more = len(place) - len(rows)
    note = f"<p>and {more} more agents</p>" if more > 0 else ""
    return grid(header, rows, "lrrrrr", faint=[not alive for alive in trace["alive"]]) + note


def _mixing(replay: Replay, step: int) -> str:
    """Draw how much each agent takes of every other at a step, a matrix per mixer, as HTML."""
    names, figures = [escape(name) for name in replay.agents], ""
    for mixer, shares in replay.mixing.items():
        heard = ["start", *names] if shares.shape[-1] > len(names) else names
        head = "".join(f"<th><span>{name}</span></th>" for name in heard)
        rows = ""
        for name, row in zip(names, shares[step], strict=True):
            rows += f"<tr><th>{name}</th>"
            for other, share in zip(heard, row, strict=True):
                told = f"{name} takes {share:.0%} of {other}"
                rows += f'<td style="--share: {share:.3f}" title="{told}"></td>'
            rows += "</tr>"
        figures += (
            f"<figure><figcaption>{escape(mixer)}</figcaption>"
            f"<table><tr><th></th>{head}</tr>{rows}</table></figure>"
        )
    return figures and f'<div class="mam-mixing">{figures}</div>'


def _course(replay: Replay) -> dict[str, Any]:
    """Chart values and the reward so far over the whole episode; return the options."""
    text, line = {"color": GREY, "fontSize": 11}, {"lineStyle": {"color": GREY, "opacity": 0.22}}
    common = {
        "type": "line",
        "animation": False,
        "showSymbol": replay.length < 3,
        "emphasis": {"disabled": True},
    }
    so_far = np.concatenate([[0.0], replay.trace["reward"].mean(axis=1).cumsum()])
    rewards = [[state + 1, float(f"{value:.6g}")] for state, value in enumerate(so_far)]
    series = [
        common
        | {
            "id": "reward",
            "name": "reward so far",
            "data": rewards,
            "step": "end",
            "color": GREY,
            "z": 3,
        }
        | {"lineStyle": {"width": 2}}
    ]
    for index, (name, values) in enumerate(_lines(replay)):
        points = [
            [step + 1, float(f"{value:.6g}") if value == value else None]
            for step, value in enumerate(values)
        ]
        look = {"color": COLOURS[index % (len(COLOURS) - 1)], "lineStyle": {"width": 1.5}}
        series.append(common | look | {"id": f"value {index}", "name": name, "data": points})
    return {
        "textStyle": {"fontFamily": "inherit"},
        "grid": {"left": 4, "right": 14, "top": 26, "bottom": 4, "containLabel": True},
        "legend": LEGEND | {"textStyle": text},
        "tooltip": {
            "trigger": "axis",
            "confine": True,
            ":valueFormatter": "v => v == null ? '–' : mam.short(v)",
        },
        "xAxis": {
            "type": "value",
            "min": 1,
            "max": max(replay.last + 1, 2),
            "minInterval": 1,
            "axisLabel": text,
        }
        | {"splitLine": {"show": False}, "axisLine": line, "axisTick": {"show": False}},
        "yAxis": {
            "type": "value",
            "scale": True,
            "axisLabel": text | {":formatter": "mam.short"},
            "splitLine": line,
        },
        "series": series,
    }


def _lines(replay: Replay) -> list[tuple[str, np.ndarray]]:
    """Return lines of values, [T]: of each of the first agents, of a crowd the extent."""
    values, alive = replay.trace["value"], replay.trace["alive"] != 0
    if len(replay.agents) <= _MOST_AGENTS:
        agents = enumerate(replay.agents[:_MOST_LINES])
        return [(f"value of agent {name}", values[:, agent]) for agent, name in agents]
    of = np.ma.masked_array(values, ~alive | ~np.isfinite(values))
    extent = {"highest": of.max(axis=1), "mean": of.mean(axis=1), "lowest": of.min(axis=1)}
    return [(f"{name} value", line.filled(np.nan)) for name, line in extent.items()]
