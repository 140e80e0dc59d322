"""Probes that only memory across environment steps solves.

    task        what it takes                       optimal_return  memoryless  random_return
    memory      carrying one's own cue to the end   1               1 / A       1 / A
    tmaze       the cue of one agent, for all       1               1 / A       1 / A^N

A actions, N agents. Without memory a policy plays one joint distribution wherever it sees the same,
and where these tasks pay, all episodes look the same. They end by termination.
"""

import abc
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from mam.envs.base import restart, transition
from mam.envs.probe_base import CueState, Probe
from mam.types import EnvSpec, Observation, TimeStep


@dataclass(frozen=True)
class MemoryProbe(Probe, abc.ABC):
    """A probe whose `optimal_return` takes memory."""

    @property
    @abc.abstractmethod
    def memoryless_return(self) -> float:
        """Expected return of the best policy without memory, however its agents are mixed."""


@dataclass(frozen=True)
class Memory(MemoryProbe):
    """Every agent sees a cue at the first step and must answer it at the last of `length` steps.

    The reward, at the last step only, is the fraction that answer their own cue. The view is the
    one-hot cue (zeros after the first step), then 1 at the last step. Probes memory across
    environment steps: a policy without it earns 1/A whatever it does.
    """

    num_agents: int = 2
    num_actions: int = 4
    length: int = 4

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec(
            "probe/memory", self.num_agents, self.num_actions + 1, self.num_actions, self.length
        )

    @property
    def optimal_return(self) -> float:
        return 1.0

    @property
    def memoryless_return(self) -> float:
        return 1 / self.num_actions

    @property
    def random_return(self) -> float:
        return 1 / self.num_actions

    def reset(self, key: Key[Array, ""]) -> tuple[CueState, TimeStep]:
        state = CueState(self._draw_cue(key), step_count=jnp.zeros((), jnp.int32))
        return state, restart(self._view(state))

    def step(
        self, state: CueState, action: Int[Array, "N"], key: Key[Array, ""]
    ) -> tuple[CueState, TimeStep]:
        del key
        state = CueState(state.cue, state.step_count + 1)
        terminated = state.step_count >= self.length
        reward = terminated * (action == state.cue).mean()
        return state, transition(self._view(state), reward, terminated=terminated)

    def _view(self, state: CueState) -> Observation:
        cue = jax.nn.one_hot(state.cue, self.num_actions) * (state.step_count == 0)
        now = jnp.full((self.num_agents, 1), state.step_count == self.length - 1, jnp.float32)
        return self._observe(jnp.concatenate([cue, now], axis=1))


class TMazeState(eqx.Module):
    """The cue, which agent sees it, and how far the episode has come."""

    cue: Int[Array, ""]
    informed: Int[Array, ""]
    step_count: Int[Array, ""]


@dataclass(frozen=True)
class TMaze(MemoryProbe):
    """A T-maze for a team: one agent sees a cue, and all must act on it `length` steps later.

    An agent's view is one of A + 3 symbols, one-hot: at the first step the cue, if it is the one
    drawn to see it, or "none"; then "corridor" `length` times; then "act". Only actions at that
    last step count: the reward is 1 if all agents choose the cue, else 0.

    * Without memory one joint distribution π answers every "act", and earns the mean over cues c of
      π(c, …, c), 1/A at most: by agreeing on one action.
    * Memory is not enough. Agents that see nothing of what others saw earn 1/A too: one that has
      not seen the cue chooses it with probability 1/A.
    """

    num_agents: int = 2
    num_actions: int = 4
    length: int = 10

    @property
    def spec(self) -> EnvSpec:
        name, obs_dim = f"probe/tmaze-{self.length}", self.num_actions + 3
        return EnvSpec(name, self.num_agents, obs_dim, self.num_actions, self.length + 2)

    @property
    def optimal_return(self) -> float:
        return 1.0

    @property
    def memoryless_return(self) -> float:
        return 1 / self.num_actions

    @property
    def random_return(self) -> float:
        return self.num_actions**-self.num_agents

    def reset(self, key: Key[Array, ""]) -> tuple[TMazeState, TimeStep]:
        cue_key, agent_key = jax.random.split(key)
        state = TMazeState(
            cue=jax.random.randint(cue_key, (), 0, self.num_actions),
            informed=jax.random.randint(agent_key, (), 0, self.num_agents),
            step_count=jnp.zeros((), jnp.int32),
        )
        return state, restart(self._view(state))

    def step(
        self, state: TMazeState, action: Int[Array, "N"], key: Key[Array, ""]
    ) -> tuple[TMazeState, TimeStep]:
        del key
        state = TMazeState(state.cue, state.informed, state.step_count + 1)
        terminated = state.step_count >= self.length + 2
        reward = 1.0 * (terminated & (action == state.cue).all())
        return state, transition(self._view(state), reward, terminated=terminated)

    def _view(self, state: TMazeState) -> Observation:
        none, corridor, act = range(self.num_actions, self.num_actions + 3)
        informed = jnp.arange(self.num_agents) == state.informed
        symbol = jnp.where(
            state.step_count == 0,
            jnp.where(informed, state.cue, none),
            jnp.where(state.step_count <= self.length, corridor, act),
        )
        return self._observe(jax.nn.one_hot(symbol, self.num_actions + 3))
