"""Curves for the screen: few points that keep the extremes, and the report's intervals there."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from mam.config import Config
from mam.statistics import MIN_SEEDS, NUM_RESAMPLES, interval, mean
from mam.study.dashboard.runs import LiveRun
from mam.study.report.collect import algorithm_of, unlike

POINTS = 1000  # that a curve has at most
SPEED = "steps per second"  # a metric that is derived, of all seeds together

Axis = Literal["steps", "time"]
Window = tuple[float, float]  # the part of the axis that is looked at

_FEW = 200  # points up to which as many resamples are drawn as for the report
_FEWER_RESAMPLES = 500


@dataclass(frozen=True)
class Series:
    """A metric of one run."""

    x: Float[np.ndarray, "rows"]  # environment steps per seed, or seconds
    values: Float[np.ndarray, "rows seeds"]

    def only(self, seeds: Sequence[int]) -> "Series":
        """Return it of some seeds, by their places; what is of the whole run stays."""
        several = self.values.shape[1] > 1
        return Series(self.x, self.values[:, seeds]) if several else self


@dataclass(frozen=True)
class Curve:
    """The mean over seeds and its band.

    The band is a 95 % interval from three seeds on, the range with two, nothing with one.
    """

    x: Float[np.ndarray, "points"]
    mean: Float[np.ndarray, "points"]
    low: Float[np.ndarray, "points"]  # NaN where there is no band
    high: Float[np.ndarray, "points"]
    num_seeds: int


def metrics_of(runs: Iterable[LiveRun]) -> list[str]:
    """List the metrics that can be drawn, as `kind/metric`: evaluations first."""
    names: dict[str, None] = {}
    runs = list(runs)
    for kind in ("evaluation", "train"):
        for run in runs:
            names |= dict.fromkeys(f"{kind}/{metric}" for metric in run.metrics.of(kind).metrics)
    return [*names, f"train/{SPEED}"]


def labels_of(runs: Iterable[LiveRun]) -> dict[str, str]:
    """Label each run by its algorithm and the settings in which runs of it on its task differ."""
    cells: dict[tuple[str, str], dict[str, Config]] = {}
    for run in runs:
        if run.config:
            cells.setdefault((run.config.env, run.config.algorithm), {})[run.name] = run.config
    return {
        name: algorithm_of(config, differing)
        for configs in cells.values()
        for differing in [unlike(configs.values())]
        for name, config in configs.items()
    }


def groups(
    runs: Iterable[LiveRun], labels: Mapping[str, str]
) -> dict[str, dict[str, list[LiveRun]]]:
    """Group runs by task and label; those without a configuration or a label are left out."""
    found: dict[str, dict[str, list[LiveRun]]] = {}
    for run in sorted(runs, key=lambda run: run.name):
        if run.config and run.name in labels:
            found.setdefault(run.config.env, {}).setdefault(labels[run.name], []).append(run)
    return {task: dict(sorted(of_task.items())) for task, of_task in sorted(found.items())}


def series_of(run: LiveRun, metric: str, axis: Axis) -> Series | None:
    """Read a metric, as `kind/metric`, of a run; None where it has none."""
    kind, _, name = metric.partition("/")
    rows = run.metrics.of(kind).rows([name])
    x = rows.steps.astype(np.float64) if axis == "steps" else rows.elapsed
    if name == SPEED:
        steps, seconds = np.diff(rows.steps), np.diff(rows.elapsed)
        timed = seconds > 0
        speeds = (steps[timed] / seconds[timed] * run.num_seeds)[:, None]
        return Series(x[1:][timed], speeds) if timed.any() else None
    if name not in rows.values or not len(x):
        return None
    return Series(x, rows.values[name].astype(np.float64))


def columns_that_count(runs: Iterable[LiveRun]) -> dict[str, list[int]]:
    """Say by run which of its seeds no other run has got further with: one counts once.

    Of those that are as far it is the last by name, as in the report.
    """
    owner: dict[int, tuple[str, int]] = {}
    for run in sorted(runs, key=lambda run: (run.metrics.step_count, run.name)):
        if run.config:
            owner |= {run.config.seed + i: (run.name, i) for i in range(run.num_seeds)}
    columns: dict[str, list[int]] = {}
    for name, column in owner.values():
        columns.setdefault(name, []).append(column)
    return columns


@np.errstate(over="ignore", invalid="ignore")  # of numbers near the largest there are
def curve_of(
    series: Sequence[Series], *, points: int = POINTS, window: Window | None = None
) -> Curve | None:
    """Average some runs, all their seeds weighing the same; at each x those that have got there.

    Runs with the same x are put side by side; others are interpolated between their rows.

    Args:
        series: one per run.
        points: most of them, of which the mean's ends, and its lowest and highest points along the
            way, are some.
        window: where half of the points are spent besides, if given.
    """
    x, values = _side_by_side([one for one in series if len(one.x)], points)
    there = np.isfinite(values)
    reached = there.any(axis=1)
    x, values, there = x[reached], values[reached], there[reached]
    if not len(x):
        return None
    middle = np.where(there, values, 0).sum(axis=1) / there.sum(axis=1)
    chosen = thin(middle, points if window is None else points // 2)
    if window is not None:
        begin, end = (
            np.searchsorted(x, window, side="left")[0],
            np.searchsorted(x, window, side="right")[1],
        )
        begin, end = max(begin - 1, 0), min(end + 1, len(x))  # lines go on to the edge
        chosen = np.union1d(chosen, begin + thin(middle[begin:end], points // 2))
    low, high = _band(values[chosen], there[chosen])
    return Curve(x[chosen], middle[chosen], low, high, values.shape[1])


def thin(values: Float[np.ndarray, "rows"], points: int) -> Int[np.ndarray, "_"]:
    """Choose the rows to draw: all, or the ends and the extremes of every bucket of as many rows.

    Returns:
        At most `points` indices, in order.
    """
    if len(values) <= points:
        return np.arange(len(values))
    buckets = max((points - 2) // 2, 1)
    size = -(-len(values) // buckets)
    padded = np.concatenate([values, np.full(-len(values) % size, values[-1])]).reshape(-1, size)
    begin = np.arange(len(padded)) * size
    extremes = np.concatenate([begin + padded.argmin(axis=1), begin + padded.argmax(axis=1)])
    return np.unique(np.concatenate([[0, len(values) - 1], np.minimum(extremes, len(values) - 1)]))


def _side_by_side(
    series: Sequence[Series], points: int
) -> tuple[np.ndarray, Float[np.ndarray, "rows seeds"]]:
    """Put all seeds on one grid, NaN where a seed has not got to.

    Where x differs, the grid is of the points worth drawing of each run.
    """
    if not series:
        return np.empty(0), np.empty((0, 0))
    first = series[0]
    if all(len(one.x) == len(first.x) and (one.x == first.x).all() for one in series):
        values = np.concatenate([one.values for one in series], axis=1)
        return first.x, values if np.isfinite(values).all() else _joined(first.x, first.x, values)
    grid = np.unique(np.concatenate([one.x[thin(_means(one.values), points)] for one in series]))
    return grid, np.concatenate([_joined(grid, one.x, one.values) for one in series], axis=1)


def _means(values: Float[np.ndarray, "rows seeds"]) -> Float[np.ndarray, "rows"]:
    """Average over the seeds that have a number, 0 where none has."""
    there = np.isfinite(values)
    return np.where(there, values, 0).sum(axis=1) / np.maximum(there.sum(axis=1), 1)


def _joined(
    grid: np.ndarray, x: np.ndarray, values: Float[np.ndarray, "rows seeds"]
) -> Float[np.ndarray, "grid seeds"]:
    """Interpolate each seed between its numbers; NaN outside them."""
    lines = np.full((len(grid), values.shape[1]), np.nan)
    for seed, of_seed in enumerate(values.T):
        if (there := np.isfinite(of_seed)).any():
            lines[:, seed] = np.interp(grid, x[there], of_seed[there], left=np.nan, right=np.nan)
    return lines


def _band(
    values: Float[np.ndarray, "points seeds"], there: Bool[np.ndarray, "points seeds"]
) -> Float[np.ndarray, "2 points"]:
    band = np.full((2, len(values)), np.nan)
    num_resamples = NUM_RESAMPLES if len(values) <= _FEW else _FEWER_RESAMPLES
    patterns, which = np.unique(there, axis=0, return_inverse=True)
    for index, seeds in enumerate(patterns):
        rows = which.ravel() == index
        some = values[rows][:, seeds]
        if seeds.sum() >= MIN_SEEDS:
            band[:, rows] = interval(mean, [some], num_resamples=num_resamples)
        elif seeds.sum() > 1:
            band[:, rows] = some.min(axis=1), some.max(axis=1)
    return band


class Curves:
    """A cache of curves, each kept for as long as the runs behind it stay as they are."""

    _MOST = 256

    def __init__(self):
        self._known: dict[tuple, tuple[tuple, Curve | None]] = {}

    def of(
        self, runs: Sequence[LiveRun], metric: str, axis: Axis, window: Window | None = None
    ) -> tuple[tuple, Curve | None]:
        """Return a curve of runs, and what it was made of, which is equal while nothing changed.

        Args:
            runs: whose seeds are averaged, each once.
            metric: as `kind/metric`.
            axis: what x is.
            window: where more points are wanted.
        """
        asked = (tuple(run.name for run in runs), metric, axis, window)
        made_of = tuple((run.name, run.version) for run in runs)
        known = self._known.pop(asked, None)
        if known is None or known[0] != made_of:
            columns = columns_that_count(runs)
            series = [
                one.only(columns[run.name])
                for run in runs
                if run.name in columns and (one := series_of(run, metric, axis))
            ]
            known = made_of, curve_of(series, window=window)
        self._known[asked] = known  # the newest last
        while len(self._known) > self._MOST:
            self._known.pop(next(iter(self._known)))
        return known
