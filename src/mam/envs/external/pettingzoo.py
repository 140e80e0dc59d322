"""One PettingZoo `ParallelEnv` as stacked NumPy arrays. Free of JAX: worker processes import it.

Nothing of PettingZoo is needed: an environment is what has `possible_agents`, `reset`, `step` and
the two spaces.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Set
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
from gymnasium import spaces

from mam.envs.external.factories import POSITIONS
from mam.envs.external.shared import INFO, Arrays, Layout
from mam.envs.external.spaces import (
    BoxAction,
    View,
    action_readers,
    flatten,
    has_images,
    is_image,
    pad_masks,
    read_mask,
    read_views,
    view_size,
    write_image,
)
from mam.errors import UserError, printable

_PARALLEL = ("possible_agents", "reset", "step", "observation_space", "action_space")
_STEP = ("observations", "rewards", "terminations", "truncations", "infos")


@dataclass(frozen=True)
class Outcome:
    """The consequences of a joint action."""

    observation: Arrays  # to act on next, or the last one
    reward: np.ndarray  # [N]
    terminated: bool
    truncated: bool
    # Of the infos, at the end of an episode.
    metrics: dict[str, float] = field(default_factory=dict)
    # With the last views of agents truncated while others go on, if any.
    final_observation: Arrays | None = None


class PettingZooEnv:
    """A ParallelEnv whose agents, dead or alive, stand in rows, in the order of `possible_agents`.

    An agent that has terminated or was truncated before the others is dead until it is missing in
    `env.agents` and comes back, or until the next episode; so is one that is not in `env.agents`,
    for as long. The dead see zeros, earn nothing and are free to choose any action, which goes
    nowhere. One that is in `env.agents` but observes nothing counts as dead until it observes
    again, and nothing is learned of its actions, but the environment gets them, and its reward is
    kept: a ParallelEnv asks all that it lists. The joint episode ends when no agent goes on. It
    was truncated if an agent was truncated at its last step; those agents are alive in its last
    observation, since they would have gone on. So are, in `final_observation`, those truncated
    before the others.
    """

    def __init__(self, env: Any, name: str):
        """Read the spaces; the environment is not reset.

        Args:
            env: a ParallelEnv, or an AECEnv whose agents may act at the same time.
            name: what the user calls it, for messages.

        Raises:
            UserError: it is neither, has no agents, or has spaces that are not supported.
        """
        self.name = name
        self._env = env = as_parallel(env, name)
        agents = tuple(env.possible_agents)
        if not agents:
            raise UserError(f"{name}: the environment has no agents (its possible_agents is empty)")
        self._index: dict[Hashable, int] = {agent: n for n, agent in enumerate(agents)}
        self._actions = action_readers(name, {agent: env.action_space(agent) for agent in agents})
        self._views = read_views(
            [(env.observation_space(agent), env.action_space(agent)) for agent in agents]
        )
        self.layout = _lay_out(name, env, agents, self._views, self._actions)
        own = [[np.ones(size, bool) for size in action.sizes] for action in self._actions]
        self._own_actions = np.stack([self._padded(masks) for masks in own])
        self._ended: set[Hashable] = set()  # agents whose part in the episode is over
        self._acting: set[Hashable] = set()  # agents that go on
        self._place = read_place(name, env, self._views)
        self._last_state = np.zeros(self.layout.state_dim or 0, np.float32)

    @property
    def notes(self) -> list[str]:
        """Lines on all that was padded, flattened or left out to make agents' arrays alike."""
        return list(self.layout.notes)

    def reset(self, seed: int, into: Arrays | None = None) -> Arrays:
        """Start an episode; all of its randomness comes from the seed.

        Args:
            seed: for the environment.
            into: arrays to write the observation to; new ones by default.
        """
        observations, infos = read_result(
            self.name, "reset", self._env.reset(seed=seed), self._index.keys()
        )
        self._ended = set()
        self._acting = self._going_on()
        return self._observe(observations, infos, self._acting, over=False, into=into)

    def step(self, action: np.ndarray, into: Arrays | None = None) -> Outcome:
        """Apply a joint action.

        Args:
            action: [N] indices, [N, K] of components, or [N, A] real components in [-1, 1].
            into: as for `reset`.
        """
        # An environment expects agents that have ended but are still listed to act, too.
        actions = {
            agent: self._read_action(agent, action) for agent in listed_agents(self._env, self.name)
        }
        result = read_result(self.name, "step", self._env.step(actions), self._index.keys())
        observations, rewards, terminations, truncations, infos = result

        acted = self._acting
        terminated = {agent for agent in acted if terminations.get(agent)}
        truncated = {agent for agent in acted if truncations.get(agent)} - terminated
        # An agent that has ended and is listed again after it was not has come back.
        self._ended = (self._ended | terminated | truncated) & set(
            listed_agents(self._env, self.name)
        )
        self._acting = self._going_on()
        over = not self._acting
        final = None
        if truncated and not over:
            final = self._observe(observations, infos, self._acting | truncated, over, into=None)
        return Outcome(
            observation=self._observe(
                observations, infos, truncated if over else self._acting, over, into
            ),
            reward=self._read_rewards(
                {agent: rewards.get(agent, 0.0) for agent in self._index if agent in acted}
            ),
            terminated=over and not truncated,
            truncated=over and bool(truncated),
            metrics=_info_metrics(infos) if over else {},
            final_observation=final,
        )

    def write_actions(self, actions: Mapping[Hashable, Any]) -> np.ndarray:
        """Return the joint action that `step` reads as these actions; zeros for other agents.

        Args:
            actions: of agents, as the environment itself takes them.

        Raises:
            UserError: an action is none of its agent's, or of no agent.
        """
        rows = np.zeros(*self.layout.action)
        for agent, action in actions.items():
            if agent not in self._index:
                raise UserError(f"{self.name}: there is no agent '{agent}' to act")
            n = self._index[agent]
            try:
                written = self._actions[n].write(action)
            except (ValueError, TypeError) as error:
                raise UserError(f"{self.name}: the action of agent '{agent}': {error}") from error
            np.atleast_1d(rows[n : n + 1].reshape(-1))[: len(written)] = written
        return rows

    def frame(self) -> np.ndarray | None:
        """Draw an image [Y, X, RGB] of the current state; return None where nothing is drawn.

        Raises:
            UserError: what is drawn is no image.
        """
        drawn = self._env.render()
        if drawn is None:
            return None
        picture = np.asarray(drawn)
        # Several since the last time: the newest.
        picture = picture[-1] if picture.ndim == 4 and len(picture) else picture
        grey_or_colour = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[-1] in (3, 4))
        if picture.dtype.kind not in "biuf" or not grey_or_colour or not picture.size:
            what = f"{type(drawn).__name__} of shape {picture.shape}, {picture.dtype}"
            raise UserError(
                f"{self.name} cannot be drawn: "
                f"render() returns {what}, not numbers [rows, columns, 3]"
            )
        if picture.dtype.kind != "f":
            return picture.astype(np.uint8)
        unit = np.nanmax(picture) <= 1
        return np.nan_to_num(np.clip(picture * (255 if unit else 1), 0, 255)).astype(np.uint8)

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _going_on(self) -> set[Hashable]:
        listed = set(listed_agents(self._env, self.name))
        if unknown := listed - self._index.keys():
            raise UserError(
                f"{self.name}: agent '{unknown.pop()}' is in agents but not in possible_agents"
            )
        return listed - self._ended

    def _read_rewards(self, rewards: Mapping[Hashable, Any]) -> np.ndarray:
        for agent, reward in rewards.items():
            if np.ndim(reward) > 0 or reward is None:
                raise UserError(
                    f"{self.name}: the reward of agent '{agent}' is {reward!r}: expected a number"
                )
        # Infinite values are found where all numbers are looked at.
        with np.errstate(over="ignore"):
            return np.array([rewards.get(agent, 0.0) for agent in self._index], np.float32)

    def _observe(
        self,
        observations: Mapping,
        infos: Mapping,
        alive: set[Hashable],
        over: bool,
        into: Arrays | None,
    ) -> Arrays:
        arrays = into or {
            name: np.empty(shape, dtype) for name, (shape, dtype) in self.layout.observation.items()
        }
        for array in arrays.values():
            array[...] = 0
        arrays["action_mask"][...] = self._own_actions
        for agent in alive & observations.keys():
            n = self._index[agent]
            arrays["alive"][n] = True
            try:
                info = infos.get(agent) or {}
                self._write_view(n, observations[agent], arrays)
                self._write_mask(n, observations[agent], info, arrays["action_mask"])
                if self._place is not None:
                    arrays["positions"][n] = self._place.read(arrays["agents_view"][n], info)
            except (ValueError, TypeError, LookupError) as error:
                space = self._env.observation_space(agent)
                what = f"there is no {error}" if isinstance(error, KeyError) else error
                raise UserError(
                    f"{self.name}: what agent '{agent}' observes does not fit {space}: {what}"
                ) from error
        if "state" in arrays:
            arrays["state"][...] = self._last_state = self._state(over)
        return arrays

    def _write_view(self, n: int, observation: Any, arrays: Arrays) -> None:
        view = self._views[n]
        if "grid" in arrays:
            write_image(view.grid(observation), arrays["grid"][n])
        flatten(view.numbers, view.read(observation), arrays["agents_view"][n, : view.size])

    def _write_mask(self, n: int, observation: Any, info: Mapping, mask: np.ndarray) -> None:
        given = observation["action_mask"] if self._views[n].masked else info.get("action_mask")
        if given is None or self.layout.continuous:
            return
        mask[n] = self._padded(read_mask(given, self._actions[n].sizes))

    def _padded(self, masks: list[np.ndarray]) -> np.ndarray:
        """Pad an agent's masks to the sizes that hold every agent's."""
        return pad_masks(masks, self.layout.action_components or (self.layout.num_actions,))

    def _read_action(self, agent: Hashable, action: np.ndarray) -> Any:
        n = self._index[agent]
        return self._actions[n].read(action[n])

    def _state(self, over: bool) -> np.ndarray:
        try:
            state = np.asarray(self._env.state(), np.float32).reshape(-1)
        except Exception:
            if not over:
                raise
            # Some put it together from the agents that go on: at the end there are none.
            return self._last_state
        if state.shape == self._last_state.shape:
            return state
        if over:
            return self._last_state
        raise UserError(
            f"{self.name}: state() has {state.size} numbers, its space {self._last_state.size}"
        )


def read_result(name: str, method: str, result: Any, agents: Set[Hashable]) -> tuple[Mapping, ...]:
    """Return the fields that `reset` or `step` of a ParallelEnv returned; infos may be None.

    Args:
        name: of the environment, for messages.
        method: "reset" or "step".
        result: what it returned.
        agents: all that there are.

    Raises:
        UserError: it is not the two or five dictionaries that PettingZoo asks for.
    """
    fields = ("observations", "infos") if method == "reset" else _STEP
    if not isinstance(result, tuple | list) or len(result) != len(fields):
        found = (
            f"{len(result)} values"
            if isinstance(result, tuple | list)
            else f"a {type(result).__name__}"
        )
        raise UserError(f"{name}: {method}() returns {found}, not ({', '.join(fields)})")
    read = dict(zip(fields, result, strict=True))
    read["infos"] = {} if read["infos"] is None else read["infos"]
    for part, values in read.items():
        if not isinstance(values, Mapping):
            kind = type(values).__name__
            raise UserError(
                f"{name}: {method}() returns a {kind} for {part}: "
                "expected a dictionary, agent by agent"
            )
        if part != "infos" and (unknown := values.keys() - agents):
            raise UserError(
                f"{name}: {part} of {method}() has an entry '{unknown.pop()}', "
                "which is no possible agent"
            )
    return tuple(read.values())


def listed_agents(env: Any, name: str) -> list[Hashable]:
    """Return the agents that go on, and perhaps some whose end was told.

    Raises:
        UserError: the environment does not say.
    """
    try:
        return env.agents
    except AttributeError:
        raise UserError(
            f"{name}: there is no attribute agents: expected a list of those who go on"
        ) from None


def as_parallel(env: Any, name: str) -> Any:
    """Return a ParallelEnv as it is; convert an AECEnv whose agents may act at the same time.

    Raises:
        UserError: it is neither.
    """
    if all(hasattr(env, attribute) for attribute in _PARALLEL) and not hasattr(env, "agent_iter"):
        for method in ("observation_space", "action_space"):
            if not callable(space := getattr(env, method)):
                kind = type(space).__name__
                raise UserError(f"{name}: {method} is a {kind}: expected a method, {method}(agent)")
        if not _takes_seed(env.reset):
            raise UserError(
                f"{name}: reset() takes no seed: expected reset(seed=None, options=None)"
            )
        return env
    if not hasattr(env, "agent_iter"):
        missing = next(attribute for attribute in _PARALLEL if not hasattr(env, attribute))
        raise UserError(
            f"{name}: {type(env).__name__} is not a PettingZoo ParallelEnv: it has no {missing}"
        )
    if not getattr(env, "metadata", {}).get("is_parallelizable", False):
        raise UserError(
            f"{name}: the agents of this AECEnv act in turn, but a ParallelEnv is needed "
            '(if they may act at the same time, set metadata["is_parallelizable"] = True, '
            "or convert it with pettingzoo.utils.aec_to_parallel)"
        )
    return importlib.import_module("pettingzoo.utils.conversions").aec_to_parallel(env)


def _takes_seed(reset: Callable) -> bool:
    try:
        inspect.signature(reset).bind(seed=0)
    except TypeError:
        return False
    except ValueError:
        pass  # built in: its signature cannot be read
    return True


def _lay_out(name: str, env: Any, agents: tuple, views: list[View], actions: list) -> Layout:
    """Return sizes that hold every agent, and what had to be done for it."""
    notes = []
    view_sizes = [view_size(name, agent, view) for agent, view in zip(agents, views, strict=True)]
    if any(has_images(view.numbers) for view in views):
        notes.append(
            "images are flattened: to be seen as such, every agent must have one, all of one "
            "size, as the observation itself or as an entry of its Dict"
        )
    if len(set(view_sizes)) > 1:
        notes.append(
            f"agents observe {_span(view_sizes)} numbers: "
            "the shorter observations are padded with zeros"
        )
    sizes = [action.sizes for action in actions]
    components = tuple(max(choices) for choices in zip_longest(*sizes, fillvalue=0))
    several = any(isinstance(action.space, spaces.MultiDiscrete) for action in actions)
    if len(set(sizes)) > 1:
        theirs = (
            f"up to {' + '.join(map(str, components))}"
            if several
            else _span([size for (size,) in sizes])
        )
        notes.append(f"agents have {theirs} actions: those that an agent does not have are masked")
    if any(isinstance(action, BoxAction) and action.unlimited for action in actions):
        notes.append(
            "actions without limits reach from -1 to 1, "
            "or 2 beyond their only limit: give them both"
        )
    first, place = views[0], read_place(name, env, views)
    image = first.image if first.pictured else None
    if image and first.channels_first:
        notes.append(
            f"images are read channels first: rows, columns and channels are {first.grid_shape}"
        )
    state = getattr(env, "state_space", None)
    if state is not None and is_image(state):
        notes.append("the global state is an image: it is left out")
    return Layout(
        agents=tuple(map(printable, agents)),
        obs_dim=max(view_sizes),
        num_actions=sum(components),
        continuous=isinstance(actions[0], BoxAction),
        action_components=components if several else None,
        time_limit=_time_limit(env),
        grid_shape=first.grid_shape if image else None,
        grid_dtype=str(image.dtype) if image and image.dtype.kind in "biu" else "float32",
        state_dim=math.prod(state.shape)
        if isinstance(state, spaces.Box) and not is_image(state)
        else None,
        position_dim=place and place.dim,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class Place:
    """The reading of where an agent is: numbers of its view, or info["position"], a pair."""

    columns: slice | None

    @property
    def dim(self) -> int:
        """Coordinates of one agent."""
        return 2 if self.columns is None else self.columns.stop - self.columns.start

    def read(self, view: np.ndarray, info: Mapping) -> np.ndarray:
        """Return an agent's coordinates.

        Raises:
            ValueError: the info has none, or not two.
        """
        if self.columns is not None:
            return view[self.columns]
        place = np.asarray(info.get("position", ()), np.float32).reshape(-1)
        if place.size != self.dim:
            raise ValueError(f'info["position"] has {place.size} numbers, expected {self.dim}')
        return place


def read_place(name: str, env: Any, views: list[View]) -> Place | None:
    """Return how positions are read, as the environment's metadata say; None if they do not.

    Args:
        name: of the environment, for messages.
        env: whose `metadata["positions"]` are "2:4", numbers 2 and 3 of each view, or "info".
        views: of the agents.

    Raises:
        UserError: they are neither, or there are no such numbers.
    """
    given = getattr(env, "metadata", {}).get(POSITIONS)
    if given is None or given == "info":
        return given and Place(None)
    ends = [int(end) if end.isdecimal() else -1 for end in str(given).split(":")]
    size = min(view.size for view in views)
    if len(ends) != 2 or not 0 <= ends[0] < ends[1] <= size:
        raise UserError(
            f"{name}: {POSITIONS} must be info, or such as 0:2 within the {size} numbers that "
            f"each agent observes, got {given}"
        )
    return Place(slice(*ends))


def _info_metrics(infos: Mapping) -> dict[str, float]:
    """Return the numbers of all infos as `info_<key>`, the mean over the agents that have it."""
    found: dict[str, list[float]] = {}
    for info in infos.values():
        for key, value in info.items() if isinstance(info, Mapping) else ():
            if isinstance(value, bool | int | float | np.number | np.bool_) and isinstance(
                key, str
            ):
                found.setdefault(f"{INFO}{key}", []).append(float(value))
    return {name: sum(values) / len(values) for name, values in found.items()}


def _span(sizes: list[int]) -> str:
    return f"{min(sizes)} to {max(sizes)}"


def _time_limit(env: Any) -> int | None:
    """Return after how many steps the environment truncates, if it says so in the usual place."""
    places = (
        getattr(env, "max_cycles", None),
        getattr(getattr(env, "unwrapped", env), "max_cycles", None),
    )
    limit = next(
        (place for place in places if place is not None),
        getattr(env, "metadata", {}).get("max_cycles"),
    )
    return (
        int(limit) if isinstance(limit, int | float | np.integer) and 0 < limit < math.inf else None
    )
