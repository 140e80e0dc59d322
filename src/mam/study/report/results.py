"""Runs side by side: what every figure and table of the report shows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations

import numpy as np
from jaxtyping import Float, Shaped

from mam.runs.sinks import RETURN
from mam.statistics import AGGREGATES, Estimate, estimate, improvement, iqm, mean
from mam.study.report.collect import SeedRun

Axis = Callable[[SeedRun], np.ndarray]  # of a curve
THRESHOLDS = np.linspace(0, 1, 101)  # normalised scores at which the performance profile is taken


@dataclass(frozen=True)
class Curve:
    """An estimate against environment steps, or what else is told."""

    at: Shaped[np.ndarray, "points"]
    returns: Estimate  # [points]


@dataclass(frozen=True)
class Results:
    """The seeds of all runs, none of them twice.

    Scores are normalised per task: 0 and 1 are the worst and the best mean return that any seed of
    any algorithm had in an evaluation or as its absolute metric.
    """

    seeds: Sequence[SeedRun]
    cells: Mapping[tuple[str, str], list[SeedRun]] = field(init=False)  # by task and algorithm

    def __post_init__(self):
        cells: dict[tuple[str, str], list[SeedRun]] = {}
        for seed in sorted(self.seeds, key=lambda seed: (seed.task, seed.algorithm, seed.seed)):
            cells.setdefault((seed.task, seed.algorithm), []).append(seed)
        object.__setattr__(self, "cells", cells)

    @cached_property
    def tasks(self) -> list[str]:
        """All tasks, in alphabetical order."""
        return sorted({task for task, _ in self.cells})

    @cached_property
    def algorithms(self) -> list[str]:
        """All algorithms, in alphabetical order."""
        return sorted({algorithm for _, algorithm in self.cells})

    @cached_property
    def common_tasks(self) -> list[str]:
        """Tasks that every algorithm with a finished run has finished: those that are summed up."""
        names = self.compared
        return [
            task
            for task in self.tasks
            if names and all(len(self.absolute(task, name)) for name in names)
        ]

    @cached_property
    def compared(self) -> list[str]:
        """Algorithms with a finished run on some task."""
        return [
            name
            for name in self.algorithms
            if any(len(self.absolute(task, name)) for task in self.tasks)
        ]

    def absolute(
        self, task: str, algorithm: str, metric: str = RETURN
    ) -> Float[np.ndarray, "seeds"]:
        """Return the absolute metric, or another of its episodes, of each finished seed."""
        seeds = self.cells.get((task, algorithm), [])
        values = np.array([seed.absolute[metric] for seed in seeds if metric in seed.absolute])
        return values[np.isfinite(values)]

    def score(self, task: str, algorithm: str, metric: str = RETURN) -> Estimate | None:
        """Estimate the mean over seeds of the absolute metric; None if no seed has it."""
        values = self.absolute(task, algorithm, metric)
        return estimate(mean, [values]) if len(values) else None

    @cached_property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """The returns of each task that count as 0 and as 1."""
        found = {}
        for task in self.tasks:
            seeds = [seed for name in self.algorithms for seed in self.cells.get((task, name), [])]
            values = np.concatenate([[*seed.returns, *_return_of(seed)] for seed in seeds])
            values = values[np.isfinite(values)]
            found[task] = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
        return found

    def normalise(self, task: str, returns: np.ndarray) -> np.ndarray:
        """Turn returns on a task into scores; where all of them are equal, 1."""
        low, high = self.bounds[task]
        return (returns - low) / (high - low) if high > low else np.ones_like(returns)

    def scores(self, algorithm: str) -> list[Float[np.ndarray, "_"]]:
        """Return normalised absolute metrics, one array per common task."""
        return [self.normalise(task, self.absolute(task, algorithm)) for task in self.common_tasks]

    @cached_property
    def aggregates(self) -> dict[str, dict[str, Estimate]]:
        """Statistic → algorithm → estimate over all common tasks; empty if there are none."""
        if not self.common_tasks:
            return {}
        return {
            statistic: {name: estimate(function, self.scores(name)) for name in self.compared}
            for statistic, function in AGGREGATES.items()
        }

    @cached_property
    def profiles(self) -> dict[str, Estimate]:
        """Share of runs with a score above each of `THRESHOLDS`, tasks weighing the same."""
        if not self.common_tasks:
            return {}
        return {
            name: estimate(
                mean, [(scores > THRESHOLDS[:, None]).astype(float) for scores in self.scores(name)]
            )
            for name in self.compared
        }

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """Any two compared algorithms, the one with the higher IQM first."""
        if not self.common_tasks:
            return []
        return list(
            combinations(
                sorted(self.compared, key=lambda name: -self.aggregates["IQM"][name].value), 2
            )
        )

    @cached_property
    def improvements(self) -> dict[tuple[str, str], Estimate]:
        """Probability that a run of one algorithm beats one of another, in both directions."""
        there = {
            (x, y): estimate(improvement, self.scores(x) + self.scores(y)) for x, y in self.pairs
        }
        return there | {(y, x): value.complement() for (x, y), value in there.items()}

    @cached_property
    def curves(self) -> dict[tuple[str, str], Curve]:
        """Task and algorithm → mean evaluation return, where there is an evaluation."""
        return self._evaluated(_steps)

    @cached_property
    def clock_curves(self) -> dict[tuple[str, str], Curve]:
        """The same against minutes of wall-clock."""
        return self._evaluated(_minutes)

    def _evaluated(self, axis: Axis) -> dict[tuple[str, str], Curve]:
        evaluated = {
            cell: [seed for seed in seeds if len(seed.steps)] for cell, seeds in self.cells.items()
        }
        return {
            cell: _curve_of_any_lengths(seeds, axis) for cell, seeds in evaluated.items() if seeds
        }

    @cached_property
    def efficiency(self) -> dict[str, Curve]:
        """IQM of normalised evaluation returns against steps, as far as every seed has got."""
        cells = {
            name: [
                [seed for seed in self.cells[task, name] if seed.absolute and _is_whole(seed)]
                for task in self.common_tasks
            ]
            for name in self.compared
        }
        every_task = [task for tasks in cells.values() for task in tasks]
        if not every_task or not all(every_task):
            return {}
        everyone = [seed for task in every_task for seed in task]
        grid = _grid(everyone)
        grid = grid[
            (grid >= max(seed.steps[0] for seed in everyone))
            & (grid <= min(s.steps[-1] for s in everyone))
        ]
        if not len(grid):
            return {}
        return {
            name: Curve(
                grid,
                estimate(
                    iqm, [self.normalise(task[0].task, _sampled(task, grid)) for task in tasks]
                ),
            )
            for name, tasks in cells.items()
        }

    def runs_of(self, task: str, algorithm: str) -> Iterator[SeedRun]:
        """Yield one seed of each run."""
        yield from {seed.run.path: seed for seed in self.cells.get((task, algorithm), [])}.values()


def _is_whole(seed: SeedRun) -> bool:
    """Say whether every evaluation's return is a number."""
    return bool(np.isfinite(seed.returns).all())


def _return_of(seed: SeedRun) -> list[float]:
    return [seed.absolute[RETURN]] if seed.absolute else []


def _steps(seed: SeedRun) -> np.ndarray:
    return seed.steps


def _minutes(seed: SeedRun) -> np.ndarray:
    return seed.minutes


def _grid(seeds: Sequence[SeedRun], axis: Axis = _steps) -> Shaped[np.ndarray, "points"]:
    """Collect all steps, or times, at which some seed was evaluated."""
    return np.unique(np.concatenate([axis(seed) for seed in seeds]))


def _sampled(
    seeds: Sequence[SeedRun], grid: np.ndarray, axis: Axis = _steps
) -> Float[np.ndarray, "points seeds"]:
    """Interpolate each seed's returns to some steps or times; NaN outside its evaluations."""
    lines = [np.interp(grid, axis(seed), seed.returns, left=np.nan, right=np.nan) for seed in seeds]
    return np.stack(lines, axis=-1)


def _curve_of_any_lengths(seeds: Sequence[SeedRun], axis: Axis) -> Curve:
    """Estimate the mean at each step, or time, over the seeds that have got there."""
    grid = _grid(seeds, axis)
    values = _sampled(seeds, grid, axis)
    patterns, groups = np.unique(np.isfinite(values), axis=0, return_inverse=True)
    parts = np.full((3, len(grid)), np.nan)
    for index, there in enumerate(patterns):
        if there.any():
            rows = groups.ravel() == index
            part = estimate(mean, [values[rows][:, there]])
            parts[:, rows] = part.value, part.low, part.high
    reached = np.isfinite(parts[0])
    return Curve(grid[reached], Estimate(*parts[:, reached]))
