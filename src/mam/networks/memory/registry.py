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
from mam.networks.memory.gru import GRU
from mam.networks.memory.last_action import LastAction
from mam.networks.memory.retention import RetentionMemory
from mam.networks.memory.state_space import StateSpaceMemory
from mam.networks.mixers.mamba import SelectiveSSM
from mam.networks.mixers.mamba2 import DualSSM

# Its weights' key is the memory's own, folded with this: small numbers make keys that splits make.
LAST_ACTION = 2**31 - 1


@dataclass(frozen=True)
class MemoryKind:
    """A line of the list, and how the recurrence is built: `build(config, key=key)`."""

    description: str
    build: Callable[..., AbstractRecurrence]


MEMORIES = {
    "none": MemoryKind("an environment step knows nothing of those before it", NoMemory),
    "gru": MemoryKind("a gated recurrent unit", GRU),
    "mamba": MemoryKind(
        "Mamba's state-space block along time", partial(StateSpaceMemory, SelectiveSSM)
    ),
    "mamba2": MemoryKind("Mamba-2's block along time", partial(StateSpaceMemory, DualSSM)),
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
    name = config.memory or "none"
    if name not in MEMORIES:
        raise unknown_name("network.memory", name, MEMORIES, see="mam list")
    recurrence = MEMORIES[name].build(config, key=key)
    if not config.recurrence.last_action:
        return recurrence
    return LastAction(
        recurrence, distribution, config.d_model, key=jax.random.fold_in(key, LAST_ACTION)
    )
