"""Values, advantages and value targets of a rollout, in units of reward."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mam.config import PPOConfig
from mam.learning.advantages import (
    Advantages,
    constant_value,
    generalised_advantages,
    impute_dead_values,
)
from mam.learning.normalise import NormalisedPolicy
from mam.learning.rollout import Rollout
from mam.learning.sharding import WHOLE, Shard
from mam.types import EnvSpec, Transition


def estimate(
    policy: NormalisedPolicy,
    rollout: Rollout,
    spec: EnvSpec,
    config: PPOConfig,
    shard: Shard = WHOLE,
) -> tuple[Transition, Advantages]:
    """Estimate advantages of a rollout, with GAE in which the dead's values are replaced.

    Args:
        policy: its critic values the states, and their true successors.
        rollout: [T, B, …].
        spec: says whose rewards end with an agent's death.
        config: discount and λ.
        shard: where the rollout lies on several devices, this one's share.

    Returns:
        The transitions with values of their observations, and the estimates, [T, B, N]; 0 for the
        dead, whose rewards may be NaN: masked out of a loss, that would still be in its gradients.
    """
    transitions = rollout.transitions
    value, next_value = _values(policy, rollout, spec, config, shard)
    seen, reached = transitions.observation.alive, transitions.final_observation.alive
    # An agent that was not truncated alone goes on.
    goes_on = jnp.concatenate([seen[1:], rollout.final_alive[None]])
    team_reward = spec.team_reward
    estimates = generalised_advantages(
        transitions.reward,
        impute_dead_values(value, seen, team_reward=team_reward),
        impute_dead_values(next_value, reached, team_reward=team_reward),
        _terminated(transitions, spec),
        transitions.truncated[..., None] | (reached & ~goes_on),
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
    )
    living = jax.tree.map(lambda x: jnp.where(seen, x, 0.0), estimates)
    return replace(transitions, value=value), living


def _values(
    policy: NormalisedPolicy, rollout: Rollout, spec: EnvSpec, config: PPOConfig, shard: Shard
) -> tuple[Float[Array, "T B N"], Float[Array, "T B N"]]:
    """Return the values of what was observed and of its true successors.

    Values that are normalised start, at the first rollout, as the best constant.
    """
    steps, memory = rollout.transitions, jax.tree.map(lambda x: x[0], rollout.memory)
    value, seen = steps.value, steps.observation
    if value is None:
        value = policy.evaluate(memory, seen, steps.action, steps.order, steps.reset).value
    next_value = policy.successor_values(
        memory, seen, steps.action, steps.reset, steps.final_observation
    )
    if policy.statistics.values is None:
        return value, next_value
    terminated = _terminated(steps, spec)
    start = constant_value(steps.reward, terminated, seen.alive, gamma=config.gamma, shard=shard)
    known = policy.statistics.values.count > 0
    return jnp.where(known, value, start), jnp.where(known, next_value, start)


def _terminated(transitions: Transition, spec: EnvSpec) -> Bool[Array, "T B #N"]:
    """Say for which agents the action was the last: death ends an own reward, not a team's."""
    terminated = transitions.terminated[..., None]
    return terminated if spec.team_reward else terminated | ~transitions.final_observation.alive
