"""Statistics over tasks and seeds, with stratified bootstrap intervals.

Source: Agarwal et al. 2021 (arXiv 2108.13264). By `scipy.stats`, which JAX brings along:
`bootstrap` of several samples resamples each of them by itself, which is the stratified bootstrap
if a sample is a task, and `trim_mean` is the interquartile mean. `rliable` gives the same numbers
(the tests hold some of them), but its last release, 1.2.0, holds arch below 8 and so pandas below 3
for everything beside it, and takes no task with more seeds than another.

Every statistic here takes one array per task, [*rest, seeds], and reduces tasks and seeds to
[*rest].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

MIN_SEEDS = 3  # below this many seeds an interval over them says nothing
ENOUGH_SEEDS = 5  # below this many an interval is too narrow to decide anything
CONFIDENCE = 0.95
NUM_RESAMPLES = 5000

# Numbers resampled at once: decides memory, and with it the order in which indices are drawn.
_BATCH = 2_000_000

Scores = Sequence[Float[np.ndarray, "*rest _"]]  # one per task
Statistic = Callable[..., Float[np.ndarray, "*rest"]]


def iqm(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the interquartile mean: that of the middle half of all runs of all tasks."""
    from scipy.stats import trim_mean

    return np.asarray(trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis))


def mean(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the mean over tasks of their means over seeds."""
    return np.asarray(np.mean([task.mean(axis) for task in tasks], axis=0))


def median(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the median over tasks of their means over seeds."""
    return np.asarray(np.median([task.mean(axis) for task in tasks], axis=0))


def optimality_gap(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return how far below 1, the best normalised score, runs are; scores above 1 count as 1."""
    return np.asarray(np.mean([1 - np.minimum(task, 1).mean(axis) for task in tasks], axis=0))


def improvement(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the probability that a run of X beats one of Y on the same task; a tie counts half.

    It is averaged over tasks: per task the Mann–Whitney statistic divided by the number of pairs.
    SciPy's own comes with a p-value, which cannot be had where all runs tie and takes most of the
    time in a bootstrap.

    Args:
        tasks: X's tasks, then Y's in the same order.
        axis: the seeds.
    """
    x, y = tasks[: len(tasks) // 2], tasks[len(tasks) // 2 :]
    signs = [
        np.sign(np.expand_dims(a, -1) - np.expand_dims(b, -2)) for a, b in zip(x, y, strict=True)
    ]
    return np.asarray(np.mean([0.5 + 0.5 * sign.mean((-1, -2)) for sign in signs], axis=0))


AGGREGATES: dict[str, Statistic] = {
    "IQM": iqm,
    "median": median,
    "mean": mean,
    "optimality gap": optimality_gap,
}


@dataclass(frozen=True)
class Estimate:
    """Numbers with their interval, whose ends are NaN where there are too few seeds."""

    value: Float[np.ndarray, "*rest"]
    low: Float[np.ndarray, "*rest"]
    high: Float[np.ndarray, "*rest"]
    seeds: int = 0  # of each algorithm on each task, at least

    def complement(self) -> "Estimate":
        """Return the probability of the opposite, if this is one."""
        value, low, high = (np.asarray(1 - x) for x in (self.value, self.high, self.low))
        return Estimate(value, low, high, self.seeds)

    def above(self, other: "Estimate") -> bool:
        """Say whether this interval lies wholly above the other, and neither has too few seeds."""
        return min(self.seeds, other.seeds) >= ENOUGH_SEEDS and bool(np.all(self.low > other.high))


def estimate(
    statistic: Statistic, tasks: Scores, *, rng: np.random.Generator | None = None
) -> Estimate:
    """Compute a statistic and its 95 % percentile interval, the same at every call.

    Args:
        statistic: of one array per task.
        tasks: [*rest, seeds] each; `rest` shares the resamples, so that curves are smooth.
        rng: draws the resamples.
    """
    value, sizes = np.asarray(statistic(*tasks), np.float64), [task.shape[-1] for task in tasks]
    low = high = np.full_like(value, np.nan)
    if min(sizes) >= MIN_SEEDS:
        low, high = map(np.asarray, interval(statistic, tasks, rng=rng))
    return Estimate(value, low, high, seeds=min(sizes))


def interval(
    statistic: Statistic,
    tasks: Scores,
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    rng: np.random.Generator | None = None,
) -> Float[np.ndarray, "2 *rest"]:
    """Compute both ends of the stratified percentile bootstrap interval of a statistic.

    Args:
        statistic: of one array per task.
        tasks: [*rest, seeds] each, with two seeds or more.
        confidence: probability mass between the two ends.
        num_resamples: how often the seeds of every task are drawn, with replacement.
        rng: draws them; one that begins anew at every call if None.
    """
    from scipy.stats import bootstrap

    options: dict[str, Any] = {
        "paired": False,
        "vectorized": True,
        "method": "percentile",
        "axis": -1,
    }
    found = bootstrap(
        tuple(tasks),
        statistic,
        confidence_level=confidence,
        n_resamples=num_resamples,
        batch=max(1, _BATCH // sum(task.size for task in tasks)),
        rng=np.random.default_rng(0) if rng is None else rng,
        **options,
    ).confidence_interval
    return np.stack([found.low, found.high])
