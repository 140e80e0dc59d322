"""`mam.report`: the report's pieces in a notebook.

Runs, their metrics and every number of the report are pandas' frames (extra `notebook`), its
figures are Matplotlib's.
"""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mam.config import flat, to_json
from mam.errors import UserError, needs_extra
from mam.runs.files import read_config
from mam.runs.sinks import RETURN, Record, read_records, seed_means
from mam.study.report import checks
from mam.study.report.collect import SeedRun, algorithm_of, find_runs, read_run
from mam.study.report.figures import aggregate_figures, comparison_figures, drawn, task_figures
from mam.study.report.numbers import numbers_behind
from mam.study.report.results import Results
from mam.study.report.tables import tables as shown_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Paths = str | Path | Iterable[str | Path]  # folders of runs, or folders that contain them


def runs(paths: Paths, by: Sequence[str] = ()) -> "DataFrame":
    """Return a row per run and seed: what it was, how far it came, its scores and its settings.

    `absolute_return` is the absolute metric, NaN of unfinished runs; `best_return` and
    `last_return` are of its evaluations. Settings are columns by name, such as `ppo.lr`.

    Args:
        paths: folders of runs, or folders that contain them.
        by: settings whose values belong to the name of an algorithm.

    Raises:
        UserError: if there are no runs, or pandas is missing.
    """
    pandas = _pandas()
    rows = [_run_row(seed) for path in _found(paths) for seed in _read_seeds(path, by)]
    return pandas.DataFrame(rows)


def _run_row(seed: SeedRun) -> dict[str, Any]:
    run, returns = seed.run, seed.returns
    facts = {
        "run": str(run.path),
        "task": seed.task,
        "algorithm": seed.algorithm,
        "seed": seed.seed,
        "finished": run.finished,
        "step_count": run.step_count,
        "absolute_return": seed.absolute.get(RETURN, float("nan")),
        "best_return": float(returns.max()) if len(returns) else float("nan"),
        "last_return": float(returns[-1]) if len(returns) else float("nan"),
        "steps_per_second": run.steps_per_second,
        "seconds": run.seconds,
        "device": run.device,
        "commit": run.commit,
    }
    return facts | {name: v for name, v in flat(to_json(run.config)).items() if name not in facts}


def metrics(paths: Paths, kind: str | None = None) -> "DataFrame":
    """Return a row per run, seed and record, a column per metric: of episodes their mean.

    Args:
        paths: folders of runs, or folders that contain them.
        kind: train, evaluation or absolute alone; all of them if None.

    Raises:
        UserError: if there are no runs, or pandas is missing.
    """
    pandas, rows = _pandas(), []
    for path in _found(paths):
        if not _read_seeds(path):
            continue
        config, file = read_config(path / "config.json"), path / "metrics.jsonl"
        run = {"run": str(path), "task": config.env, "algorithm": algorithm_of(config)}
        for record in read_records(file) if file.exists() else []:
            if kind in (None, record.kind):
                rows += _metric_rows(run, record, config.seed)
    return pandas.DataFrame(rows)


def _metric_rows(run: dict[str, Any], record: Record, first_seed: int) -> list[dict[str, Any]]:
    head = {name: getattr(record, name) for name in ("kind", "update", "step_count", "elapsed")}
    means = {name: seed_means(value, name) for name, value in record.values.items()}
    count = min(map(len, means.values()), default=0)
    return [
        run
        | {"seed": first_seed + index}
        | head
        | {name: values[index] for name, values in means.items()}
        for index in range(count)
    ]


def load(paths: Paths, by: Sequence[str] = ()) -> Results:
    """Read runs as `mam report` does, for the functions below; reasons for doubt are warnings.

    Args:
        paths: folders of runs, or folders that contain them.
        by: settings whose values belong to the name of an algorithm.

    Raises:
        UserError: if there are no runs, or no such settings.
    """
    results, doubts = checks.load(_listed(paths), by)
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=2)
    return results


def figures(results: Results) -> "dict[str, Figure]":
    """Draw the report's figures, by name: aggregates, comparisons and learning curves."""
    made = (aggregate_figures, comparison_figures, task_figures)
    return {figure.name: drawn(figure) for make in made for figure in make(results)}


def tables(results: Results) -> "dict[str, DataFrame]":
    """Return the report's tables as they are shown, by title, with their intervals as text."""
    pandas = _pandas()
    return {
        table.title: pandas.DataFrame(
            [[cell.text for cell in row] for row in table.rows], columns=list(table.header)
        ).set_index(table.header[0])
        for table in shown_tables(results)
    }


def numbers(results: Results) -> "dict[str, DataFrame]":
    """Return every number behind the figures and tables, in full precision, by name."""
    pandas = _pandas()
    return {name: pandas.DataFrame(rows) for name, rows in numbers_behind(results).items()}


def _pandas() -> Any:
    with needs_extra("mam.report", "pandas", "notebook"):
        import pandas
    return pandas


def _listed(paths: Paths) -> list[Path]:
    return [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]


def _found(paths: Paths) -> list[Path]:
    return find_runs(_listed(paths))


def _read_seeds(path: Path, by: Sequence[str] = ()) -> list[SeedRun]:
    """Read a run; one that cannot be read is left out, with a warning."""
    try:
        return read_run(path, by)
    except UserError as error:
        warnings.warn(f"left out: {error}", stacklevel=3)
        return []
