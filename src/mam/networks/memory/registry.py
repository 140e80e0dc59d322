"""Memories by name: what `network.memory` may be."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Key

from mam.config import NetworkConfig
from mam.errors import unknown_name
from mam.networks.memory.base import AbstractRecurrence, NoMemory
from mam.networks.memory.gru import GRU


@dataclass(frozen=True)
class MemoryKind:
    """A line of the list, and how the recurrence is built: `build(config, key=key)`."""

    description: str
    build: Callable[..., AbstractRecurrence]


MEMORIES = {
    "none": MemoryKind("an environment step knows nothing of those before it", NoMemory),
    "gru": MemoryKind("a gated recurrent unit", GRU),
}


def make_memory(config: NetworkConfig, *, key: Key[Array, ""]) -> AbstractRecurrence:
    """Build the recurrence that `config.memory` names; `NoMemory` if it names none.

    Args:
        config: of the network.
        key: of the weights.

    Raises:
        UserError: if there is no memory of this name.
    """
    name = config.memory or "none"
    if name not in MEMORIES:
        raise unknown_name("network.memory", name, MEMORIES, see="mam list")
    return MEMORIES[name].build(config, key=key)
