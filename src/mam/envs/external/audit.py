"""Which of PettingZoo's rules an environment breaks while it is played; noted in its worker.

Free of JAX. Much is lost where an environment becomes arrays: values outside of their space,
rewards of agents that have left, masks by another name. `mam.envs.check.parallel` reads the notes.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from mam.envs.external.factories import make_numbered
from mam.envs.external.pettingzoo import as_parallel, listed_agents, read_result
from mam.envs.external.spaces import CHOICES, DiscreteAction, cut_mask, out_of_bounds
from mam.envs.external.worker import describe

END = "end"  # a note of agents that ended; any other has the fields of a `Finding`
_MASK = re.compile(r"mask|avail|legal|valid|possible|allowed", re.IGNORECASE)


@dataclass(frozen=True)
class Audited:
    """A factory of environments that are watched."""

    name: str
    factory: Callable[..., Any]
    folder: str  # where notes are written, one file for each environment

    def __call__(self, index: int) -> "Audit":
        return Audit(
            as_parallel(make_numbered(self.factory, index), self.name), self.name, self.folder
        )


class Audit:
    """A ParallelEnv that passes everything on, and notes what is wrong with it."""

    def __init__(self, env: Any, name: str, folder: str):
        self._env, self._name = env, name
        self._index: dict[Hashable, int] = {agent: n for n, agent in enumerate(env.possible_agents)}
        file, self._path = tempfile.mkstemp(dir=folder)
        os.close(file)
        self._noted: set[tuple] = set()
        self._ended: set[Hashable] = set()
        self._acting: set[Hashable] = set()
        self._masks: dict[Hashable, set[bool]] = {}  # whether there was one, so far
        self._step = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        self._step = 0
        result = self._call("reset", lambda: self._env.reset(seed=seed))
        observations, infos = read_result(self._name, "reset", result, self._index.keys())
        self._ended, self._acting = set(), set(listed_agents(self._env, self._name))
        self._look(observations, infos, self._acting)
        return result

    def step(self, actions: Any) -> Any:
        self._step += 1
        result = self._call("step", lambda: self._env.step(actions))
        fields = read_result(self._name, "step", result, self._index.keys())
        observations, rewards, terminations, truncations, infos = fields
        acted, listed = self._acting, set(listed_agents(self._env, self._name))
        for agent in rewards.keys() - acted:
            if np.any(rewards[agent]):
                expected = "nothing for an agent after its end"
                self._note(
                    "dead_reward",
                    "error",
                    "reward",
                    expected,
                    f"{rewards[agent]}, which is lost",
                    agent,
                )
        terminated = {agent for agent in acted if terminations.get(agent)}
        truncated = {agent for agent in acted if truncations.get(agent)} - terminated
        self._ended = (self._ended | terminated | truncated) & listed
        self._acting = listed - self._ended
        if terminated or truncated:
            ended = [[self._index[agent] for agent in agents] for agents in (terminated, truncated)]
            self._write([END, self._step, *ended, not self._acting])
        self._look(observations, infos, self._acting | truncated)
        return result

    def state(self) -> Any:
        state = self._env.state()
        if isinstance(space := getattr(self._env, "state_space", None), spaces.Box):
            self._check_space("state", space, state, None)
        return state

    def _look(self, observations: Mapping, infos: Mapping, alive: set[Hashable]) -> None:
        for agent in filter(alive.__contains__, observations):
            observation, space = observations[agent], self._env.observation_space(agent)
            self._check_space("observation", space, observation, agent)
            choice, info = self._env.action_space(agent), infos.get(agent) or {}
            if isinstance(choice, CHOICES):
                self._check_masks(agent, observation, info, DiscreteAction(choice).sizes)

    def _check_space(self, field: str, space: spaces.Space, value: Any, agent: Hashable) -> None:
        try:
            found = out_of_bounds(space, value)
        except (ValueError, TypeError, LookupError):
            return  # what does not fit at all is refused where it is read
        if found:
            self._note("space", "error", field, f"values as {field}_space says", found, agent)

    def _check_masks(
        self, agent: Hashable, observation: Any, info: Mapping, sizes: tuple[int, ...]
    ) -> None:
        seen = observation if isinstance(observation, Mapping) else {}
        for given in (seen.get("action_mask"), info.get("action_mask")):
            if any(not row.any() for row in _mask_rows(given, sizes)):
                got = "none, which is read as all of them"
                self._note(
                    "action_mask", "warning", "action_mask", "at least one legal action", got, agent
                )
        given = seen.get("action_mask") is not None or info.get("action_mask") is not None
        if agent in self._acting:
            self._masks.setdefault(agent, set()).add(given)
        if len(self._masks.get(agent, ())) > 1:
            expected, got = "a mask at every step", "none at some, where all actions are allowed"
            self._note("action_mask", "warning", "action_mask", expected, got, agent)
        if given:
            return
        named = {key: value for key, value in seen.items() if _MASK.search(str(key))}
        for key, value in (named | dict(info)).items():
            if (rows := _mask_rows(value, sizes)) and all(
                np.isin(row, (0, 1)).all() for row in rows
            ):
                got = f"what may be one under another, '{key}'"
                self._note(
                    "mask_name",
                    "warning",
                    "action_mask",
                    "a mask under the name action_mask",
                    got,
                    agent,
                )

    def _call(self, method: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:
            self._note("exception", "error", method, "no exception", describe(error), None)
            raise

    def _note(
        self, check: str, severity: str, field: str, expected: str, got: str, agent: Hashable
    ) -> None:
        """Note the first place of its kind."""
        index = self._index.get(agent)
        if (check, field, index) not in self._noted:
            self._noted.add((check, field, index))
            self._write([check, severity, field, expected, got, index, self._step])

    def _write(self, note: list) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(note) + "\n")


def read_notes(folder: str) -> Iterator[list]:
    """Yield all notes of all environments."""
    for path in sorted(Path(folder).iterdir()):
        yield from map(json.loads, path.read_text().splitlines())


def _mask_rows(value: Any, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Return a row for each component, if the value has the shape of a mask; none otherwise."""
    try:
        rows = cut_mask(value, sizes)
    except (ValueError, TypeError, LookupError):
        return []
    return rows if all(row.dtype.kind in "biuf" for row in rows) else []
