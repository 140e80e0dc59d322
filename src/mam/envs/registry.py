"""Tasks by name. A new suite is one row of `_SUITES`.

suite/task                         a task of a suite
suite/auto:agents=64,grid=48       a task of that suite of one's own making
pettingzoo/module:environment      any PettingZoo ParallelEnv that is installed
package.module:factory             one's own environment: the factory returns it
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mam.envs import jumanji, probes
from mam.envs.wrappers import AgentId, AutoReset, EpisodeStatistics, IdEncoding
from mam.errors import UserError, unknown_name
from mam.types import Environment, HostEnvironments


@dataclass(frozen=True)
class _Suite:
    tasks: Iterable[str]
    make: Callable[[str], Environment]  # task (without the suite) -> environment; imports what it needs
    auto: Callable[..., Environment] | None = None  # keyword arguments, all with defaults -> environment


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


def auto_options() -> dict[str, Mapping[str, Any]]:
    """Returns, for every suite that makes tasks to measure, the options of `suite/auto:…` and their defaults."""
    return {f"{name}/auto": _options(suite.auto) for name, suite in _SUITES.items() if suite.auto}


def make(name: str, agent_id: IdEncoding = "one_hot") -> Environment:
    """Makes one environment whose agents see who they are; it neither resets itself nor keeps statistics.

    Args:
        name: one of `task_names()`, "suite/auto" with or without options, or "package.module:factory".
        agent_id: how agents see who they are; see `AgentId`.

    Raises:
        UserError: the name is unknown, or the suite is not installed.
    """
    return AgentId(_make_plain(name), agent_id)


def make_batched(name: str, num_envs: int, agent_id: IdEncoding = "one_hot") -> AutoReset:
    """Makes `num_envs` environments that reset themselves and report their episodes' statistics.

    Args:
        name: as for `make`.
        num_envs: size of the leading axis B.
        agent_id: as for `make`.

    Raises:
        UserError: as `make`.
    """
    return AutoReset(EpisodeStatistics(make(name, agent_id)), num_envs)


def lives_on_host(name: str) -> bool:
    """Whether the environment is stepped in worker processes (`make_host`) instead of by JAX (`make_batched`)."""
    return False


def make_host(
    name: str, num_envs: int, agent_id: IdEncoding = "one_hot", num_workers: int | None = None
) -> HostEnvironments:
    """Makes environments that live in worker processes; none is started before the first reset."""
    raise NotImplementedError


def _make_plain(name: str) -> Environment:
    if name in task_names():
        suite, task = name.split("/")
        return _SUITES[suite].make(task)
    suite, _, rest = name.partition("/")
    task, _, options = rest.partition(":")
    if task == "auto" and suite in _SUITES and (auto := _SUITES[suite].auto):
        return auto(**_parse_options(name, options, _options(auto)))
    raise unknown_name("task", name, (*task_names(), *auto_options()), see="mam list")


def _options(auto: Callable[..., Environment]) -> Mapping[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(auto).parameters.items()}


def _parse_options(name: str, text: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Reads `agents=64,grid=48`; every value has the type of its default."""
    values = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in defaults:
            raise (
                unknown_name("option", key, defaults, see="mam list") if defaults else UserError(f"{name}: no options")
            )
        kind = type(defaults[key])
        try:
            values[key] = {"true": True, "false": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError):
            expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
            raise UserError(f"{name}: {key} must be {expected}, got '{value}'") from None
    return values
