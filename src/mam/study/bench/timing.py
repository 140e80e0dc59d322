"""Timing several programs side by side. Pure Python: the clock and the programs are handed in."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Run = Callable[[], object]  # runs a program once and waits for its result
Clock = Callable[[], float]  # seconds

SHORTEST_SAMPLE = 1e-3  # seconds; a shorter one measures the clock and the operating system
LONGEST_REPEATED = 10.0  # seconds
# Seconds of measuring for all programs together, unless the number of rounds is given.
ROUNDS_TIME = 3.0
FEWEST_ROUNDS, MOST_ROUNDS = 5, 30


@dataclass(frozen=True)
class Timing:
    """The times that one program took, in seconds per call."""

    samples: tuple[float, ...]  # one per round

    @property
    def median(self) -> float:
        """The median of the rounds, in seconds per call."""
        return median(self.samples)

    @property
    def minimum(self) -> float:
        """The shortest round, in which the machine had the least else to do."""
        return min(self.samples)

    @property
    def p99(self) -> float:
        """What 99 of a hundred samples do not exceed."""
        return sorted(self.samples)[math.ceil(0.99 * len(self.samples)) - 1]


def warm_up(run: Run, clock: Clock = time.perf_counter) -> float:
    """Estimate the seconds one call takes by the second one: the first touches fresh memory.

    A first call that is too long to be repeated for that counts itself.
    """
    first = _sample(run, 1, clock)
    return first if first > LONGEST_REPEATED else min(first, _sample(run, 1, clock))


def rounds_for(estimates: Sequence[float]) -> int:
    """Return how many rounds fit into a few seconds, given the seconds a call of each takes."""
    seconds = sum(max(estimate, SHORTEST_SAMPLE) for estimate in estimates)
    return min(max(int(ROUNDS_TIME / seconds), FEWEST_ROUNDS), MOST_ROUNDS) if seconds else 0


def single_calls(
    runs: Mapping[str, Run], rounds: int, clock: Clock = time.perf_counter
) -> dict[str, Timing]:
    """Time every call of programs by itself, in turn: what somebody waits who asks once.

    Args:
        runs: the programs.
        rounds: calls of each.
        clock: tells the seconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(_sample(run, 1, clock))
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def interleave(
    runs: Mapping[str, Run],
    estimates: Mapping[str, float],
    rounds: int,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time programs in turn, so that whatever slows the machine for a while slows all of them.

    Every other round goes backwards: no program always runs in the wake of the same one.

    Args:
        runs: the programs, warmed up.
        estimates: seconds one call of each takes; short programs are called several times per
            sample.
        rounds: samples per program.
        clock: returns seconds.
    """
    calls = {name: math.ceil(SHORTEST_SAMPLE / max(estimates[name], 1e-9)) for name in runs}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            samples[name].append(_sample(runs[name], calls[name], clock))
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def _sample(run: Run, calls: int, clock: Clock) -> float:
    """Measure the seconds per call, over so many calls."""
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / calls


def power_law(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Fit the exponent p of seconds ∝ size^p: the least-squares slope between their logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def predict(history: Sequence[tuple[int, float]], size: int) -> float | None:
    """Predict the seconds at a larger size from the last two measured; one alone is repeated.

    Args:
        history: sizes and seconds, smallest first.
        size: larger than all of them.

    Returns:
        None without history.
    """
    if not history:
        return None
    last_size, last = history[-1]
    if len(history) == 1:
        return last
    exponent = max(power_law(*zip(*history[-2:], strict=True)), 0.0)
    return last * (size / last_size) ** exponent
