"""Gymnasium's spaces as rows of numbers: observations flattened, actions read from an index or from [-1, 1].

Free of JAX: worker processes import it.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from mam.errors import UserError

OBSERVATIONS = "Box, Discrete, MultiBinary, MultiDiscrete, Dict and Tuple"
ACTIONS = "Discrete for all agents, or for all of them Box of floats with one axis"
_UNBOUNDED = 1e30  # limits beyond this, such as the largest float, are not meant to be reached


def flat_size(space: spaces.Space) -> int:
    """How many numbers `flatten` makes of a value of the space.

    Raises:
        TypeError: the space is of a kind that cannot be flattened.
    """
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        return math.prod(space.shape)
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    return sum(flat_size(part) for _, part in _parts(space))


def flatten(space: spaces.Space, value: Any, row: np.ndarray) -> None:
    """Writes a value into `row`, which is zero and of `flat_size(space)`; choices become one-hot.

    Raises:
        ValueError, LookupError: the value is not of its space.
    """
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        flat = np.asarray(value)
        if flat.size != row.size:
            raise ValueError(f"shape {flat.shape} instead of {space.shape}")
        row[:] = flat.reshape(-1)
    elif isinstance(space, spaces.Discrete):
        choice = int(value) - int(space.start)
        if not 0 <= choice < row.size:
            raise ValueError(f"{value} is none of its values")
        row[choice] = 1.0
    elif isinstance(space, spaces.MultiDiscrete):
        choices = (np.asarray(value) - space.start).reshape(-1)
        first = np.cumsum(space.nvec.reshape(-1)) - space.nvec.reshape(-1)
        row[first + choices] = 1.0
    else:
        start = 0
        for key, part in _parts(space):
            stop = start + flat_size(part)
            flatten(part, value[key], row[start:stop])
            start = stop


def _parts(space: spaces.Space) -> list[tuple[Any, spaces.Space]]:
    """Parts and their keys, always in the same order."""
    if isinstance(space, spaces.Dict):
        return list(space.spaces.items())
    if isinstance(space, spaces.Tuple):
        return list(enumerate(space.spaces))
    raise TypeError(str(space))


@dataclass(frozen=True)
class View:
    """How one agent's observation is read."""

    space: spaces.Space  # of the observation proper
    inside: bool  # the observation proper is the entry "observation" of a dictionary
    masked: bool  # the dictionary's entry "action_mask" says which actions are legal

    @classmethod
    def of(cls, space: spaces.Space, action_space: spaces.Space) -> "View":
        """Takes the action mask and the observation proper apart where the space is a dictionary of both."""
        if not isinstance(space, spaces.Dict):
            return cls(space, inside=False, masked=False)
        masked = "action_mask" in space.spaces and isinstance(action_space, spaces.Discrete)
        rest = {key: part for key, part in space.spaces.items() if not (masked and key == "action_mask")}
        if set(rest) == {"observation"}:
            return cls(rest["observation"], inside=True, masked=masked)
        return cls(spaces.Dict(rest), inside=False, masked=masked)

    @property
    def size(self) -> int:
        return flat_size(self.space)

    def read(self, value: Any) -> Any:
        """The observation proper."""
        return value["observation"] if self.inside else value


def is_picture(space: spaces.Space) -> bool:
    """Whether a value has rows, columns and channels."""
    return isinstance(space, spaces.Box) and len(space.shape) == 3


def picture_of(views: list[View]) -> spaces.Box | None:
    """The space of the picture that every agent sees, if all see one and of the same size; None otherwise."""
    first = views[0].space
    alike = all(view.space.shape == first.shape and view.space.dtype == first.dtype for view in views)
    return first if isinstance(first, spaces.Box) and is_picture(first) and alike else None


def view_size(name: str, agent: object, view: View) -> int:
    """How many numbers an agent observes.

    Raises:
        UserError: its observations cannot be flattened.
    """
    try:
        return view.size
    except TypeError as error:
        raise UserError(f"{name}: agent '{agent}' observes {error}; supported: {OBSERVATIONS}") from None


@dataclass(frozen=True)
class DiscreteAction:
    """An index, counted from the space's first value."""

    space: spaces.Discrete

    @property
    def size(self) -> int:
        return int(self.space.n)

    def read(self, action: np.integer) -> int:
        return int(action) + int(self.space.start)


@dataclass(frozen=True)
class BoxAction:
    """Components in [-1, 1], stretched to the space's limits; where it has none, as they are."""

    space: spaces.Box
    centre: np.ndarray
    half: np.ndarray

    @classmethod
    def of(cls, space: spaces.Box) -> "BoxAction":
        bounded = (np.abs(space.low) < _UNBOUNDED) & (np.abs(space.high) < _UNBOUNDED)
        low = np.where(bounded, space.low, -1.0).astype(np.float64)
        high = np.where(bounded, space.high, 1.0).astype(np.float64)
        return cls(space, centre=(low + high) / 2, half=(high - low) / 2)

    @property
    def size(self) -> int:
        return self.space.shape[0]

    def read(self, action: np.ndarray) -> np.ndarray:
        value = self.centre + self.half * action[: self.size]
        # Rounding must not carry an action over the edge: some environments check.
        return np.clip(value.astype(self.space.dtype), self.space.low, self.space.high)


def action_readers(name: str, action_spaces: dict[str, spaces.Space]) -> list[DiscreteAction] | list[BoxAction]:
    """How the agents' actions are read, in their order.

    Raises:
        UserError: a space is of a kind that is not supported, or the agents' spaces are of different kinds.
    """
    for agent, space in action_spaces.items():
        floats = isinstance(space, spaces.Box) and len(space.shape) == 1 and np.issubdtype(space.dtype, np.floating)
        if not floats and not isinstance(space, spaces.Discrete):
            raise UserError(f"{name}: agent '{agent}' acts in {space}; supported: {ACTIONS}")
    discrete = [DiscreteAction(space) for space in action_spaces.values() if isinstance(space, spaces.Discrete)]
    boxes = [BoxAction.of(space) for space in action_spaces.values() if isinstance(space, spaces.Box)]
    if discrete and boxes:
        kinds = {type(space): f"agent '{agent}' acts in {space}" for agent, space in action_spaces.items()}
        raise UserError(f"{name}: {' and '.join(kinds.values())}; supported: {ACTIONS}")
    return discrete or boxes
