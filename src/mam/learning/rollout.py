"""Acting in a batch of environments: policy × environment → rollout [T, B, …]."""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
from jax import lax
from jaxtyping import Bool, Key

from mam.learning.sharding import WHOLE, Shard
from mam.types import (
    Action,
    Array,
    EnvState,
    Memory,
    Observation,
    Policy,
    PolicyOutput,
    TimeStep,
    Transition,
)


@runtime_checkable
class BatchedEnvironment(Protocol):
    """Environments side by side that reset themselves, such as `mam.envs.wrappers.AutoReset`."""

    @property
    def num_envs(self) -> int: ...

    def reset(self, key: Key[Array, ""]) -> tuple[EnvState, TimeStep]:
        """Start an episode in every environment, each with a key drawn from this one."""
        ...

    def step(
        self, state: EnvState, action: Action, key: Key[Array, ""]
    ) -> tuple[EnvState, TimeStep]:
        """Apply joint actions, and begin new episodes where the old ones ended.

        Args:
            state: of all environments, as `reset` or the last step returned it.
            action: of every environment, [B, N], [B, N, K] or, if continuous, [B, N, A].
            key: decides everything random, new episodes among it.

        Returns:
            The state after it and what it led to, [B, …]: `observation` is what to act on next, of
            the new episode where one began, and `final_observation` the old one's last.
        """
        ...


class RolloutState(eqx.Module):
    """The carry of the rollout: what the next step needs, besides a policy and a key."""

    env_state: EnvState
    observation: Observation  # to act on, [B, N, …]
    reset: Bool[Array, "*batch"]  # the observation is the first of its episode
    memory: Memory


class Rollout(eqx.Module):
    """Transitions, a policy's or recorded ones, and all that learning needs beside them."""

    transitions: Transition  # [T, B, …]
    memory: Memory  # before the first step of each sequence, [T / L, B, …]
    final_alive: Bool[Array, "*batch N"]  # which agents live after the last step, [B, N]


def init_rollout_state(
    env: BatchedEnvironment, policy: Policy, key: Key[Array, ""]
) -> RolloutState:
    """Start an episode in every environment.

    Args:
        env: the environments, B of them.
        policy: says what memory is before the first step.
        key: decides how episodes start.
    """
    env_state, timestep = env.reset(key)
    return RolloutState(
        env_state=env_state,
        observation=timestep.observation,
        reset=~timestep.ended,
        memory=policy.init_memory((env.num_envs,)),
    )


def rollout(
    env: BatchedEnvironment,
    policy: Policy,
    state: RolloutState,
    key: Key[Array, ""],
    length: int,
    shard: Shard = WHOLE,
    sequence_length: int | None = None,
) -> tuple[RolloutState, Rollout]:
    """Take `length` steps in every environment of this device with sampled actions.

    Args:
        env: the environments, B of them.
        policy: acts in all of them.
        state: where the last rollout ended.
        key: decides everything random.
        length: T.
        shard: where environments lie on several devices, this one's share.
        sequence_length: L, a divisor of T: memory is kept before every L-th step; T if None.

    Returns:
        The state after the last step, and what happened, time first.
    """
    sequence_length = sequence_length or length

    def step(state: RolloutState, key: Key[Array, ""]) -> tuple[RolloutState, Transition]:
        act_key, env_key = jax.random.split(key)
        act_keys = shard.local_slice(jax.random.split(act_key, env.num_envs * shard.num_shards))
        memory, output = policy.act(state.memory, state.observation, state.reset, act_keys)
        env_state, timestep = env.step(state.env_state, output.action, env_key)
        transition = make_transition(state, output, timestep)
        return next_state(timestep, memory, env_state), transition

    def sequence(
        state: RolloutState, keys: Key[Array, "L"]
    ) -> tuple[RolloutState, tuple[Memory, Transition]]:
        last, transitions = lax.scan(step, state, keys)
        return last, (state.memory, transitions)

    keys = jax.random.split(key, length)
    if sequence_length == length:
        last, (memory, transitions) = sequence(state, keys)
        memory = jax.tree.map(lambda x: x[None], memory)
    else:
        last, (memory, transitions) = lax.scan(sequence, state, keys.reshape(-1, sequence_length))
        transitions = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), transitions)
    return last, Rollout(transitions, memory, last.observation.alive)


def make_transition(state: RolloutState, output: PolicyOutput, timestep: TimeStep) -> Transition:
    """Put together one step.

    Args:
        state: what was seen at t.
        output: what was done at t.
        timestep: what that led to, at t + 1.
    """
    return Transition(
        observation=state.observation,
        reset=state.reset,
        action=output.action,
        log_prob=output.log_prob,
        value=output.value,
        order=output.order,
        reward=timestep.reward,
        terminated=timestep.terminated,
        truncated=timestep.truncated,
        final_observation=timestep.final_observation,
        metrics=timestep.metrics,
        policy_metrics=output.metrics,
    )


def next_state(timestep: TimeStep, memory: Memory, env_state: EnvState = ()) -> RolloutState:
    """Return the state after a step.

    Args:
        timestep: what the step led to.
        memory: after it.
        env_state: after it; () of external environments.
    """
    return RolloutState(env_state, timestep.observation, reset=timestep.ended, memory=memory)
