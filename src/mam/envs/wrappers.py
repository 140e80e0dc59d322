"""Layers around an environment: agent ids, episode statistics, and a batch that resets itself.

The order is fixed: `AutoReset(EpisodeStatistics(AgentId(env)), num_envs)`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mam.types import Action, Environment, EnvSpec, EnvState, Observation, TimeStep

IdEncoding = Literal["one_hot", "sinusoid", "none"]
SINUSOID_DIM = 16


def agent_ids(num_agents: int, encoding: IdEncoding) -> np.ndarray:
    """Return what tells agents apart, [num_agents, features], float32.

    Args:
        num_agents: N.
        encoding: `one_hot`: N features, the usual choice. `sinusoid`: sines and cosines of the
            agent's index at 8 wavelengths from 4 to 40,000 agents (after the positions of Vaswani
            et al. 2017, arXiv 1706.03762, §3.5), as many features whatever N is, so a policy may be
            run with another number of agents. `none`: no features; agents that see the same are the
            same.
    """
    if encoding == "one_hot":
        return np.eye(num_agents, dtype=np.float32)
    if encoding == "none":
        return np.zeros((num_agents, 0), np.float32)
    wavelength = np.geomspace(4, 40_000, SINUSOID_DIM // 2)
    angle = 2 * np.pi * np.arange(num_agents)[:, None] / wavelength
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


@dataclass(frozen=True)
class AgentId:
    """Puts `agent_ids` in front of every agent's view."""

    env: Environment
    encoding: IdEncoding = "one_hot"

    @property
    def spec(self) -> EnvSpec:
        spec = self.env.spec
        id_dim = agent_ids(spec.num_agents, self.encoding).shape[1]
        return replace(spec, obs_dim=id_dim + spec.obs_dim, id_dim=id_dim)

    def reset(self, key: Key[Array, ""]) -> tuple[EnvState, TimeStep]:
        state, timestep = self.env.reset(key)
        return state, self._identify(timestep)

    def step(
        self, state: EnvState, action: Action, key: Key[Array, ""]
    ) -> tuple[EnvState, TimeStep]:
        state, timestep = self.env.step(state, action, key)
        return state, self._identify(timestep)

    def animate(self, states: list[EnvState], path: Path) -> None:
        self.env.animate(states, path)

    def _identify(self, timestep: TimeStep) -> TimeStep:
        def prepend(observation: Observation) -> Observation:
            view = observation.agents_view
            ids = jnp.asarray(agent_ids(view.shape[0], self.encoding))
            return replace(observation, agents_view=jnp.concatenate([ids, view], axis=1))

        return replace(
            timestep,
            observation=prepend(timestep.observation),
            final_observation=prepend(timestep.final_observation),
        )


class EpisodeState(eqx.Module):
    """An environment's state and what its episode has come to so far."""

    env_state: EnvState
    episode_return: Float[Array, ""]  # mean over agents of the reward summed over steps
    episode_length: Float[Array, ""]  # environment steps


@dataclass(frozen=True)
class EpisodeStatistics:
    """Adds `episode_return` and `episode_length` to the metrics.

    Both are running values: complete where `timestep.ended`, partial elsewhere. The return is the
    mean over agents, hence the team's return where the reward is shared.
    """

    env: Environment

    @property
    def spec(self) -> EnvSpec:
        return self.env.spec

    def reset(self, key: Key[Array, ""]) -> tuple[EpisodeState, TimeStep]:
        env_state, timestep = self.env.reset(key)
        state = EpisodeState(env_state, episode_return=jnp.zeros(()), episode_length=jnp.zeros(()))
        return state, _report(state, timestep)

    def step(
        self, state: EpisodeState, action: Action, key: Key[Array, ""]
    ) -> tuple[EpisodeState, TimeStep]:
        env_state, timestep = self.env.step(state.env_state, action, key)
        state = EpisodeState(
            env_state,
            episode_return=state.episode_return + timestep.reward.mean(),
            episode_length=state.episode_length + 1,
        )
        return state, _report(state, timestep)

    def animate(self, states: list[EpisodeState], path: Path) -> None:
        self.env.animate([state.env_state for state in states], path)


def _report(state: EpisodeState, timestep: TimeStep) -> TimeStep:
    statistics = {"episode_return": state.episode_return, "episode_length": state.episode_length}
    return replace(timestep, metrics=timestep.metrics | statistics)


class _Restarts(eqx.Module):
    """Carry of the reset loop."""

    state: EnvState  # [B, …]
    observation: Observation  # [B, …]
    num_done: Int[Array, ""]  # of the ended environments, how many have been reset


@dataclass(frozen=True)
class AutoReset:
    """`num_envs` environments side by side, each starting a new episode as soon as one ends.

    At an episode's last step everything in the `TimeStep` belongs to the ended episode
    (`final_observation` is the true successor), except `observation`, which is the first of the
    next.

    A reset may cost many times a step, and few environments end at the same step, so a loop resets
    the ended ones only, B/32 at a time. It is a `while_loop` rather than a `cond`, which under
    `jax.vmap` (over seeds) would compute both branches at every step. Environment i draws its
    randomness from `fold_in(·, i)` of the step's key, whatever happens to the others and however
    many there are.
    """

    env: Environment
    num_envs: int
    # Number of the first, where others stand elsewhere.
    first: Int[Array, ""] | int = field(default=0, kw_only=True)

    @property
    def spec(self) -> EnvSpec:
        return self.env.spec

    def reset(self, key: Key[Array, ""]) -> tuple[EnvState, TimeStep]:
        """Start an episode in every environment; all leaves gain a leading axis B."""
        return jax.vmap(self.env.reset)(self._key_per_env(key, jnp.arange(self.num_envs)))

    def step(
        self, state: EnvState, action: Action, key: Key[Array, ""]
    ) -> tuple[EnvState, TimeStep]:
        """Apply one joint action per environment and reset those whose episode ended."""
        step_key, reset_key = jax.random.split(key)
        step_keys = self._key_per_env(step_key, jnp.arange(self.num_envs))
        state, timestep = jax.vmap(self.env.step)(state, action, step_keys)
        state, observation = self._reset_ended(
            state, timestep.observation, timestep.ended, reset_key
        )
        return state, replace(timestep, observation=observation)

    def _reset_ended(
        self,
        state: EnvState,
        observation: Observation,
        ended: Bool[Array, "B"],
        key: Key[Array, ""],
    ) -> tuple[EnvState, Observation]:
        chunk = max(1, self.num_envs // 32)
        # The ended environments first; the rest of the queue points past the batch, where writes
        # are dropped.
        (queue,) = jnp.nonzero(ended, size=self.num_envs + chunk, fill_value=self.num_envs)

        def reset_chunk(carry: _Restarts) -> _Restarts:
            index = jax.lax.dynamic_slice_in_dim(queue, carry.num_done, chunk)
            fresh_state, fresh = jax.vmap(self.env.reset)(self._key_per_env(key, index))

            def write(batch: Array, rows: Array) -> Array:
                return batch.at[index].set(rows, mode="drop")

            return _Restarts(
                state=jax.tree.map(write, carry.state, fresh_state),
                observation=jax.tree.map(write, carry.observation, fresh.observation),
                num_done=carry.num_done + chunk,
            )

        num_ended = ended.sum()
        carry = _Restarts(state, observation, num_done=jnp.zeros_like(num_ended))
        carry = jax.lax.while_loop(lambda carry: carry.num_done < num_ended, reset_chunk, carry)
        return carry.state, carry.observation

    def _key_per_env(self, key: Key[Array, ""], index: Int[Array, "n"]) -> Key[Array, "n"]:
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, self.first + index)
