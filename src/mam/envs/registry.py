"""Tasks by name, "suite/task". A new suite is one row of `_SUITES`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mam.envs import jumanji, probes
from mam.envs.wrappers import AgentId, AutoReset, EpisodeStatistics
from mam.errors import unknown_name
from mam.types import Environment


@dataclass(frozen=True)
class _Suite:
    tasks: Iterable[str]
    make: Callable[[str], Environment]  # task (without the suite) -> environment; imports what it needs


_SUITES = {
    "lbf": _Suite(jumanji.LBF_TASKS, jumanji.make_lbf),
    "rware": _Suite(jumanji.RWARE_TASKS, jumanji.make_rware),
    "probe": _Suite(probes.PROBES, lambda task: probes.PROBES[task]()),
}


def suites() -> tuple[str, ...]:
    """Returns the names of all suites."""
    return tuple(_SUITES)


def task_names() -> tuple[str, ...]:
    """Returns the names of all tasks, "suite/task"; imports none of the suites."""
    return tuple(f"{name}/{task}" for name, suite in _SUITES.items() for task in suite.tasks)


def make(name: str) -> Environment:
    """Makes one environment whose agents see who they are; it neither resets itself nor keeps statistics.

    Args:
        name: "suite/task", one of `task_names()`.

    Raises:
        UserError: the name is unknown, or the suite is not installed.
    """
    if name not in task_names():
        raise unknown_name("task", name, task_names(), see="mam list")
    suite, task = name.split("/")
    return AgentId(_SUITES[suite].make(task))


def make_batched(name: str, num_envs: int) -> AutoReset:
    """Makes `num_envs` environments that reset themselves and report their episodes' statistics.

    Args:
        name: as for `make`.
        num_envs: size of the leading axis B.

    Raises:
        UserError: as `make`.
    """
    return AutoReset(EpisodeStatistics(make(name)), num_envs)
