"""What a reader has to know before believing a comparison."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mam.config import Config, flat, to_json
from mam.errors import UserError, unknown_name
from mam.runs.sinks import RETURN
from mam.statistics import ENOUGH_SEEDS, MIN_SEEDS
from mam.study.report.collect import Run, SeedRun, find_runs, read_run, unlike
from mam.study.report.results import Results
from mam.study.report.tables import number

_SHOWN = 4  # items named in one warning


def load(paths: Iterable[Any], by: Sequence[str] = ()) -> tuple[Results, list[str]]:
    """Read all runs among and below some folders, and find every reason for doubt.

    Args:
        paths: the folders.
        by: dotted settings whose values belong to the name of an algorithm: runs of one in which
            they differ are told apart.

    Raises:
        UserError: if there are no runs, or no such settings.
    """
    known = flat(to_json(Config()))
    for key in by:
        if key not in known:
            raise unknown_name("setting", key, list(known), see="mam train --help")
    seeds, warnings = list[SeedRun](), list[str]()
    for path in find_runs(paths):
        try:
            seeds += read_run(path, by)
        except UserError as error:
            warnings.append(f"left out: {error}")
    if not seeds:
        raise UserError("; ".join(warnings))
    kept, duplicates = _without_duplicates(seeds)
    results = Results(kept)
    return results, warnings + duplicates + list(doubts(results))


def _without_duplicates(seeds: Sequence[SeedRun]) -> tuple[list[SeedRun], list[str]]:
    """Keep one run per task, algorithm and seed: the finished, the longest, the last by name."""
    ordered = sorted(
        seeds, key=lambda seed: (seed.run.finished, seed.run.step_count, str(seed.run.path))
    )
    kept = {(seed.task, seed.algorithm, seed.seed): seed for seed in ordered}
    dropped = [seed for seed in ordered if kept[seed.task, seed.algorithm, seed.seed] is not seed]
    again, other = [], []
    for seed in sorted(dropped, key=lambda seed: (seed.name, str(seed.run.path))):
        used = kept[seed.task, seed.algorithm, seed.seed].run
        line = f"{seed.name}: {used.path} instead of {seed.run.path}"
        if differing := unlike([seed.run.config, used.config]):
            other.append(f"{line} ({_apart(differing)})")
        else:
            again.append(line)
    warnings = [f"runs found more than once: {_listed(again)}"] if again else []
    if other:
        warnings.append(
            f"runs of other settings, left out for having equal seeds: {_listed(other)}"
        )
    return list(kept.values()), warnings


def doubts(results: Results) -> Iterator[str]:
    """Yield reasons to doubt a comparison, one line each."""
    runs = {seed.run.path: seed.run for seed in results.seeds}.values()
    yield from _unfinished(runs)
    yield from _seeds(results)
    yield from _missing(results)
    yield from _budgets(results)
    yield from _settings(results)
    yield from _modes(results)
    if alike := [task for task, (low, high) in results.bounds.items() if low == high]:
        yield f"every return is the same, so that every score counts as 1: {_listed(alike)}"
    absolute = [[seed.absolute[RETURN]] if seed.absolute else [] for seed in results.seeds]
    returns = zip(results.seeds, absolute, strict=True)
    broken = [seed.name for seed, last in returns if not np.isfinite([*seed.returns, *last]).all()]
    if broken:
        yield f"returns that are no numbers, left out: {_listed(broken)}"
    if len(devices := sorted({run.device for run in runs})) > 1:
        yield f"runs on different devices, whose speeds do not compare: {_listed(devices)}"


def _unfinished(runs: Iterable[Run]) -> Iterator[str]:
    unfinished = [
        f"{run.path} ({100 * run.step_count / run.budget:.0f} %)"
        for run in runs
        if not run.finished
    ]
    if unfinished:
        yield f"unfinished runs, in learning curves only: {_listed(unfinished)}"


def _seeds(results: Results) -> Iterator[str]:
    counts = {cell: len(results.absolute(*cell)) for cell in results.cells}
    counts = {cell: count for cell, count in counts.items() if count}
    few = [
        f"{name} on {task} ({count})"
        for (task, name), count in counts.items()
        if count < ENOUGH_SEEDS
    ]
    if few:
        none = (
            f"; below {MIN_SEEDS} there are no intervals"
            if min(counts.values()) < MIN_SEEDS
            else ""
        )
        yield (
            f"fewer than {ENOUGH_SEEDS} seeds "
            f"(10 are usual{none}; nothing of fewer is set in bold): {_listed(few)}"
        )
    if len(set(counts.values())) > 1:
        most = max(counts.values())
        fewer = [
            f"{name} on {task} ({count})" for (task, name), count in counts.items() if count < most
        ]
        yield f"ragged: not every algorithm has {most} seeds on every task: {_listed(fewer)}"


def _missing(results: Results) -> Iterator[str]:
    left_out = [task for task in results.tasks if task not in results.common_tasks]
    if not results.compared:
        yield "no run is finished: there is nothing to sum up yet"
    elif left_out:
        which = "no task was finished by every algorithm: nothing is summed up; see"
        some = (
            "left out of everything that sums up tasks, "
            "because not every algorithm has finished them:"
        )
        yield f"{some if results.common_tasks else which} {_listed(left_out)}"


def _budgets(results: Results) -> Iterator[str]:
    for task in results.tasks:
        runs = [
            (name, seed.run) for name in results.algorithms for seed in results.runs_of(task, name)
        ]
        if len({run.budget for _, run in runs}) > 1:
            budgets = sorted({f"{name} {run.budget:,} steps" for name, run in runs})
            yield f"unequal budgets on {task}: {_listed(budgets)}"
        if len({run.config.eval for _, run in runs}) > 1:
            evaluations = sorted({f"{name} {_evaluation(run.config)}" for name, run in runs})
            yield f"evaluated differently on {task}: {_listed(evaluations)}"


def _evaluation(config: Config) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(config.eval).items())


def _settings(results: Results) -> Iterator[str]:
    """Find algorithms whose runs on a task learn in different ways."""
    for task, name in results.cells:
        if differing := unlike(seed.run.config for seed in results.runs_of(task, name)):
            yield f"{name} on {task} is of several settings, taken as one ({_apart(differing)})"


def _modes(results: Results) -> Iterator[str]:
    """Find policies whose greedy actions have another value than sampled ones, beyond doubt."""
    for task, name in results.cells:
        counts = (
            "greedy"
            if any(seed.run.config.eval.greedy for seed in results.cells[task, name])
            else "sampled"
        )
        beside = "sampled" if counts == "greedy" else "greedy"
        one, other = results.score(task, name), results.score(task, name, f"{beside}_{RETURN}")
        if one and other and (one.above(other) or other.above(one)):
            values = f"{number(float(one.value))} {counts}, {number(float(other.value))} {beside}"
            better = counts if one.above(other) else beside
            yield f"{name} on {task} acts otherwise {beside}: {values}; use it {better}"


def _apart(differing: Sequence[str]) -> str:
    return f"--by {' '.join(differing)} tells them apart"


def _listed(items: Sequence[str]) -> str:
    """Name the first few, and how many more there are."""
    rest = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
