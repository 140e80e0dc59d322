"""The report's figures: small, one statement each, side by side on a desk and in a column on a phone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from mam.report.results import THRESHOLDS, Curve, Results
from mam.report.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: distinct with any kind of colour vision, and in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_WIDTH, _HEIGHT = 4.2, 2.9  # inches
_DIRECTION = {"optimality gap": " (less is better)"}

Styles = Mapping[str, tuple[str, str, str]]  # algorithm → colour, dashes, mark


@dataclass(frozen=True)
class Figure:
    """A drawing of one pair of axes, not yet drawn."""

    name: str  # of its file
    title: str
    draw: Callable[["Axes"], None]
    height: float = _HEIGHT  # inches


def styles_of(algorithms: Sequence[str]) -> Styles:
    """One look per algorithm, the same in every figure."""
    looks = zip(cycle(_COLOURS), cycle(_MARKERS), strict=False)
    return {
        name: (colour, _LINES[index // len(_COLOURS) % len(_LINES)], marker)
        for index, (name, (colour, marker)) in enumerate(zip(algorithms, looks, strict=False))
    }


def aggregate_figures(results: Results) -> list[Figure]:
    """One figure per statistic: an interval for each algorithm."""
    styles = styles_of(results.algorithms)
    return [
        Figure(
            f"aggregate_{statistic.replace(' ', '_').lower()}",
            f"{statistic[0].upper()}{statistic[1:]} of normalised scores{_DIRECTION.get(statistic, '')}",
            partial(_intervals, estimates, [styles[name] for name in estimates], None),
            height=_rows(len(estimates)),
        )
        for statistic, estimates in results.aggregates.items()
    ]


def comparison_figures(results: Results) -> list[Figure]:
    """Performance profiles, probability of improvement, and IQM against steps."""
    styles, figures = styles_of(results.algorithms), list[Figure]()
    if results.profiles:
        curves = {name: Curve(np.arange(len(THRESHOLDS)), profile) for name, profile in results.profiles.items()}
        draw = partial(_curves, curves, styles, x=THRESHOLDS, labels=("normalised score τ", "share of runs above τ"))
        figures.append(Figure("performance_profiles", "Performance profiles", draw))
    if results.improvements:
        estimates = {f"{x} > {y}": value for (x, y), value in results.improvements.items()}
        draw = partial(_intervals, estimates, [styles[x] for x, _ in results.improvements], 0.5)
        title, height = "Probability of improvement", _rows(len(estimates))
        figures.append(Figure("probability_of_improvement", title, draw, height=height))
    if results.efficiency:
        draw = partial(_curves, results.efficiency, styles, labels=("environment steps", "IQM of normalised returns"))
        figures.append(Figure("sample_efficiency", "Sample efficiency", draw))
    return figures


def task_figures(results: Results) -> list[Figure]:
    """A learning curve per task that has an evaluation."""
    styles, figures = styles_of(results.algorithms), list[Figure]()
    for task in results.tasks:
        curves = {name: results.curves[task, name] for name in results.algorithms if (task, name) in results.curves}
        if curves:
            draw = partial(_curves, curves, styles, labels=("environment steps", "mean episode return"))
            figures.append(Figure(f"curve_{file_name(task)}", task, draw))
    return figures


def file_name(task: str) -> str:
    """A task's name without what file systems and links do not like."""
    return "".join(letter if letter.isalnum() or letter in "-_.," else "_" for letter in task)


def _rows(count: int) -> float:
    return 0.8 + 0.3 * max(count, 2)


def _intervals(
    estimates: Mapping[str, Estimate], styles: Sequence[tuple[str, str, str]], middle: float | None, axes: "Axes"
) -> None:
    """A row per name: a mark, and a bar for its interval."""
    for row, (estimate, (colour, _, marker)) in enumerate(zip(estimates.values(), styles, strict=True)):
        low, high = (end if np.isfinite(end) else estimate.value for end in (estimate.low, estimate.high))
        axes.plot([low, high], [row, row], color=colour, linewidth=12, alpha=0.35, solid_capstyle="butt")
        axes.plot(estimate.value, row, marker=marker, color=colour, markersize=5)
    if middle is not None:
        axes.axvline(middle, color="#666666", linestyle=":", linewidth=1)
        axes.set_xlim(-0.02, 1.02)
    axes.set_yticks(range(len(estimates)), list(estimates))
    axes.set_ylim(len(estimates) - 0.4, -0.6)
    axes.grid(color="#DDDDDD", linewidth=0.6, axis="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)


def _curves(
    curves: Mapping[str, Curve],
    styles: Styles,
    axes: "Axes",
    *,
    labels: tuple[str, str],
    x: np.ndarray | None = None,
) -> None:
    """A line per algorithm in the band of its interval."""
    from matplotlib.ticker import EngFormatter

    for name, curve in curves.items():
        colour, dashes, marker = styles[name]
        where, returns = curve.steps if x is None else x, curve.returns
        alone = {"marker": marker, "markersize": 4} if len(where) < 12 else {}
        axes.plot(where, returns.value, color=colour, linestyle=dashes, linewidth=1.8, label=name, **alone)
        axes.fill_between(where, returns.low, returns.high, color=colour, alpha=0.18, linewidth=0)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    if x is None:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)


def render(figure: Figure, format: str) -> bytes:
    """The figure as `svg` (letters stay letters; the same bytes every time) or `png`."""
    import io

    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    # The salt keeps the names within several pictures on one page apart.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": figure.name, "font.size": 9}):
        canvas = Canvas(figsize=(_WIDTH, figure.height), dpi=200, layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.set_title(figure.title, loc="left", fontsize=9, fontweight="bold")
        figure.draw(axes)
        file = io.BytesIO()
        metadata = {"Date": None} if format == "svg" else None
        canvas.savefig(file, format=format, metadata=metadata)
        return file.getvalue()
