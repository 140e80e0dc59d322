"""Short tasks, one per family, with their functions compiled once for the whole session."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import jax
import pytest

from mam.envs import camar, jumanji, probes
from mam.envs.jaxmarl import mpe, overcooked, smax
from mam.envs.wrappers import AgentId, AutoReset, EpisodeStatistics
from mam.types import Environment

SHORT_LIMIT = 6  # environment steps; keeps episodes of the Jumanji tasks short


def make_short(make: Callable[[str], Environment], task: str) -> Environment:
    """Makes a task, all of it under the short limit (not only our count of its steps)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jumanji, "LBF_TIME_LIMIT", SHORT_LIMIT)
        patch.setattr(jumanji, "RWARE_TIME_LIMIT", SHORT_LIMIT)
        patch.setitem(jumanji.CONNECTOR_TASKS, "5x5x3a", SHORT_LIMIT)
        patch.setitem(jumanji.CLEANER_TASKS, "5x5x2a", SHORT_LIMIT)
        patch.setattr(overcooked, "OVERCOOKED_TIME_LIMIT", SHORT_LIMIT)
        return make(task)


RAW: dict[str, Callable[[], Environment]] = {
    "lbf": lambda: make_short(jumanji.make_lbf, "8x8-2p-2f-coop"),
    "rware": lambda: make_short(jumanji.make_rware, "tiny-2ag"),
    "connector": lambda: make_short(jumanji.make_connector, "5x5x3a"),
    "cleaner": lambda: make_short(jumanji.make_cleaner, "5x5x2a"),
    "lbf/auto": lambda: jumanji.make_lbf_auto(agents=2, grid=6, limit=SHORT_LIMIT),
    "smax": lambda: smax.make_smax_auto(agents=2, enemies=2, limit=SHORT_LIMIT),
    "mpe": lambda: mpe.make_mpe_auto(agents=2, limit=SHORT_LIMIT),
    "mpe-continuous": lambda: mpe.make_mpe_auto(agents=2, continuous=True, limit=SHORT_LIMIT),
    "overcooked": lambda: make_short(overcooked.make_overcooked, "cramped_room"),
}
if find_spec("camar"):
    RAW["camar"] = lambda: camar.make_camar_auto(agents=3, rows=4, columns=4, limit=SHORT_LIMIT)
# One size of each probe.
KINDS = {type(make()): name for name, make in reversed(probes.PROBES.items())}
RAW |= {name: probes.PROBES[name] for name in KINDS.values()}


@dataclass(frozen=True)
class Task:
    """An environment at every layer, with the functions tests call compiled."""

    raw: Environment
    env: Environment  # with agent ids and statistics
    reset: Callable
    step: Callable

    def batched(self, num_envs: int) -> AutoReset:
        return AutoReset(self.env, num_envs)


@functools.cache
def make_task(family: str) -> Task:
    raw = RAW[family]()
    env = EpisodeStatistics(AgentId(raw))
    return Task(raw, env, reset=jax.jit(env.reset), step=jax.jit(env.step))


@pytest.fixture(params=RAW)
def task(request) -> Task:
    return make_task(request.param)


@pytest.fixture
def lbf() -> Task:
    return make_task("lbf")


@pytest.fixture
def rware() -> Task:
    return make_task("rware")
