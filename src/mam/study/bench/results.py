"""What a bench leaves: rows of a CSV file, a table per cell, and a plot."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from mam.study.bench.timing import power_law

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Row:
    """One candidate at one size: a line of the CSV file. None is an empty field."""

    what: str
    candidate: str
    num_agents: int
    batch: int
    median_ms: float | None = None  # of one call, over the rounds
    min_ms: float | None = None
    p99_ms: float | None = None  # of single calls, where how long each takes counts
    per_agent_us: float | None = None  # of acting: one agent's step in all environments
    env_steps_per_s: float | None = None  # of training
    baseline: str | None = None
    # Of the median to the baseline's, below 1 if faster; of a part, its share of the whole.
    ratio: float | None = None
    temp_mb: float | None = None  # temporary memory of the program, at its peak; 10^6 bytes
    parameters: int | None = None
    compile_s: float | None = None
    rounds: int | None = None  # samples behind the median
    extrapolated: bool = False  # the beginning was timed, and scaled up
    device: str = ""
    jax: str = ""
    note: str = ""  # what is left out, and why


class CsvFile:
    """Rows on disk, one by one: an interrupted bench keeps what it has."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, [field.name for field in fields(Row)])
        self._writer.writeheader()

    def __enter__(self) -> "CsvFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, row: Row) -> None:
        """Append a row and hand it to the operating system."""
        values = asdict(row)
        self._writer.writerow(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
        )
        self._file.flush()


def _number(value: float) -> str:
    """Format a number with three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


_COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "median_ms": ("median ms", _number),
    "min_ms": ("min ms", _number),
    "p99_ms": ("p99 ms", _number),
    "ratio": ("ratio", lambda ratio: f"{ratio:.2f}"),
    "per_agent_us": ("µs / agent", _number),
    "env_steps_per_s": ("env steps / s", _number),
    "temp_mb": ("temp MB", _number),
    "parameters": ("parameters", lambda count: f"{count:,}"),
    "compile_s": ("compile s", lambda seconds: f"{seconds:.1f}"),
}


def cell_report(rows: Sequence[Row]) -> Group:
    """Tabulate the measured candidates of one cell, without empty columns, and add the notes."""
    title = f"{rows[0].what} · N = {rows[0].num_agents} · batch {rows[0].batch}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    shown = {
        name: form
        for name, form in _COLUMNS.items()
        if any(getattr(row, name) is not None for row in rows)
    }
    table.add_column("candidate", no_wrap=True)
    for header, _ in shown.values():
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        if row.median_ms is not None:
            values = [(getattr(row, name), form) for name, (_, form) in shown.items()]
            table.add_row(
                row.candidate, *("–" if value is None else form(value) for value, form in values)
            )
    return Group(table, *(f"  {row.candidate}: {row.note}" for row in rows if row.note), "")


def curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group the measured rows by candidate, fewest agents first."""
    names = dict.fromkeys(row.candidate for row in rows)
    measured = sorted(
        (row for row in rows if row.median_ms is not None), key=lambda row: row.num_agents
    )
    found = {name: [row for row in measured if row.candidate == name] for name in names}
    return {name: curve for name, curve in found.items() if curve}


def slope(curve: Sequence[Row]) -> float | None:
    """Return the exponent of time against N; None if only one N was measured."""
    if len(curve) < 2:
        return None
    return power_law([row.num_agents for row in curve], [row.median_ms or 0.0 for row in curve])


def slope_table(rows: Sequence[Row]) -> Table | None:
    """Tabulate how time grows with N, over all sizes and at the end; None for a single size."""
    table = Table(title=f"time ∝ N^slope, {_fixed(rows)}", title_justify="left", box=SIMPLE_HEAD)
    for header in ("candidate", "slope", "between the two largest N"):
        table.add_column(header, justify="left" if header == "candidate" else "right", no_wrap=True)
    for name, curve in curves(rows).items():
        slopes = (slope(curve), slope(curve[-2:]))
        if None not in slopes:
            table.add_row(name, *(f"{value:.2f}" for value in slopes))
    return table if table.row_count else None


def _fixed(rows: Sequence[Row]) -> str:
    """Say what is the same at every N."""
    batches, tokens = {row.batch for row in rows}, {row.batch * row.num_agents for row in rows}
    if len(batches) == 1:
        return f"batch {rows[0].batch}"
    return f"batch × N {'=' if len(tokens) == 1 else '≈'} {max(tokens):,}"


# Okabe and Ito's palette: distinct with any kind of colour vision, and in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", ":")


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw time and temporary memory against N, or of single calls the slow ones, a line for each.

    Hollow marks are extrapolated. `kind/part` has the colour of its kind, and the dashes of its
    part.

    Args:
        path: PNG to write, 1650 × 750 pixels.
        rows: of one bench, at least one of them measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    time, beside = figure.subplots(1, 2)
    slow = any(row.p99_ms for row in rows)
    column, title = (
        ("p99_ms", "99 of 100 calls take at most [ms]")
        if slow
        else ("temp_mb", "temporary memory [MB]")
    )
    found = curves(rows)
    kinds, parts = (list(dict.fromkeys(name.partition("/")[i] for name in found)) for i in (0, 2))
    for name, curve in found.items():
        kind, _, part = name.partition("/")
        colour = _COLOURS[kinds.index(kind) % len(_COLOURS)]
        style = {
            "color": colour,
            "linestyle": _LINES[parts.index(part) % len(_LINES)],
            "linewidth": 1.8,
        }
        growth = slope(curve)
        label = name if growth is None else f"{name}  (slope {growth:.2f})"
        _draw(time, curve, "median_ms", style | {"label": label})
        _draw(beside, curve, column, style)
    numbers = sorted({row.num_agents for row in rows})
    _decorate(time, "median time of a call [ms]", numbers)
    _decorate(beside, title, numbers)
    figure.suptitle(
        f"mam bench {rows[0].what} · {_fixed(rows)} · {rows[0].device}", x=0.01, ha="left"
    )
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path)


def _draw(axes: "Axes", curve: Sequence[Row], name: str, style: Mapping[str, Any]) -> None:
    drawn = [row for row in curve if getattr(row, name)]  # a logarithmic axis has no zero
    x, y = [row.num_agents for row in drawn], [getattr(row, name) for row in drawn]
    axes.plot(x, y, **style)
    faces = ["white" if row.extrapolated else style["color"] for row in drawn]
    axes.scatter(x, y, s=28, c=faces, edgecolors=style["color"], zorder=3)


def _decorate(axes: "Axes", title: str, numbers: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.set_xticks([], minor=True)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("number of agents N")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
