"""Memories by name: what `network.memory` may be."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
from jaxtyping import Array, Key

from mam.config import NetworkConfig
from mam.errors import unknown_name
from mam.networks.actions import ActionDistribution
from mam.networks.memory.base import AbstractRecurrence, NoMemory
from mam.networks.memory.clock import Clock
from mam.networks.memory.gru import GRU
from mam.networks.memory.last_action import LastAction
from mam.networks.memory.retention import RetentionMemory
from mam.networks.memory.state_space import StateSpaceMemory
from mam.networks.mixers.mamba import SelectiveSSM
from mam.networks.mixers.mamba2 import DualSSM

# Keys of weights are the memory's own, folded with these: small numbers make keys that splits make.
LAST_ACTION, CLOCK = 2**31 - 1, 2**31 - 2


@dataclass(frozen=True)
class MemoryKind:
    """A line of the list, and how the recurrence is built: `build(config, key=key)`."""

    description: str
    build: Callable[..., AbstractRecurrence]
    clock: bool = False  # whether steps are counted beside it, if `recurrence.clock` is auto


MEMORIES = {
    "none": MemoryKind("an environment step knows nothing of those before it", NoMemory),
    "gru": MemoryKind("a gated recurrent unit", GRU),
    "mamba": MemoryKind(
        "Mamba's state-space block along time, and a clock",
        partial(StateSpaceMemory, SelectiveSSM),
        clock=True,
    ),
    "mamba2": MemoryKind(
        "Mamba-2's block along time, and a clock", partial(StateSpaceMemory, DualSSM), clock=True
    ),
    "retention": MemoryKind("retention along time", RetentionMemory),
}


def make_memory(
    config: NetworkConfig, distribution: ActionDistribution, *, key: Key[Array, ""]
) -> AbstractRecurrence:
    """Build the recurrence that `config.memory` names; `NoMemory` if it names none.

    Args:
        config: of the network.
        distribution: of an agent's actions, where the last one is read as well.
        key: of the weights.

    Raises:
        UserError: if there is no memory of this name.
    """
    recurrence = _kind_of(config).build(config, key=key)
    d_model, own = config.d_model, config.recurrence
    if own.last_action:
        action_key = jax.random.fold_in(key, LAST_ACTION)
        recurrence = LastAction(recurrence, distribution, d_model, key=action_key)
    if has_clock(config):
        recurrence = Clock(recurrence, d_model, key=jax.random.fold_in(key, CLOCK))
    return recurrence


def has_clock(config: NetworkConfig) -> bool:
    """Say whether steps are counted beside the memory that `config.memory` names.

    Raises:
        UserError: if there is no memory of this name.
    """
    setting = config.recurrence.clock
    return _kind_of(config).clock if setting == "auto" else setting == "on"


def _kind_of(config: NetworkConfig) -> MemoryKind:
    name = config.memory or "none"
    if name not in MEMORIES:
        raise unknown_name("network.memory", name, MEMORIES, see="mam list")
    return MEMORIES[name]
