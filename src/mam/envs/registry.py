"""Tasks by name; what stands for them is looked up in `mam.envs.tasks`.

suite/task                         a task of a suite
suite/auto:agents=64,grid=48       a custom-size task of that suite
pettingzoo/module:environment      any PettingZoo ParallelEnv that is installed
package.module:factory             one's own environment: the factory returns it
object:Name                        one that was given as an object, see `objects`
"""

import contextlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

from mam.config import WorkerConfig
from mam.envs.external.factories import PREFIX, EnvFactory, find_factory, names_code
from mam.envs.objects import OBJECT, find_object
from mam.envs.tasks import SUITES, check_task
from mam.envs.wrappers import AgentId, AutoReset, EpisodeStatistics, IdEncoding
from mam.errors import UserError, missing_extra, unknown_name
from mam.types import Environment, EnvSpec, ExternalEnvironments


def auto_options() -> dict[str, Mapping[str, Any]]:
    """Return the options of `suite/auto:…` and their defaults, by suite with custom-size tasks."""
    return {
        f"{name}/{task}": _options(_maker(name, f"_{task}"))
        for name, suite in SUITES.items()
        for task in suite.made_to_measure
    }


def make(name: str, agent_id: IdEncoding = "one_hot") -> Environment:
    """Make one environment with agent ids, which neither resets itself nor keeps statistics.

    Args:
        name: one of `task_names()`, "suite/auto" with or without options, or
            "package.module:factory".
        agent_id: how agents are told apart; see `agent_ids`.

    Raises:
        UserError: the name is unknown, or the suite is not installed.
    """
    env = make_plain(name)
    if not isinstance(env, Environment):
        raise _no_environment(name, env)
    return AgentId(env, agent_id)


def make_batched(name: str, num_envs: int, agent_id: IdEncoding = "one_hot") -> AutoReset:
    """Make `num_envs` environments that reset themselves and report their episodes' statistics.

    Args:
        name: as for `make`.
        num_envs: size of the leading axis B.
        agent_id: as for `make`.

    Raises:
        UserError: as `make`.
    """
    return AutoReset(EpisodeStatistics(make(name, agent_id)), num_envs)


def is_external(name: str) -> bool:
    """Say whether it is an external environment (`make_external`), not one in JAX (`make_batched`).

    Raises:
        UserError: the name is that of one's own environment, and there is none.
    """
    return names_code(name) and isinstance(_own(name), EnvFactory)


def make_external(
    name: str,
    num_envs: int,
    agent_id: IdEncoding = "one_hot",
    num_workers: int | None = None,
    limits: WorkerConfig = WorkerConfig(),  # noqa: B008 (frozen)
    first: int = 0,
) -> ExternalEnvironments:
    """Start worker processes and make environments in them.

    Args:
        name: "pettingzoo/module:environment" or "package.module:factory".
        num_envs: environments in all, B.
        agent_id: as for `make`.
        num_workers: processes; one per CPU core if None.
        limits: how long an environment may take, and how often a worker is started again.
        first: index of the first of them, for factories with a parameter `index`; others may exist
            beside these.

    Raises:
        UserError: there is no such environment, or one of its spaces is not supported.
    """
    from mam.envs.external.pool import ExternalPool

    return ExternalPool(
        name, replace(find_factory(name), first=first), num_envs, num_workers, agent_id, limits
    )


def make_env(
    name: str, num_envs: int | None = None, *, agent_id: IdEncoding = "one_hot"
) -> Environment | AutoReset | ExternalEnvironments:
    """Make an environment with agent ids.

    Args:
        name: as for `make` or `make_external`.
        num_envs: environments side by side that reset themselves; if None a single one that does
            not or, of those that JAX does not step, a batch of one.
        agent_id: how agents are told apart; see `agent_ids`.

    Returns:
        An environment in JAX, whose `reset` and `step` are pure functions; of any other, worker
        processes, which `close` ends.

    Raises:
        UserError: the name is unknown, or the suite is not installed.
    """
    if is_external(name):
        return make_external(name, num_envs or 1, agent_id)
    return make(name, agent_id) if num_envs is None else make_batched(name, num_envs, agent_id)


_FOREIGN = {
    "gym": " of gym, which has one agent",
    "gymnasium": " of Gymnasium, which has one agent",
    "jumanji": " of Jumanji (see `mam list` for the tasks that are adapted)",
    "jaxmarl": " of JaxMARL (see `mam list` for the tasks that are adapted)",
}


@cache
def _own(name: str) -> Environment | EnvFactory:
    """Return the environment that a name with a colon stands for, or what makes it in workers."""
    factory = find_factory(name)
    if name.startswith(PREFIX):
        return factory
    env = factory(index=0)
    # PettingZoo's have these, and belong in workers: this one was to look at.
    if hasattr(env, "possible_agents"):
        with contextlib.suppress(Exception):
            env.close()
        return factory
    if _foreign(env) and not isinstance(getattr(env, "spec", None), EnvSpec):
        raise _no_environment(name, env)
    return env


def _foreign(env: Any) -> str:
    """Say which other library's environment it is; nothing if of none."""
    packages = (kind.__module__.partition(".")[0] for kind in type(env).__mro__)
    return next((_FOREIGN[package] for package in packages if package in _FOREIGN), "")


def _no_environment(name: str, env: Any) -> UserError:
    kind = type(getattr(env, "unwrapped", env)).__name__
    return UserError(
        f"{name} returns a {kind}{_foreign(env)}: expected a subclass of mam.types.Environment "
        f"with spec, reset and step, or a PettingZoo ParallelEnv"
    )


def make_plain(name: str) -> Environment:
    """Make one environment without agent ids; what one's own factory returns is not checked.

    Raises:
        UserError: as `make`.
    """
    check_task(name)
    if name.startswith(OBJECT):
        return find_object(name)
    if names_code(name):
        env = _own(name)
        if isinstance(env, EnvFactory):
            raise UserError(f"{name} is an external environment: it has no JAX program")
        return env
    prefix, _, rest = name.partition("/")
    task, _, options = rest.partition(":")
    suite = SUITES[prefix]
    try:
        if task in suite.made_to_measure:
            auto = _maker(prefix, f"_{task}")
            return auto(**_parse_options(name, options, auto))
        return _maker(prefix)(task)
    except ImportError as error:
        if suite.extra is None:
            raise
        raise missing_extra("this task", " and ".join(suite.packages), suite.extra) from error


def _maker(suite: str, kind: str = "") -> Callable[..., Environment]:
    """Return the function that makes a suite's tasks, or its custom-size ones."""
    return getattr(import_module(SUITES[suite].module), f"make_{suite}{kind}")


def _options(auto: Callable[..., Environment]) -> Mapping[str, Any]:
    return {
        name: parameter.default for name, parameter in inspect.signature(auto).parameters.items()
    }


def _parse_options(name: str, text: str, auto: Callable[..., Environment]) -> dict[str, Any]:
    """Read `agents=64,grid=48`; every value has the type of its default, or is a range of it."""
    values, defaults = {}, _options(auto)
    ranged = [
        name
        for name, parameter in inspect.signature(auto).parameters.items()
        if parameter.annotation == int | tuple[int, int]
    ]
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in defaults:
            raise (
                unknown_name("option", key, defaults, see="mam list")
                if defaults
                else UserError(f"{name}: no options")
            )
        kind = type(defaults[key])
        if key in ranged and (ends := re.fullmatch(r"(\d+)-(\d+)", value)):
            values[key] = (int(ends[1]), int(ends[2]))
            continue
        try:
            values[key] = {"true": True, "false": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError):
            expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
            raise UserError(f"{name}: {key} must be {expected}, got '{value}'") from None
    return values
