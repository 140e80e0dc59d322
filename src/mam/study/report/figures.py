"""The report's figures: small, one statement each, side by side or in a column on a phone."""

import itertools
import textwrap
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mam.statistics import Estimate
from mam.study.report.results import THRESHOLDS, Curve, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Okabe and Ito's palette: distinct with any kind of colour vision; a grey that dark pages show for
# its black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A")
# Policies that have a colour for good.
_POLICIES = ("mam", "mat", "mam2", "ippo", "mappo", "rec_mappo", "rec_mam", "sable")
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_WIDTH, _HEIGHT = 4.2, 2.9  # inches
_WHOLE, _HALF = 28, 16  # letters in a line of a name beside a row, on one side and on both
_LONGEST_NAME = 100  # letters of a task in a file's name
_DIRECTION = {"optimality gap": " (less is better)"}

Styles = Mapping[str, tuple[str, str, str]]  # algorithm → colour, dashes, mark


@dataclass(frozen=True)
class Figure:
    """A drawing of one pair of axes, not yet drawn."""

    name: str  # of its file
    title: str
    draw: Callable[["Axes"], None]
    height: float = _HEIGHT  # inches


def styles_of(algorithms: Collection[str]) -> Styles:
    """Give each algorithm a look: a policy's own whatever is beside it, others what is left."""
    markers = dict(zip(COLOURS, _MARKERS, strict=True))
    looks = [(colour, dashes, markers[colour]) for dashes in _LINES for colour in COLOURS]
    styles = {
        name: look for name, look in zip(_POLICIES, looks, strict=False) if name in algorithms
    }
    left = itertools.cycle([look for look in looks if look not in styles.values()])
    return styles | {name: next(left) for name in sorted(algorithms) if name not in styles}


def aggregate_figures(results: Results) -> list[Figure]:
    """Make one figure per statistic: an interval for each algorithm."""
    styles = styles_of(results.algorithms)
    return [
        Figure(
            f"aggregate_{statistic.replace(' ', '_').lower()}",
            f"{statistic[0].upper()}{statistic[1:]} of normalised scores"
            f"{_DIRECTION.get(statistic, '')}",
            partial(
                _intervals,
                list(estimates.values()),
                [styles[name] for name in estimates],
                list(estimates),
            ),
            height=_rows(estimates),
        )
        for statistic, estimates in results.aggregates.items()
    ]


def comparison_figures(results: Results) -> list[Figure]:
    """Make performance profiles, probability of improvement, and IQM against steps."""
    styles, figures = styles_of(results.algorithms), list[Figure]()
    if results.profiles:
        curves = {
            name: Curve(np.arange(len(THRESHOLDS)), profile)
            for name, profile in results.profiles.items()
        }
        draw = partial(
            _curves,
            curves,
            styles,
            x=THRESHOLDS,
            labels=("normalised score τ", "share of runs above τ"),
        )
        figures.append(Figure("performance_profiles", "Performance profiles", draw))
    if results.improvements:
        better, worse = zip(*results.pairs, strict=True)
        estimates = [results.improvements[pair] for pair in results.pairs]
        draw = partial(
            _intervals, estimates, [styles[name] for name in better], better, against=worse
        )
        title, height = "Probability of improvement", max(_rows(better, _HALF), _rows(worse, _HALF))
        figures.append(Figure("probability_of_improvement", title, draw, height=height))
    if results.efficiency:
        draw = partial(
            _curves,
            results.efficiency,
            styles,
            labels=("environment steps", "IQM of normalised returns"),
        )
        figures.append(Figure("sample_efficiency", "Sample efficiency", draw))
    return figures


def task_figures(results: Results) -> list[Figure]:
    """Make the learning curves of every task that has an evaluation, by steps and by the clock."""
    styles, figures = styles_of(results.algorithms), list[Figure]()
    for task in results.tasks:
        for kind, axis, cells in (
            ("curve", "environment steps", results.curves),
            ("clock", "minutes of wall-clock", results.clock_curves),
        ):
            names = [name for name in results.algorithms if (task, name) in cells]
            curves = {name: cells[task, name] for name in names}
            if curves:
                draw = partial(_curves, curves, styles, labels=(axis, "mean episode return"))
                name = _file_name(kind, task, {figure.name for figure in figures})
                figures.append(Figure(name, task, draw))
    return figures


def _file_name(kind: str, task: str, taken: Collection[str]) -> str:
    """Name a task's curve for any file system or link, unlike the names that are taken."""
    letters = (c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in task)
    name = f"{kind}_{''.join(letters)[:_LONGEST_NAME]}"
    return next(
        one
        for one in itertools.chain([name], map(f"{name}-{{}}".format, itertools.count(2)))
        if one not in taken
    )


def _label(name: str, width: int = _WHOLE) -> str:
    """Wrap a name; of a very long one only the beginning and the end, as tables hold it whole."""
    half = 3 * width // 2
    return textwrap.fill(name if len(name) <= 2 * half else f"{name[:half]}…{name[-half:]}", width)


def _rows(names: Collection[str], width: int = _WHOLE) -> float:
    lines = max(_label(name, width).count("\n") + 1 for name in names)
    return 0.8 + max(0.3, 0.15 * lines + 0.05) * max(len(names), 2)


def _intervals(
    estimates: Sequence[Estimate],
    styles: Sequence[tuple[str, str, str]],
    names: Sequence[str],
    axes: "Axes",
    *,
    against: Sequence[str] = (),
) -> None:
    """Draw a row per name: a mark, and a bar for its interval.

    A probability stands between a name and another.
    """
    for row, (estimate, (colour, _, marker)) in enumerate(zip(estimates, styles, strict=True)):
        low, high = (
            end if np.isfinite(end) else estimate.value for end in (estimate.low, estimate.high)
        )
        axes.plot(
            [low, high], [row, row], color=colour, linewidth=12, alpha=0.35, solid_capstyle="butt"
        )
        axes.plot(estimate.value, row, marker=marker, color=colour, markersize=5)
    width = _HALF if against else _WHOLE
    axes.set_yticks(range(len(names)), [_label(name, width) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(color="#DDDDDD", linewidth=0.6, axis="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    if against:
        axes.axvline(0.5, color="#666666", linestyle=":", linewidth=1)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("← the right one is better · the left one is better →")
        right = axes.secondary_yaxis("right")
        right.set_yticks(range(len(against)), [_label(name, width) for name in against])
        right.tick_params(right=False)
        right.spines["right"].set_visible(False)


def _curves(
    curves: Mapping[str, Curve],
    styles: Styles,
    axes: "Axes",
    *,
    labels: tuple[str, str],
    x: np.ndarray | None = None,
) -> None:
    """Draw a line per algorithm in the band of its interval."""
    from matplotlib.ticker import EngFormatter

    for name, curve in curves.items():
        colour, dashes, marker = styles[name]
        where, returns = curve.at if x is None else x, curve.returns
        alone = {"marker": marker, "markersize": 4} if len(where) < 12 else {}
        axes.plot(
            where,
            returns.value,
            color=colour,
            linestyle=dashes,
            linewidth=1.8,
            label=_label(name),
            **alone,
        )
        axes.fill_between(where, returns.low, returns.high, color=colour, alpha=0.18, linewidth=0)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    if x is None:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)


def drawn(figure: Figure) -> "Canvas":
    """Draw the figure, on a canvas of Matplotlib's."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    # Dollars make no formula.
    with matplotlib.rc_context({"font.size": 9, "text.parse_math": False}):
        canvas = Canvas(figsize=(_WIDTH, figure.height), dpi=200, layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        canvas.suptitle(_label(figure.title, 54), x=0.02, ha="left", fontsize=9, fontweight="bold")
        figure.draw(axes)
    return canvas


def render(figure: Figure, format: str) -> bytes:
    """Render the figure as `svg` (letters stay letters; the same bytes every time) or `png`."""
    import io

    import matplotlib

    # The salt keeps names within several images on one page apart; ticks are made when it is saved.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": figure.name}
    settings |= {"font.size": 9, "text.parse_math": False}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a box stands for it
        file = io.BytesIO()
        metadata = {"Date": None} if format == "svg" else None
        drawn(figure).savefig(file, format=format, metadata=metadata)
        return file.getvalue()
