"""Tiny tasks with a known best score: each fails for one reason, so a score says what is broken.

    task        what it takes                             optimal_return  random_return  ends by
    identity    acting on one's own observation           T               T / A          truncation
    copy        knowing what earlier agents just chose    (T−1)(1 − 1/A)  optimal / A    truncation
    matrix      coordinating on the better of two optima  1               see the class  termination
    target      a continuous action per agent             T               T / 3          truncation
    components  several choices per agent at once         T               T / Π sizes    truncation
    recall      asking the one agent that knows           T               T / A          truncation
    channels    choosing what no other agent chooses      T               see the class  truncation

Those that take memory across environment steps are in `memory_probes`.

T steps, A actions. `random_return` is what uniformly random actions earn on average. But in
`channels` rewards are shared and all actions legal; all agents are alive.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mam.envs.base import restart, transition
from mam.envs.memory_probes import Convention, Memory, TMaze
from mam.envs.probe_base import CueState, Probe
from mam.types import EnvSpec, EnvState, Observation, TimeStep


@dataclass(frozen=True)
class Identity(Probe):
    """Every agent sees a random cue of its own, new at every step.

    The reward is the fraction of agents that answer theirs. Probes the plumbing (observations,
    actions, advantages, optimiser): nothing done now matters later.
    """

    num_agents: int = 3
    num_actions: int = 4
    time_limit: int = 8

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec(
            "probe/identity", self.num_agents, self.num_actions, self.num_actions, self.time_limit
        )

    @property
    def optimal_return(self) -> float:
        return float(self.time_limit)

    @property
    def random_return(self) -> float:
        return self.time_limit / self.num_actions

    def reset(self, key: Key[Array, ""]) -> tuple[CueState, TimeStep]:
        state = CueState(self._draw_cue(key), step_count=jnp.zeros((), jnp.int32))
        return state, restart(self._observe(jax.nn.one_hot(state.cue, self.num_actions)))

    def step(
        self, state: CueState, action: Int[Array, "N"], key: Key[Array, ""]
    ) -> tuple[CueState, TimeStep]:
        reward = (action == state.cue).mean()
        state = CueState(self._draw_cue(key), state.step_count + 1)
        observation = self._observe(jax.nn.one_hot(state.cue, self.num_actions))
        return state, transition(observation, reward, truncated=state.step_count >= self.time_limit)


class CopyState(eqx.Module):
    """The action that pays nothing now, and how far the episode has come."""

    spent: Int[Array, ""]  # what agent 0 chose at the step before; −1 at the first step
    step_count: Int[Array, ""]


@dataclass(frozen=True)
class Copy(Probe):
    """Agents must agree with agent 0, which must not repeat itself, and no agent sees anything.

    The reward is the fraction of the others that choose as agent 0 does, and nothing if agent 0
    repeats its action of the step before (or at the first step, where there is none before).
    Observations are constant, so a policy without memory plays one joint distribution at every
    step. Let p_a be the probability that agent 0 chooses a. It repeats itself with probability
    Σ p_a², so

    * at best a step earns 1 − Σ p_a² ≤ 1 − 1/A: agent 0 uniformly random, all others choosing the
      same;
    * agents that choose independently earn at most max_a p_a (1 − p_a) ≤ 1/4
      (`independent_return`), however well they share information beforehand, because a random
      choice cannot be foreseen;
    * a deterministic policy earns 0, so evaluate by sampling, not greedily.

    Probes the decoder: only a policy in which later agents see the actions of earlier ones in the
    same step gets past `independent_return`. The agent that decides first need not be agent 0. (A
    policy with memory across steps could alternate between two actions and earn 1 a step.)
    """

    num_agents: int = 3
    num_actions: int = 4
    time_limit: int = 16

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec("probe/copy", self.num_agents, 1, self.num_actions, self.time_limit)

    @property
    def optimal_return(self) -> float:
        return (self.time_limit - 1) * (1 - 1 / self.num_actions)

    @property
    def independent_return(self) -> float:
        """Expected return of the best policy whose agents choose independently."""
        return (self.time_limit - 1) / 4

    @property
    def random_return(self) -> float:
        return self.optimal_return / self.num_actions

    def reset(self, key: Key[Array, ""]) -> tuple[CopyState, TimeStep]:
        del key
        state = CopyState(spent=jnp.full((), -1, jnp.int32), step_count=jnp.zeros((), jnp.int32))
        return state, restart(self._blank())

    def step(
        self, state: CopyState, action: Int[Array, "N"], key: Key[Array, ""]
    ) -> tuple[CopyState, TimeStep]:
        del key
        pays = (state.step_count > 0) & (action[0] != state.spent)
        reward = pays * (action[1:] == action[0]).mean()
        state = CopyState(spent=action[0].astype(jnp.int32), step_count=state.step_count + 1)
        return state, transition(
            self._blank(), reward, truncated=state.step_count >= self.time_limit
        )


@dataclass(frozen=True)
class Matrix(Probe):
    """A coordination game of one step: 1 if all agents choose action 0, 0.6 if none does, else 0.

    Probes coordination against a broad second-best optimum. While the others explore, action 0
    looks worse than the rest, and agents that learn independently from uniform play (3 actions, 2
    agents) climb to `trap_return`: the gradient of p² + 0.6 (1 − p)² in the probability p of action
    0 points down below p = 3/8. An agent that sees the earlier agents' choices learns the best
    reply to action 0 first.
    """

    num_agents: int = 2
    num_actions: int = 3

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec("probe/matrix", self.num_agents, 1, self.num_actions, time_limit=1)

    @property
    def optimal_return(self) -> float:
        return 1.0

    @property
    def trap_return(self) -> float:
        """Return at the second-best optimum."""
        return 0.6

    @property
    def random_return(self) -> float:
        p = 1 / self.num_actions
        return p**self.num_agents + self.trap_return * (1 - p) ** self.num_agents

    def reset(self, key: Key[Array, ""]) -> tuple[EnvState, TimeStep]:
        del key
        return (), restart(self._blank())

    def step(
        self, state: EnvState, action: Int[Array, "N"], key: Key[Array, ""]
    ) -> tuple[EnvState, TimeStep]:
        del key
        reward = 1.0 * (action == 0).all() + self.trap_return * (action != 0).all()
        return state, transition(self._blank(), reward, terminated=True)


class TargetState(eqx.Module):
    """The point each agent is to name, and how far the episode has come."""

    target: Float[Array, "N A"]
    step_count: Int[Array, ""]


@dataclass(frozen=True)
class Target(Probe):
    """`Identity` with continuous actions: each agent sees a point in [−1, 1]^A and is to name it.

    The reward is 1 minus the distance |action − target|, averaged over components and agents. A
    random action is uniform here, at a mean distance of 2/3.
    """

    num_agents: int = 3
    num_actions: int = 2
    time_limit: int = 8

    @property
    def spec(self) -> EnvSpec:
        sizes = (self.num_agents, self.num_actions, self.num_actions, self.time_limit)
        return EnvSpec("probe/target", *sizes, continuous=True)

    @property
    def optimal_return(self) -> float:
        return float(self.time_limit)

    @property
    def random_return(self) -> float:
        return self.time_limit / 3

    def reset(self, key: Key[Array, ""]) -> tuple[TargetState, TimeStep]:
        state = TargetState(self._draw_target(key), step_count=jnp.zeros((), jnp.int32))
        return state, restart(self._observe(state.target))

    def step(
        self, state: TargetState, action: Float[Array, "N A"], key: Key[Array, ""]
    ) -> tuple[TargetState, TimeStep]:
        reward = 1 - jnp.abs(action - state.target).mean()
        state = TargetState(self._draw_target(key), state.step_count + 1)
        return state, transition(
            self._observe(state.target), reward, truncated=state.step_count >= self.time_limit
        )

    def _draw_target(self, key: Key[Array, ""]) -> Float[Array, "N A"]:
        return jax.random.uniform(key, (self.num_agents, self.num_actions), minval=-1.0, maxval=1.0)


@dataclass(frozen=True)
class Components(Probe):
    """`Identity` with several choices at once: agents see a cue for each component of an action.

    The reward is the fraction of agents that answer all of theirs, so a component that is mixed up
    with another, or left to chance, costs its share.
    """

    num_agents: int = 3
    sizes: tuple[int, ...] = (3, 2)
    time_limit: int = 8

    @property
    def spec(self) -> EnvSpec:
        sizes = (self.num_agents, sum(self.sizes), sum(self.sizes), self.time_limit)
        return EnvSpec("probe/components", *sizes, action_components=self.sizes)

    @property
    def optimal_return(self) -> float:
        return float(self.time_limit)

    @property
    def random_return(self) -> float:
        return self.time_limit / math.prod(self.sizes)

    def reset(self, key: Key[Array, ""]) -> tuple[CueState, TimeStep]:
        state = CueState(self._draw_cue(key), step_count=jnp.zeros((), jnp.int32))
        return state, restart(self._view(state))

    def step(
        self, state: CueState, action: Int[Array, "N K"], key: Key[Array, ""]
    ) -> tuple[CueState, TimeStep]:
        reward = (action == state.cue).all(axis=-1).mean()
        state = CueState(self._draw_cue(key), state.step_count + 1)
        return state, transition(
            self._view(state), reward, truncated=state.step_count >= self.time_limit
        )

    def _draw_cue(self, key: Key[Array, ""]) -> Int[Array, "N K"]:
        return jax.random.randint(key, (self.num_agents, len(self.sizes)), 0, jnp.array(self.sizes))

    def _view(self, state: CueState) -> Observation:
        cues = [jax.nn.one_hot(state.cue[:, k], size) for k, size in enumerate(self.sizes)]
        return self._observe(jnp.concatenate(cues, axis=1))


class RecallState(eqx.Module):
    """The keys that agents hold and are asked for, and how far the episode has come."""

    own_key: Int[Array, "N"]
    asked_key: Int[Array, "N"]
    value: Int[Array, "N"]
    step_count: Int[Array, ""]


@dataclass(frozen=True)
class Recall(Probe):
    """Every agent has a key and a value, and must name the value of the agent with another key.

    Keys are a permutation of N, values are independent, one of A, and an agent is asked for a key
    that is not its own; all three it sees, one-hot, and all are new at every step. The reward is
    the fraction of agents that answer rightly. Probes mixing: what an agent needs is in the view of
    one other, which is known by its content and not by its place. Agents that see nothing of each
    other's views earn as much as random actions, `random_return`: others' values are independent of
    what they see.
    """

    num_agents: int = 4
    num_actions: int = 4
    time_limit: int = 8

    @property
    def spec(self) -> EnvSpec:
        name, obs_dim = f"probe/recall-{self.num_agents}", 2 * self.num_agents + self.num_actions
        return EnvSpec(name, self.num_agents, obs_dim, self.num_actions, self.time_limit)

    @property
    def optimal_return(self) -> float:
        return float(self.time_limit)

    @property
    def random_return(self) -> float:
        return self.time_limit / self.num_actions

    def reset(self, key: Key[Array, ""]) -> tuple[RecallState, TimeStep]:
        state = self._draw(key, step_count=jnp.zeros((), jnp.int32))
        return state, restart(self._view(state))

    def step(
        self, state: RecallState, action: Int[Array, "N"], key: Key[Array, ""]
    ) -> tuple[RecallState, TimeStep]:
        holder = jnp.argsort(state.own_key)[state.asked_key]
        reward = (action == state.value[holder]).mean()
        state = self._draw(key, state.step_count + 1)
        return state, transition(
            self._view(state), reward, truncated=state.step_count >= self.time_limit
        )

    def _draw(self, key: Key[Array, ""], step_count: Int[Array, ""]) -> RecallState:
        own_key, asked_key, value_key = jax.random.split(key, 3)
        own = jax.random.permutation(own_key, self.num_agents)
        further = jax.random.randint(asked_key, (self.num_agents,), 1, self.num_agents)
        asked = (own + further) % self.num_agents
        return RecallState(own, asked, self._draw_cue(value_key), step_count)

    def _view(self, state: RecallState) -> Observation:
        keys = [jax.nn.one_hot(key, self.num_agents) for key in (state.own_key, state.asked_key)]
        value = jax.nn.one_hot(state.value, self.num_actions)
        return self._observe(jnp.concatenate([*keys, value], axis=1))


class ChannelsState(eqx.Module):
    """Which channels each agent can use, and how far the episode has come."""

    usable: Bool[Array, "N N"]
    step_count: Int[Array, ""]


@dataclass(frozen=True)
class Channels(Probe):
    """N agents share N channels: each takes one of its few, and needs one that nobody else takes.

    A random permutation says which channel an agent has for certain; it has `num_usable` − 1
    others, drawn uniformly. All are new at every step; an agent sees its own, and no others are
    legal. An agent earns 1 if it is alone on its channel. There is always an assignment in which
    all are. Probes contention, as of vehicles for requests or robots for
    shelves: what an agent should do depends on what the others see and, where several assignments
    are as good, on which of them they choose. With u = `num_usable` and q = (u − 1) / (N − 1), the
    probability that an agent has another's certain channel, too, random choices earn T times

        (1 − q/u)^(N−1) / u + (1 − 1/u)² (1 − q/u)^(N−2),

    the first for an agent's certain channel, the second for its others, each of which is somebody
    else's certain one.
    """

    num_agents: int = 8
    num_usable: int = 3
    time_limit: int = 8

    @property
    def spec(self) -> EnvSpec:
        n = self.num_agents
        return EnvSpec(f"probe/channels-{n}", n, n, n, self.time_limit, team_reward=False)

    @property
    def optimal_return(self) -> float:
        return float(self.time_limit)

    @property
    def random_return(self) -> float:
        n, u = self.num_agents, self.num_usable
        free = 1 - (u - 1) / (n - 1) / u
        return self.time_limit * (free ** (n - 1) / u + (1 - 1 / u) ** 2 * free ** (n - 2))

    def reset(self, key: Key[Array, ""]) -> tuple[ChannelsState, TimeStep]:
        state = self._draw(key, step_count=jnp.zeros((), jnp.int32))
        return state, restart(self._view(state))

    def step(
        self, state: ChannelsState, action: Int[Array, "N"], key: Key[Array, ""]
    ) -> tuple[ChannelsState, TimeStep]:
        alone = jnp.bincount(action, length=self.num_agents)[action] == 1
        state = self._draw(key, state.step_count + 1)
        truncated = state.step_count >= self.time_limit
        return state, transition(self._view(state), alone.astype(jnp.float32), truncated=truncated)

    def _view(self, state: ChannelsState) -> Observation:
        observation = self._observe(state.usable.astype(jnp.float32))
        return replace(observation, action_mask=state.usable)

    def _draw(self, key: Key[Array, ""], step_count: Int[Array, ""]) -> ChannelsState:
        certain_key, others_key = jax.random.split(key)
        agents = jnp.arange(self.num_agents)
        certain = jax.random.permutation(certain_key, self.num_agents)
        rank = jax.random.uniform(others_key, (self.num_agents, self.num_agents))
        rank = rank.at[agents, certain].set(1.0)  # above all others
        chosen = jax.lax.top_k(rank, self.num_usable)[1]
        usable = jnp.zeros(rank.shape, bool).at[agents[:, None], chosen].set(True)
        return ChannelsState(usable, step_count)


PROBES: dict[str, Callable[[], Probe]] = {
    "identity": Identity,
    "copy": Copy,
    "matrix": Matrix,
    "memory": Memory,
    "target": Target,
    "components": Components,
    "tmaze-10": TMaze,
    "tmaze-50": partial(TMaze, length=50),
    "tmaze-100": partial(TMaze, length=100),
    "convention": Convention,
    "recall-4": Recall,
    "recall-8": partial(Recall, num_agents=8),
    "recall-16": partial(Recall, num_agents=16),
    "channels-8": Channels,
    "channels-16": partial(Channels, num_agents=16),
    "channels-32": partial(Channels, num_agents=32),
}


def make_probe(task: str) -> Probe:
    """Make a task of `PROBES`."""
    return PROBES[task]()
