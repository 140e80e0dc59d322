"""Acting in external environments: they run in worker processes, the policy on the device.

The counterparts of `rollout` and `evaluate`, as loops in Python. All seeds act in one call: arrays
are [seeds, B, …], and the environments of all seeds stand side by side in one
`ExternalEnvironments`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, PyTree

from mam.config import EvalConfig
from mam.envs.external.shared import INFO, mean_of_said
from mam.learning.evaluate import AGENT_RETURN, UNFINISHED
from mam.learning.rollout import Rollout, RolloutState, make_transition, next_state
from mam.learning.stopwatch import Stopwatch
from mam.types import (
    EnvSpec,
    ExternalEnvironments,
    Memory,
    Observation,
    Policy,
    PolicyOutput,
    TimeStep,
    Transition,
)

LAST_STEP = 2**31 - 1  # which no run reaches


@jax.jit
@partial(jax.vmap, in_axes=(0, 0, 0, None, None))
def act(
    policy: Policy,
    state: RolloutState,
    key: Key[Array, ""],
    step: Int[Array, ""],
    greedy: Bool[Array, ""],
) -> tuple[Memory, PolicyOutput]:
    """Act for all seeds at step t, each environment with a key of its own.

    Args:
        policy: [seeds].
        state: what is acted on, [seeds, B, …].
        key: [seeds].
        step: t, the same for all.
        greedy: take the most likely actions instead of sampling.

    Returns:
        What `policy.act` returns, [seeds, B, …].
    """
    keys = jax.random.split(jax.random.fold_in(key, step), state.reset.shape[0])
    return policy.act(state.memory, state.observation, state.reset, keys, greedy=greedy)


@dataclass(frozen=True)
class Timed:
    """Environments whose resets and steps a stopwatch counts."""

    envs: ExternalEnvironments
    clock: Stopwatch

    @property
    def spec(self) -> EnvSpec:
        return self.envs.spec

    @property
    def num_envs(self) -> int:
        return self.envs.num_envs

    @property
    def lost(self) -> Bool[np.ndarray, "B"]:
        return self.envs.lost

    def reset(self, seed: int) -> TimeStep:
        with self.clock.part("environment"):
            return self.envs.reset(seed)

    def step(self, action: np.ndarray) -> TimeStep:
        with self.clock.part("environment"):
            return self.envs.step(action)

    def close(self) -> None:
        self.envs.close()


def blank_state(policy: Policy, spec: EnvSpec, num_envs: int) -> RolloutState:
    """Return a state of the right shapes, before there is an episode.

    Args:
        policy: of one seed.
        spec: of the task.
        num_envs: B.
    """
    n, dtype = spec.num_agents, jax.dtypes.canonicalize_dtype(spec.grid_dtype)
    observation = Observation(
        agents_view=jnp.zeros((num_envs, n, spec.obs_dim)),
        action_mask=jnp.ones((num_envs, n, spec.num_actions), bool),
        alive=jnp.ones((num_envs, n), bool),
        grid=None if spec.grid_shape is None else jnp.zeros((num_envs, n, *spec.grid_shape), dtype),
        state=None if spec.state_dim is None else jnp.zeros((num_envs, spec.state_dim)),
        positions=None
        if spec.position_dim is None
        else jnp.zeros((num_envs, n, spec.position_dim)),
    )
    reset = jnp.ones(num_envs, bool)
    return RolloutState(
        env_state=(), observation=observation, reset=reset, memory=policy.init_memory((num_envs,))
    )


def start_episodes(
    envs: ExternalEnvironments, memory: Memory, num_seeds: int, seed: int
) -> tuple[RolloutState, TimeStep]:
    """Start an episode in every environment.

    Args:
        envs: those of all seeds.
        memory: that before any step, [seeds, B, …].
        num_seeds: how many seeds share the environments.
        seed: decides the episodes.

    Returns:
        What is acted on next, and the time step it comes from, [seeds, B, …].
    """
    timestep = _by_seed(envs.reset(seed), num_seeds)
    reset = np.ones_like(timestep.terminated)
    return RolloutState(
        env_state=(), observation=timestep.observation, reset=reset, memory=memory
    ), timestep


def external_rollout(
    envs: ExternalEnvironments,
    policy: Policy,
    state: RolloutState,
    key: Key[Array, "seeds"],
    length: int,
    sequence_length: int | None = None,
) -> tuple[RolloutState, Rollout]:
    """Take `length` steps in every environment with sampled actions.

    Args:
        envs: those of all seeds.
        policy: acts in all of them, [seeds].
        state: where the last rollout ended, [seeds, B, …].
        key: decides what is sampled, [seeds].
        length: T.
        sequence_length: L, a divisor of T: memory is kept before every L-th step; T if None.

    Returns:
        The state after the last step, and what happened, [seeds, T, B, …], as NumPy arrays.
    """
    transitions, memories = [], []
    for step in range(length):
        if step % (sequence_length or length) == 0:
            memories.append(jax.device_get(state.memory))
        memory, output, timestep = _step(envs, policy, state, key, step)
        transitions.append(make_transition(state, output, timestep))
        state = next_state(timestep, memory)
    metrics = aligned([step.metrics for step in transitions])
    steps = [
        replace(step, metrics=values) for step, values in zip(transitions, metrics, strict=True)
    ]
    memory, transitions = (
        jax.tree.map(lambda *x: np.stack(x, axis=1), *trees) for trees in (memories, steps)
    )
    return state, Rollout(transitions, memory, state.observation.alive)


def aligned(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the same metrics with all names in each: NaN where a name had not come up yet."""
    names = dict.fromkeys(name for one in metrics for name in one)
    blank = [np.full_like(one["episode_return"], np.nan) for one in metrics]
    return [
        {name: one.get(name, nan) for name in names}
        for one, nan in zip(metrics, blank, strict=True)
    ]


def take_infos(transitions: Transition) -> tuple[Transition, dict[str, np.ndarray]]:
    """Take the metrics that environments made of infos out of a rollout [seeds, T, B].

    Their names come up one by one, and for each of them the update would be compiled anew.

    Returns:
        The transitions without them, and their means over the episodes that ended, [seeds]; NaN if
        none did.
    """
    infos = {name: x for name, x in transitions.metrics.items() if name.startswith(INFO)}
    rest = {name: x for name, x in transitions.metrics.items() if name not in infos}
    means = {name: mean_of_said(np.asarray(x)) for name, x in infos.items()}
    return replace(transitions, metrics=rest), means


def external_evaluate(
    envs: ExternalEnvironments,
    policy: Policy,
    memory: Memory,
    key: Key[Array, "seeds"],
    num_episodes: int,
    *,
    greedy: bool = False,
    max_steps: int = EvalConfig.max_episode_steps,
) -> dict[str, np.ndarray]:
    """Play `num_episodes` episodes per seed, in rounds of as many as there are environments.

    Each environment plays one episode a round, so short episodes do not count for more than long
    ones; where its process was lost it plays another.

    Args:
        envs: those of all seeds.
        policy: [seeds].
        memory: that before any step, [seeds, B, …].
        key: decides everything random, [seeds].
        num_episodes: M, per seed.
        greedy: take the most likely actions instead of sampling.
        max_steps: steps after which an episode that has not ended is cut off.

    Returns:
        The environments' metrics at the end of each episode, or after `max_steps`, and UNFINISHED,
        [seeds, M]; where rewards are not a team's, AGENT_RETURN, [seeds, M, N].
    """
    num_seeds = key.shape[0]
    per_round = envs.num_envs // num_seeds
    rounds, step = [], 0
    for first in range(0, num_episodes, per_round):
        state, timestep = start_episodes(envs, memory, num_seeds, seed=first + seed_of(key))
        over, metrics, agent_return = (
            timestep.ended,
            timestep.metrics,
            np.zeros_like(timestep.reward),
        )
        last = step + max_steps
        while not over.all() and step < last:
            after, _, timestep = _step(envs, policy, state, key, step, greedy)
            before, now = aligned([metrics, timestep.metrics])
            metrics = {name: np.where(over, before[name], value) for name, value in now.items()}
            agent_return += np.where(over[..., None], np.float32(0), timestep.reward)
            again = _by_seed(envs.lost, num_seeds) & ~over
            agent_return[again] = 0
            over = over | (timestep.ended & ~again)
            state = next_state(timestep, after)
            step += 1
        own = {} if envs.spec.team_reward else {AGENT_RETURN: agent_return}
        rounds.append(metrics | {UNFINISHED: np.where(over, np.float32(0), np.float32(1))} | own)
    rounds = aligned(rounds)
    return {
        name: np.concatenate([r[name] for r in rounds], axis=1)[:, :num_episodes]
        for name in rounds[0]
    }


def seed_of(key: Key[Array, "..."]) -> int:
    """Return a seed for external environments from the first key.

    It is drawn at LAST_STEP, because acting at step t uses `fold_in(key, t)`.
    """
    return int(jax.random.bits(jax.random.fold_in(key.reshape(-1)[0], LAST_STEP)))


def _step(
    envs: ExternalEnvironments,
    policy: Policy,
    state: RolloutState,
    key: Key[Array, "seeds"],
    step: int,
    greedy: bool = False,
) -> tuple[Memory, PolicyOutput, TimeStep]:
    """Take one step of the policy and of every environment."""
    memory, output = act(policy, state, key, step, greedy)
    output = jax.device_get(output)
    action = output.action.reshape(envs.num_envs, *output.action.shape[2:])
    return memory, output, _by_seed(envs.step(action), key.shape[0])


def _by_seed(tree: PyTree, num_seeds: int) -> PyTree:
    """Split the first axis: [seeds · B, …] → [seeds, B, …]."""
    return jax.tree.map(lambda x: x.reshape(num_seeds, -1, *x.shape[1:]), tree)
