"""Acting in a batch of environments: policy × environment → transitions [T, B, …]."""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
from jax import lax
from jaxtyping import Bool, Key

from mam.learning.sharding import WHOLE, Shard
from mam.types import Action, Array, EnvState, Memory, Observation, Policy, TimeStep, Transition


@runtime_checkable
class BatchedEnvironment(Protocol):
    """Environments side by side that reset themselves, such as `mam.envs.wrappers.AutoReset`."""

    @property
    def num_envs(self) -> int: ...

    def reset(self, key: Key[Array, ""]) -> tuple[EnvState, TimeStep]: ...
    def step(self, state: EnvState, action: Action, key: Key[Array, ""]) -> tuple[EnvState, TimeStep]: ...


class Actors(eqx.Module):
    """Where acting stands: what the next step needs, besides a policy and a key."""

    env_state: EnvState
    observation: Observation  # to act on, [B, N, …]
    reset: Bool[Array, "*batch"]  # the observation is the first of its episode
    memory: Memory


def init_actors(env: BatchedEnvironment, policy: Policy, key: Key[Array, ""]) -> Actors:
    """Starts an episode in every environment."""
    env_state, timestep = env.reset(key)
    return Actors(
        env_state=env_state,
        observation=timestep.observation,
        reset=~timestep.ended,
        memory=policy.init_memory((env.num_envs,)),
    )


def rollout(
    env: BatchedEnvironment, policy: Policy, actors: Actors, key: Key[Array, ""], length: int, shard: Shard = WHOLE
) -> tuple[Actors, Transition]:
    """Takes `length` steps in every environment (of the share of this device) with sampled actions.

    Returns:
        The actors after the last step, and the transitions, time first: [T, B, …].
    """

    def step(actors: Actors, key: Key[Array, ""]):
        act_key, env_key = jax.random.split(key)
        act_keys = shard.part(jax.random.split(act_key, env.num_envs * shard.num_shards))
        memory, output = policy.act(actors.memory, actors.observation, actors.reset, act_keys)
        env_state, timestep = env.step(actors.env_state, output.action, env_key)
        transition = Transition(
            observation=actors.observation,
            reset=actors.reset,
            memory=actors.memory,
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
        actors = Actors(env_state=env_state, observation=timestep.observation, reset=timestep.ended, memory=memory)
        return actors, transition

    return lax.scan(step, actors, jax.random.split(key, length))
