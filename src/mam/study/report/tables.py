"""The report's tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np

from mam.config import Config, flat, to_json
from mam.runs.sinks import RETURN
from mam.statistics import ENOUGH_SEEDS, Estimate
from mam.study.report.collect import NO_SETTINGS
from mam.study.report.results import Results

_METRICS = {
    RETURN: "Absolute metric: mean episode return",
    f"greedy_{RETURN}": "The most likely actions (greedy), with the weights that did best so",
    f"sampled_{RETURN}": "Sampled actions, with the weights that did best so",
    "won": "Win rate: share of episodes won",
}


@dataclass(frozen=True)
class Cell:
    """Text, and whether it stands out."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """Rows below a header; the first column names the row."""

    title: str
    header: Sequence[str]
    align: str  # a letter per column: l for text, r for numbers
    rows: Sequence[Sequence[Cell]]
    note: str = ""


_ACTIONS = {
    frozenset([False]): "Actions are sampled from the policy",
    frozenset([True]): "Actions are the most likely ones (greedy)",
    frozenset([False, True]): "Actions are sampled in some runs, "
    "the most likely ones (greedy) in others",
}
_BOLD = "Bold: its interval lies wholly above those of all others."


def tables(results: Results) -> list[Table]:
    """Make all tables that there is something to put in."""
    made = (
        _aggregates(results),
        *(_per_task(results, metric) for metric in _METRICS),
        _improvements(results),
    )
    return [
        table
        for table in (*made, _speeds(results), _settings(results), _runs(results))
        if table.rows
    ]


def _aggregates(results: Results) -> Table:
    columns = {
        statistic: _compared(list(estimates.values()), less_is_better=statistic == "optimality gap")
        for statistic, estimates in results.aggregates.items()
    }
    rows = [
        [Cell(name), *cells]
        for name, *cells in zip(results.compared, *columns.values(), strict=True)
        if columns
    ]
    tasks = results.common_tasks
    where = ", ".join(tasks) if len(tasks) <= 6 else f"{len(tasks)} tasks"
    note = f"Scores, normalised per task, on {where}; 95 % stratified bootstrap intervals. {_BOLD}"
    return Table("Aggregates", ["algorithm", *columns], "l" + "r" * len(columns), rows, note)


def _per_task(results: Results, metric: str) -> Table:
    rows = []
    for task in results.tasks:
        scores = [results.score(task, name, metric) for name in results.compared]
        if any(scores):
            rows.append([Cell(task), *_compared(scores)])
    note = (
        f"The best checkpoint's fresh episodes, mean over seeds and 95 % bootstrap interval. "
        f"{_BOLD}"
    )
    if metric == RETURN:
        greedy = {seed.run.config.eval.greedy for seed in results.seeds}
        note = f"{_ACTIONS[frozenset(greedy)]}. {note}"
    return Table(
        _METRICS[metric], ["task", *results.compared], "l" + "r" * len(results.compared), rows, note
    )


def _compared(estimates: Sequence[Estimate | None], *, less_is_better: bool = False) -> list[Cell]:
    """Make a cell per estimate, bold if it is better than all others beyond doubt."""
    cells = []
    for index, mine in enumerate(estimates):
        others = [other for i, other in enumerate(estimates) if i != index and other is not None]
        if mine is None:
            cells.append(Cell("–"))
        else:
            clear = [other.above(mine) if less_is_better else mine.above(other) for other in others]
            cells.append(Cell(shown(mine), bold=bool(others) and all(clear)))
    return cells


def shown(estimate: Estimate) -> str:
    """Format as `0.965 [0.950, 0.978]`, or the value alone where there is no interval."""
    value, low, high = (number(float(x)) for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low},\N{NO-BREAK SPACE}{high}]" if np.isfinite(estimate.low) else value


def number(value: float) -> str:
    """Format with three decimals, fewer for large numbers."""
    return (
        "–"
        if not np.isfinite(value)
        else f"{value:.{3 if abs(value) < 10 else 2 if abs(value) < 100 else 1}f}"
    )


def _improvements(results: Results) -> Table:
    rows = []
    names = results.compared if results.pairs else []
    for x in names:
        cells = [Cell(x)]
        for value in (results.improvements.get((x, y)) for y in names):
            clear = (
                value is not None
                and value.seeds >= ENOUGH_SEEDS
                and bool(value.low > 0.5 or value.high < 0.5)
            )
            cells.append(Cell("–" if value is None else shown(value), bold=clear))
        rows.append(cells)
    note = (
        "Probability that a run of the row's algorithm beats one of the column's on the same task. "
        "Bold: the interval leaves out ½."
    )
    return Table(
        "Probability of improvement", ["row > column", *names], "l" + "r" * len(names), rows, note
    )


def _speeds(results: Results) -> Table:
    rows = []
    for task, name in results.cells:
        runs = [seed.run for seed in results.runs_of(task, name)]
        seeds = sorted({run.config.num_seeds for run in runs})
        speeds = [run.steps_per_second for run in runs if np.isfinite(run.steps_per_second)]
        cells = (
            f"{np.median(speeds):,.0f}" if speeds else "–",
            str(timedelta(seconds=round(float(np.median([run.seconds for run in runs]))))),
            " or ".join(map(str, seeds)),
            ", ".join(sorted({run.device for run in runs})),
        )
        rows.append([Cell(task), Cell(name), *map(Cell, cells)])
    note = (
        "Per run, medians over runs. Steps/s: environment steps of all seeds of the run together, "
        "while training; wall-clock: everything, compiling included."
    )
    header = ["task", "algorithm", "steps/s", "wall-clock", "seeds side by side", "device"]
    return Table("Speed", header, "llrrrl", rows, note)


def _settings(results: Results) -> Table:
    defaults, rows = flat(to_json(Config())), []
    for task, name in results.cells:
        runs = [seed.run for seed in results.runs_of(task, name)]
        settings = [flat(to_json(run.config)) for run in runs]
        unlike = {
            key: dict.fromkeys(str(of_run[key]) for of_run in settings)
            for key, default in defaults.items()
            if not key.startswith(NO_SETTINGS)
            and any(of_run[key] != default for of_run in settings)
        }
        text = ", ".join(f"{key}={' or '.join(values)}" for key, values in unlike.items())
        commits = dict.fromkeys(
            run.commit[:12] + "-dirty" * run.commit.endswith("-dirty") for run in runs
        )
        rows.append([Cell(task), Cell(name), Cell(", ".join(commits)), Cell(text or "–")])
    note = (
        "Settings that are not the defaults of `mam train` without a preset; "
        "the rest is in each run's config.json."
    )
    return Table("Settings", ["task", "algorithm", "commit", "settings"], "llll", rows, note)


def _runs(results: Results) -> Table:
    rows = []
    for task, name in results.cells:
        for seed in results.runs_of(task, name):
            run = seed.run
            seeds = f"{run.config.seed}…{run.config.seed + run.config.num_seeds - 1}"
            state = "finished" if run.finished else f"{100 * run.step_count / run.budget:.0f} %"
            texts = (
                str(run.path),
                task,
                name,
                seeds if run.config.num_seeds > 1 else str(run.config.seed),
            )
            rows.append([*map(Cell, texts), Cell(f"{run.step_count:,}"), Cell(state)])
    return Table("Runs", ["folder", "task", "algorithm", "seeds", "steps", "state"], "lllrrl", rows)
