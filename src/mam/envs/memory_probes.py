"""Probes that only memory across environment steps solves.

    task        what it takes                       optimal_return  memoryless  random_return
    memory      carrying one's own cue to the end   1               1 / A       1 / A
    tmaze       the cue of one agent, for all       1               1 / A       1 / A^N
    convention  what was tried, and what of it hit  see the class   k / A       k / A

A actions, N agents, k rounds. Without memory a policy plays one joint distribution wherever it sees
the same, and where these tasks pay, all episodes look the same. They end by termination.
"""

import abc
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mam.envs.base import Metrics, restart, transition
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


class ConventionState(eqx.Module):
    """The secret, what each round has earned, and how far the episode has come."""

    code: Int[Array, "N"]
    earned: Float[Array, "k"]
    step_count: Int[Array, ""]


@dataclass(frozen=True)
class Convention(MemoryProbe):
    """A secret joint code, an action per agent, to be found and kept in `num_rounds` rounds.

    A round is a step at which agents act, and one at which each is told whether its own action was
    right, where actions do not matter. Its reward is the fraction of agents that chose their part
    of the code; metrics have it as `round_1`, …, 0 for those to come. An agent's view is one of 3
    symbols, one-hot: "act", "wrong", "right". What it chose it is not shown.

    * An agent's part is uniformly random, and only answers to its own actions tell anything of it.
      By round r it has had r tries at most, so it is right with probability min(r / A, 1) at most,
      and an agent that tries one action after another and keeps the right one is, in every round
      (`oracle_round_return`). Remembering answers is enough where the order of tries is fixed;
      where it is not, one's own actions are to be remembered, too.
    * Without memory one joint distribution answers every "act", and each agent is right with
      probability 1/A, however it is mixed with others.
    """

    num_agents: int = 2
    num_actions: int = 4
    num_rounds: int = 8

    @property
    def spec(self) -> EnvSpec:
        sizes = (self.num_agents, 3, self.num_actions, 2 * self.num_rounds - 1)
        return EnvSpec("probe/convention", *sizes)

    def oracle_round_return(self, round_number: int) -> float:
        """Return the most that can be expected of a round; the first is 1."""
        return min(round_number / self.num_actions, 1.0)

    @property
    def optimal_return(self) -> float:
        return sum(self.oracle_round_return(r) for r in range(1, self.num_rounds + 1))

    @property
    def memoryless_return(self) -> float:
        return self.num_rounds / self.num_actions

    @property
    def random_return(self) -> float:
        return self.num_rounds / self.num_actions

    def reset(self, key: Key[Array, ""]) -> tuple[ConventionState, TimeStep]:
        state = ConventionState(
            code=self._draw_cue(key),
            earned=jnp.zeros(self.num_rounds),
            step_count=jnp.zeros((), jnp.int32),
        )
        told = self._view(state, right=jnp.zeros(self.num_agents, bool))
        return state, restart(told, self._metrics(state))

    def step(
        self, state: ConventionState, action: Int[Array, "N"], key: Key[Array, ""]
    ) -> tuple[ConventionState, TimeStep]:
        del key
        right = action == state.code
        reward = (state.step_count % 2 == 0) * right.mean()
        state = ConventionState(
            code=state.code,
            earned=state.earned.at[state.step_count // 2].add(reward),
            step_count=state.step_count + 1,
        )
        return state, transition(
            self._view(state, right),
            reward,
            terminated=state.step_count >= 2 * self.num_rounds - 1,
            metrics=self._metrics(state),
        )

    def _view(self, state: ConventionState, right: Bool[Array, "N"]) -> Observation:
        act, wrong = 0, 1
        symbol = jnp.where(state.step_count % 2 == 0, act, wrong + right)
        return self._observe(jax.nn.one_hot(symbol, 3))

    def _metrics(self, state: ConventionState) -> Metrics:
        return {f"round_{r + 1}": state.earned[r] for r in range(self.num_rounds)}
