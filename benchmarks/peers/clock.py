"""How a contender reports: lines of JSON that `compare.py` reads, in any peer's environment."""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

MARK = "measured: "  # what precedes a report, among whatever a peer prints
FEWEST = 3
Reading = tuple[float, float]  # seconds by the clock, and of all cores together


def now() -> Reading:
    """Return what the clocks say."""
    return time.perf_counter(), time.process_time()


def tell(**record: Any) -> None:
    """Print a line for the other end."""
    print(MARK + json.dumps(record), flush=True)


def sample(step: Callable[[], Any], seconds: float) -> list[Reading]:
    """Call again and again for a while, and return what the clocks say between calls.

    The first call is not among them: it compiles, or touches fresh memory, and is told of.
    """
    step()
    tell(first=True)
    readings = [now()]
    while len(readings) <= FEWEST or readings[-1][0] < readings[0][0] + seconds:
        step()
        readings.append(now())
    return readings


def report(
    readings: Sequence[Reading], env_steps: int, parameters: int, packages: Sequence[str]
) -> None:
    """Tell of the medians.

    Args:
        readings: before the first call and after every one.
        env_steps: environment steps in a call.
        parameters: numbers that are learned.
        packages: whose versions matter.
    """
    seconds, cpu_seconds = (
        statistics.median(after - before for before, after in itertools.pairwise(clock))
        for clock in zip(*readings, strict=True)
    )
    tell(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        calls=len(readings) - 1,
        env_steps=env_steps,
        parameters=parameters,
        versions={name: version(name) for name in packages},
    )
