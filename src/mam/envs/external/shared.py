"""What the pool and its workers share: an environment's sizes, and memory. Free of JAX.

And metrics that are made of infos, which not every episode has.
"""

import math
import mmap
import os
import tempfile
from dataclasses import dataclass

import numpy as np

INFO = "info_"  # in front of the names of metrics that are made of infos
Arrays = dict[str, np.ndarray]  # the fields of an `Observation`, by name
Field = tuple[tuple[int, ...], np.dtype]

_ALIGNMENT = 64  # bytes; a cache line


@dataclass(frozen=True)
class Layout:
    """Sizes of one environment's arrays: what a pool must know of it."""

    agents: tuple[str, ...]
    obs_dim: int
    num_actions: int  # choices of one agent, of all components, or real components of its action
    continuous: bool
    action_components: tuple[int, ...] | None = None
    time_limit: int | None = None
    grid_shape: tuple[int, int, int] | None = None
    grid_dtype: str = "float32"
    state_dim: int | None = None
    position_dim: int | None = None
    notes: tuple[str, ...] = ()  # what was padded, flattened or left out; one line each

    @property
    def num_agents(self) -> int:
        return len(self.agents)

    @property
    def action(self) -> Field:
        """Shape and type of one joint action."""
        if self.continuous:
            return (self.num_agents, self.num_actions), np.dtype(np.float32)
        components = () if self.action_components is None else (len(self.action_components),)
        return (self.num_agents, *components), np.dtype(np.int32)

    @property
    def observation(self) -> dict[str, Field]:
        """Shape and type of one observation's fields."""
        fields = {
            "agents_view": ((self.num_agents, self.obs_dim), np.dtype(np.float32)),
            "action_mask": ((self.num_agents, self.num_actions), np.dtype(bool)),
            "alive": ((self.num_agents,), np.dtype(bool)),
        }
        if self.grid_shape is not None:
            fields["grid"] = ((self.num_agents, *self.grid_shape), np.dtype(self.grid_dtype))
        if self.state_dim is not None:
            fields["state"] = ((self.state_dim,), np.dtype(np.float32))
        if self.position_dim is not None:
            fields["positions"] = ((self.num_agents, self.position_dim), np.dtype(np.float32))
        return fields


@dataclass(frozen=True)
class Slab:
    """Arrays [B, …] in memory that the pool and all workers see; workers write their own rows."""

    action: np.ndarray
    observation: Arrays  # to act on next
    # Of the ended episode; stale in rows where none has ended and no agent parted.
    final_observation: Arrays
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    # IDLE, STEPPING or RESETTING: what its worker does with an environment right now.
    doing: np.ndarray
    parted: np.ndarray  # an agent was truncated while others go on


IDLE, STEPPING, RESETTING = range(3)


class SharedMemory:
    """Memory without a name: however the processes end, nothing of it stays behind.

    Unlike `multiprocessing.shared_memory` it need not be unlinked and, on Linux, is not limited by
    the size of /dev/shm (64 MB in many containers).
    """

    def __init__(self):
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("mam")
        else:
            with tempfile.TemporaryFile() as file:
                self.fd = os.dup(file.fileno())

    def resize(self, size: int) -> None:
        """Make it `size` bytes of zeros long."""
        os.ftruncate(self.fd, size)

    def close(self) -> None:
        """Let go of the memory; what is mapped stays until its arrays are gone."""
        os.close(self.fd)


def slab_size(layout: Layout, num_envs: int) -> int:
    """Return how many bytes `map_slab` needs."""
    return sum(_aligned(shape, dtype) for shape, dtype in _fields(layout, num_envs).values())


def map_slab(fd: int, layout: Layout, num_envs: int) -> Slab:
    """Map the arrays in the memory of a file descriptor, at the same places in every process."""
    buffer = mmap.mmap(fd, slab_size(layout, num_envs))
    arrays, offset = {}, 0
    for name, (shape, dtype) in _fields(layout, num_envs).items():
        arrays[name] = np.ndarray(shape, dtype, buffer, offset)
        offset += _aligned(shape, dtype)
    return Slab(
        action=arrays["action"],
        observation={name: arrays[f"observation.{name}"] for name in layout.observation},
        final_observation={
            name: arrays[f"final_observation.{name}"] for name in layout.observation
        },
        reward=arrays["reward"],
        terminated=arrays["terminated"],
        truncated=arrays["truncated"],
        doing=arrays["doing"],
        parted=arrays["parted"],
    )


def _fields(layout: Layout, num_envs: int) -> dict[str, Field]:
    fields = {
        "action": layout.action,
        **{f"observation.{name}": field for name, field in layout.observation.items()},
        **{f"final_observation.{name}": field for name, field in layout.observation.items()},
        "reward": ((layout.num_agents,), np.dtype(np.float32)),
        "terminated": ((), np.dtype(bool)),
        "truncated": ((), np.dtype(bool)),
        "doing": ((), np.dtype(np.uint8)),
        "parted": ((), np.dtype(bool)),
    }
    return {name: ((num_envs, *shape), dtype) for name, (shape, dtype) in fields.items()}


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> int:
    size = math.prod(shape) * dtype.itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def mean_of_said(values: np.ndarray) -> np.ndarray:
    """Average each row, [rows, …], over its finite numbers; NaN where it has none."""
    values = values.reshape(len(values), -1)
    said = np.isfinite(values)
    total, count = np.where(said, values, 0).sum(axis=1), said.sum(axis=1)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
