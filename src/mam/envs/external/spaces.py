"""Gymnasium's spaces as rows: observations flattened, actions read from an index or [-1, 1].

Free of JAX: worker processes import it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any

import numpy as np
from gymnasium import spaces

from mam.errors import UserError

OBSERVATIONS = "Box, Discrete, MultiBinary, MultiDiscrete, Dict and Tuple"
ACTIONS = "Discrete or MultiDiscrete for all agents, or for all of them Box of floats with one axis"
CHOICES = (spaces.Discrete, spaces.MultiDiscrete)
MAX_CHANNELS = 4  # of what is an image for certain: grey or colours, with or without transparency
MAX_CHOICES = 100_000  # of one space; each is a number of its own in every array
_UNBOUNDED = 1e30  # limits beyond this, such as the largest float, are not meant to be reached
_ROUNDING = 1e-5  # by which a value may pass its limits, relative to them


def flat_size(space: spaces.Space) -> int:
    """Return how many numbers `flatten` makes of a value of the space.

    Raises:
        TypeError: the space is of a kind that cannot be flattened.
        ValueError: it has more than `MAX_CHOICES`.
    """
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        return math.prod(space.shape)
    if isinstance(space, spaces.Discrete):
        return _choices(space, int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        return _choices(space, int(space.nvec.sum()))
    return sum(flat_size(part) for _, part in _parts(space))


def _choices(space: spaces.Space, number: int) -> int:
    if number > MAX_CHOICES:
        raise ValueError(
            f"{space}, whose {number:,} values would be as many numbers; "
            f"at most {MAX_CHOICES:,} can be"
        )
    return number


def flatten(space: spaces.Space, value: Any, row: np.ndarray) -> None:
    """Write a value into `row`, which is zero and of `flat_size(space)`; choices become one-hot.

    Raises:
        ValueError, LookupError: the value is not of its space.
    """
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        # Infinite values are found where all numbers are looked at.
        with np.errstate(over="ignore"):
            row[:] = shaped(space, value).reshape(-1)
    elif isinstance(space, spaces.Discrete):
        choice = int(value) - int(space.start)
        if not 0 <= choice < row.size:
            raise ValueError(f"{value} is none of its values")
        row[choice] = 1.0
    elif isinstance(space, spaces.MultiDiscrete):
        choices = shaped(space, value) - space.start
        if ((choices < 0) | (choices >= space.nvec)).any():
            raise ValueError(f"{value} is none of its values")
        first = np.cumsum(space.nvec.reshape(-1)) - space.nvec.reshape(-1)
        row[first + choices.reshape(-1)] = 1.0
    else:
        start = 0
        for key, part in _parts(space):
            stop = start + flat_size(part)
            flatten(part, value[key], row[start:stop])
            start = stop


def shaped(space: spaces.Space, value: Any) -> np.ndarray:
    """Return a value as an array of its space's shape; axes of length 1 may be missing in it.

    Raises:
        ValueError: it has another shape.
    """
    array, shape = np.asarray(value), space.shape or ()
    if array.shape == shape:
        return array
    if [size for size in array.shape if size != 1] != [size for size in shape if size != 1]:
        raise ValueError(f"shape {array.shape} instead of {shape}")
    return array.reshape(shape)


def out_of_bounds(space: spaces.Space, value: Any) -> str | None:
    """Say what about a value that can be flattened is not as its space says; None if it is.

    NaN is not reported here.
    """
    if isinstance(space, spaces.Dict | spaces.Tuple):
        found = (out_of_bounds(part, value[key]) for key, part in _parts(space))
        return next(filter(None, found), None)
    if isinstance(space, spaces.MultiBinary):
        space = spaces.Box(0, 1, space.shape, np.int8)
    if not isinstance(space, spaces.Box):
        return None
    array = shaped(space, value)
    if space.dtype.kind in "biu" and array.dtype.kind == "f" and (array % 1 != 0).any():
        return f"fractions such as {array[array % 1 != 0][0]:g} for {space.dtype}"
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    outside = (array < low - _ROUNDING * np.maximum(1, abs(low))) | (
        array > high + _ROUNDING * np.maximum(1, abs(high))
    )
    return (
        f"{array[outside][0]:g} outside of {low[outside][0]:g} to {high[outside][0]:g}"
        if outside.any()
        else None
    )


def _parts(space: spaces.Space) -> list[tuple[Any, spaces.Space]]:
    """Return the parts and their keys, always in the same order."""
    if isinstance(space, spaces.Dict):
        return list(space.spaces.items())
    if isinstance(space, spaces.Tuple):
        return list(enumerate(space.spaces))
    raise TypeError(_named(space))


@dataclass(frozen=True)
class View:
    """The reading of one agent's observation."""

    space: spaces.Space  # of the observation proper
    inside: str | None  # the observation proper is this entry of a dictionary
    masked: bool  # the dictionary's entry "action_mask" says which actions are legal
    pictured: bool = False  # its image is seen as one, and is none of its numbers

    @classmethod
    def of(cls, space: spaces.Space, action_space: spaces.Space) -> "View":
        """Take action mask and observation proper apart where the space is a dictionary of both."""
        if not isinstance(space, spaces.Dict):
            return cls(space, inside=None, masked=False)
        masked = "action_mask" in space.spaces and isinstance(action_space, CHOICES)
        rest = {
            key: part for key, part in space.spaces.items() if not (masked and key == "action_mask")
        }
        if len(rest) == 1:
            ((key, proper),) = rest.items()
            return cls(proper, inside=key, masked=masked)
        return cls(spaces.Dict(rest), inside=None, masked=masked)

    @cached_property
    def image(self) -> spaces.Box | None:
        """The space of the one image that the observation proper is, or has among its entries."""
        found = [part for part in self._entries.values() if is_image(part)]
        return found[0] if len(found) == 1 else None

    @cached_property
    def numbers(self) -> spaces.Space:
        """The space of all that is flattened: without the image that is seen as one."""
        if not self.pictured:
            return self.space
        return spaces.Dict({k: part for k, part in self._entries.items() if part is not self.image})

    @cached_property
    def size(self) -> int:
        return flat_size(self.numbers)

    @property
    def _entries(self) -> dict[str, Any]:
        return self.space.spaces if isinstance(self.space, spaces.Dict) else {"": self.space}

    def read(self, value: Any) -> Any:
        """Return the observation proper."""
        return value if self.inside is None else value[self.inside]

    @property
    def channels_first(self) -> bool:
        """Whether its image's channels come before its rows, as PyTorch has them."""
        shape: Any = self.image and self.image.shape
        return shape is not None and shape[0] <= MAX_CHANNELS < min(shape[1:]) // 2

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of its image."""
        assert self.image is not None
        shape: Any = self.image.shape
        return (*shape[1:], shape[0]) if self.channels_first else shape

    def grid(self, value: Any) -> np.ndarray:
        """Return the image in the observation as rows, columns, channels."""
        assert self.image is not None
        proper = self.read(value)
        if isinstance(self.space, spaces.Dict):
            proper = next(proper[k] for k, part in self._entries.items() if part is self.image)
        grid = shaped(self.image, proper)
        return np.moveaxis(grid, 0, -1) if self.channels_first else grid


def write_image(image: np.ndarray, array: np.ndarray) -> None:
    """Write an image into an array of its space's type.

    Raises:
        ValueError: it holds something that the type has not, as one does that was scaled to [0, 1]
            where its space was not.
    """
    with np.errstate(invalid="ignore"):
        array[...] = image
    lossy = array.dtype.kind in "biu" and image.dtype != array.dtype
    if lossy and (odd := image[array != image]).size:
        raise ValueError(f"the image holds {odd[0]:g}, which is no {array.dtype}")


def is_image(space: spaces.Space) -> bool:
    """Say whether a value has rows, columns and channels."""
    return isinstance(space, spaces.Box) and len(space.shape) == 3


def has_images(space: spaces.Space) -> bool:
    """Say whether a value is an image, or has one somewhere within it."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        return any(has_images(part) for _, part in _parts(space))
    return is_image(space)


def read_views(all_spaces: Sequence[tuple[spaces.Space, spaces.Space]]) -> list[View]:
    """Return how agents' observations are read; images are seen as such if all have one alike.

    Args:
        all_spaces: of each agent's observations and actions.
    """
    views = [View.of(observation, action) for observation, action in all_spaces]
    images = [view.image for view in views]
    sorts = {image and (image.shape, image.dtype) for image in images}
    pictured = len(sorts) == 1 and None not in sorts
    return [replace(view, pictured=pictured) for view in views]


def view_size(name: str, agent: object, view: View) -> int:
    """Return how many numbers an agent observes.

    Raises:
        UserError: its observations cannot be flattened.
    """
    try:
        return view.size
    except TypeError as error:
        raise UserError(
            f"{name}: agent '{agent}' observes {error}; supported: {OBSERVATIONS}"
        ) from None
    except ValueError as error:
        raise UserError(f"{name}: agent '{agent}' observes {error}") from None


def _named(space: Any) -> str:
    """Name the space, and its package where that is not gymnasium."""
    package = type(space).__module__.partition(".")[0]
    return f"{space}" if package == "gymnasium" else f"{space} of {package}, not of gymnasium"


def cut_mask(given: Any, sizes: Sequence[int]) -> list[np.ndarray]:
    """Return a row for each component, from one row of all of them side by side or from such rows.

    Raises:
        ValueError: it has another shape.
    """
    nested = any(map(np.ndim, given)) if isinstance(given, tuple | list) else np.ndim(given) > 1
    rows = [np.asarray(row) for row in given] if nested else [np.asarray(given)]
    shapes = [row.shape for row in rows]
    if shapes != ([(size,) for size in sizes] if nested else [(sum(sizes),)]):
        shape, actions = shapes if nested else shapes[0], " + ".join(map(str, sizes))
        raise ValueError(f"action_mask has shape {shape}, there are {actions} actions")
    return rows if nested else np.split(rows[0], np.cumsum(sizes)[:-1])


def read_mask(given: Any, sizes: Sequence[int]) -> list[np.ndarray]:
    """Return which choices are legal, in each component; see `cut_mask` for the forms.

    A component in which nothing is allowed is read as one whose choice does not matter.

    Raises:
        ValueError: it has another shape, or holds something else than 0 and 1.
    """
    rows = cut_mask(given, sizes)
    for row in rows:
        if (odd := row[(row != 0) & (row != 1)]).size:
            raise ValueError(f"action_mask holds {odd[0]}: expected 1 for legal, 0 for illegal")
    return [row == 1 if row.any() else row == 0 for row in rows]


def pad_masks(rows: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """Return the masks of an agent's components in one row, padded to components of these sizes.

    What the agent does not have is illegal, but for the first choice of a component that it does
    not have at all.
    """
    padded = np.zeros(sum(sizes), bool)
    starts = np.cumsum(sizes) - sizes
    for start, row in zip_longest(starts, rows, fillvalue=np.ones(1, bool)):
        padded[start : start + len(row)] = row
    return padded


@dataclass(frozen=True)
class DiscreteAction:
    """An index, or one for each component, counted from the space's first value."""

    space: spaces.Discrete | spaces.MultiDiscrete

    @property
    def sizes(self) -> tuple[int, ...]:
        """Choices in each component."""
        if isinstance(self.space, spaces.Discrete):
            return (int(self.space.n),)
        return tuple(self.space.nvec.reshape(-1).tolist())

    def read(self, action: np.ndarray | np.integer) -> Any:
        choices = np.ravel(action)[: len(self.sizes)]
        if isinstance(self.space, spaces.Discrete):
            return int(choices[0]) + int(self.space.start)
        return (choices.reshape(self.space.shape) + self.space.start).astype(self.space.dtype)

    def write(self, action: Any) -> np.ndarray:
        """Return the choices that `read` makes this action of.

        Raises:
            ValueError: the action is not of its space.
        """
        choices = np.ravel(action) - np.ravel(self.space.start)
        whole = len(choices) == len(self.sizes) and (choices % 1 == 0).all()
        if not whole or ((choices < 0) | (choices >= self.sizes)).any():
            raise ValueError(f"{action} is none of {self.space}")
        return choices


@dataclass(frozen=True)
class BoxAction:
    """Components in [-1, 1], stretched to the space's limits.

    They stay as they are where it has none, and are 2 wide where it has one.
    """

    space: spaces.Box
    centre: np.ndarray
    half: np.ndarray

    @classmethod
    def of(cls, space: spaces.Box) -> "BoxAction":
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        has_low, has_high = np.abs(low) < _UNBOUNDED, np.abs(high) < _UNBOUNDED
        low = np.where(has_low, low, np.where(has_high, high - 2, -1.0))
        high = np.where(has_high, high, low + 2)
        return cls(space, centre=(low + high) / 2, half=(high - low) / 2)

    @property
    def unlimited(self) -> bool:
        """Whether a component has no limit on one side, or on both."""
        return bool(
            (np.maximum(np.abs(self.space.low), np.abs(self.space.high)) >= _UNBOUNDED).any()
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Real components: all of them in one."""
        return (self.space.shape[0],)

    def read(self, action: np.ndarray) -> np.ndarray:
        value = self.centre + self.half * action[: len(self.centre)]
        # Rounding must not carry an action over the edge: some environments check.
        return np.clip(value.astype(self.space.dtype), self.space.low, self.space.high)

    def write(self, action: Any) -> np.ndarray:
        """Return the components that `read` stretches to this action.

        Raises:
            ValueError: the action is not of its space.
        """
        value = shaped(self.space, action).astype(np.float64)
        if np.isnan(value).any():
            raise ValueError(f"{action} is none of {self.space}")
        return np.clip((value - self.centre) / np.where(self.half > 0, self.half, 1), -1, 1)


def action_readers(
    name: str, action_spaces: dict[str, spaces.Space]
) -> list[DiscreteAction] | list[BoxAction]:
    """Return how the agents' actions are read, in their order.

    Raises:
        UserError: a space is of a kind that is not supported, or the agents' spaces are of
            different kinds.
    """
    for agent, space in action_spaces.items():
        floats = (
            isinstance(space, spaces.Box)
            and len(space.shape) == 1
            and np.issubdtype(space.dtype, np.floating)
        )
        if not floats and not isinstance(space, CHOICES):
            raise UserError(
                f"{name}: agent '{agent}' acts in {_named(space)}; supported: {ACTIONS}"
            )
        if isinstance(space, CHOICES) and sum(DiscreteAction(space).sizes) > MAX_CHOICES:
            raise UserError(
                f"{name}: agent '{agent}' acts in {space}; "
                f"at most {MAX_CHOICES:,} choices are supported"
            )
    discrete = [
        DiscreteAction(space) for space in action_spaces.values() if isinstance(space, CHOICES)
    ]
    boxes = [
        BoxAction.of(space) for space in action_spaces.values() if isinstance(space, spaces.Box)
    ]
    if discrete and boxes:
        kinds = {
            type(space): f"agent '{agent}' acts in {space}"
            for agent, space in action_spaces.items()
        }
        raise UserError(f"{name}: {' and '.join(kinds.values())}; supported: {ACTIONS}")
    return discrete or boxes
