"""The environments of one worker: rows of the pool's arrays. Free of JAX."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from mam.envs.external.factories import make_numbered
from mam.envs.external.pettingzoo import PettingZooEnv
from mam.envs.external.shared import IDLE, RESETTING, STEPPING, Arrays, Layout, Slab, map_slab
from mam.errors import UserError


class EnvSlice:
    """Environments that reset themselves, at their places in the pool.

    `doing` says where an exception came from.
    """

    def __init__(self, name: str, places: range):
        self.name = name
        self.doing = "the worker"
        self._places = places
        self._envs: list[PettingZooEnv] = []
        self._seeds: list[np.random.Generator] = []
        # Metrics of the episodes that the last step ended, by place.
        self.finished: dict[int, dict[str, float]] = {}
        self._slab: Slab
        # Where each of them writes what it observes and, if that is something else, what an action
        # led to.
        self._rows: list[Arrays] = []
        self._final_rows: list[Arrays] = []

    @property
    def layout(self) -> Layout:
        """Sizes of every one of the environments."""
        return self._envs[0].layout

    def make(self, factory: Callable[..., Any]) -> None:
        """Make the environments.

        Raises:
            UserError: one of them is nothing that can be adapted, or unlike the first.
        """
        for place in self._places:
            self.doing = f"making environment {place}"
            self._envs.append(PettingZooEnv(make_numbered(factory, place), self.name))
            if self._envs[-1].layout != self.layout:
                raise UserError(
                    f"{self.name}: environment {place} has other agents or spaces than the first"
                )

    def share(self, memory: int, num_envs: int, id_dim: int) -> None:
        """Map this memory, where `id_dim` features stand in front of every agent's view."""
        layout = replace(self.layout, obs_dim=id_dim + self.layout.obs_dim)
        self._slab = map_slab(memory, layout, num_envs)
        self._rows, self._final_rows = (
            [
                {
                    name: array[place, :, id_dim:] if name == "agents_view" else array[place]
                    for name, array in fields
                }
                for place in self._places
            ]
            for fields in (self._slab.observation.items(), self._slab.final_observation.items())
        )

    def reset(self, seed: int, generation: int) -> None:
        """Start an episode everywhere; environment i draws on (seed, i) alone.

        Args:
            seed: of the pool.
            generation: how often these environments have been lost since; not to lose them in the
                same way again.
        """
        self._seeds = [
            np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(place, generation)))
            for place in self._places
        ]
        for k, place in enumerate(self._places):
            self._start_episode(k)
            self._slab.doing[place] = IDLE

    def step(self) -> None:
        """Apply the actions in shared memory and write what comes of them there."""
        slab, self.finished = self._slab, {}
        for k, place in enumerate(self._places):
            self.doing = f"stepping environment {place}"
            slab.doing[place] = STEPPING
            outcome = self._envs[k].step(slab.action[place], into=self._rows[k])
            slab.reward[place] = outcome.reward
            slab.terminated[place] = outcome.terminated
            slab.truncated[place] = outcome.truncated
            if outcome.metrics:
                self.finished[place] = outcome.metrics
            over = outcome.terminated or outcome.truncated
            slab.parted[place] = outcome.final_observation is not None
            if over or outcome.final_observation is not None:
                for name, array in (outcome.final_observation or self._rows[k]).items():
                    self._final_rows[k][name][...] = array
            if over:
                self._start_episode(k)
            slab.doing[place] = IDLE

    def close(self) -> None:
        """Close all environments, whatever they raise."""
        for env in self._envs:
            with suppress(Exception):
                env.close()

    def _start_episode(self, k: int) -> None:
        self.doing = f"resetting environment {self._places[k]}"
        self._slab.doing[self._places[k]] = RESETTING
        self._envs[k].reset(int(self._seeds[k].integers(2**31)), into=self._rows[k])
