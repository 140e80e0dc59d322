"""Generalised advantage estimation on plain arrays."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from mam.learning.sharding import WHOLE, Shard


class Advantages(eqx.Module):
    """Advantages and value targets, in units of reward."""

    advantage: Float[Array, "T *batch"]
    target: Float[Array, "T *batch"]  # of the value: advantage + value


def impute_dead_values(
    value: Float[Array, "*batch N"], alive: Bool[Array, "*batch N"], *, team_reward: bool
) -> Float[Array, "*batch N"]:
    """Replace the values of dead agents, of which the critic knows nothing.

    Args:
        value: v(s_t), per agent.
        alive: agents whose values stay.
        team_reward: a team's reward goes on after a member's death, and is partly of its making:
            the dead take the mean value of the living (0 if there are none). Where rewards are the
            agents' own, death ends them: the value is 0.
    """
    if not team_reward:
        return jnp.where(alive, value, 0.0)
    total = jnp.sum(jnp.where(alive, value, 0.0), axis=-1, keepdims=True)
    return jnp.where(alive, value, total / jnp.maximum(alive.sum(axis=-1, keepdims=True), 1))


def constant_value(
    reward: Float[Array, "T *batch"],
    terminated: Bool[Array, "T *#batch"],
    alive: Bool[Array, "T *batch"],
    *,
    gamma: float,
    shard: Shard = WHOLE,
) -> Float[Array, ""]:
    """Return the best constant value, c = E[r] / E[1 − γ (1 − terminated)] over living agents.

    It solves c = E[r + γ (1 − terminated) c]. Where values start there, a constant in all rewards
    need not be learned over many times 1 / (1 − γ) steps (Naik et al. 2024, arXiv 2405.09999, on
    such offsets).

    Args:
        reward: r_{t+1}, of the action at t.
        terminated: the action at t ended the task.
        alive: agents that count.
        gamma: discount per step.
        shard: where the rollout lies on several devices, this one's share.

    Returns:
        The constant; 0 where nothing ends and γ = 1.
    """
    lost = jnp.where(terminated, 1.0, 1.0 - gamma)
    total, rate = (shard.sum(jnp.sum(jnp.where(alive, x, 0.0))) for x in (reward, lost))
    return jnp.where(rate > 0, total / jnp.where(rate > 0, rate, 1.0), 0.0)


def generalised_advantages(
    reward: Float[Array, "T *batch"],
    value: Float[Array, "T *batch"],
    next_value: Float[Array, "T *batch"],
    terminated: Bool[Array, "T *#batch"],
    truncated: Bool[Array, "T *#batch"],
    *,
    gamma: float,
    gae_lambda: float,
) -> Advantages:
    """Estimate advantages by GAE(λ) in which a time limit is no termination.

        δ_t = r_{t+1} + γ (1 − terminated_{t+1}) v(s'_{t+1}) − v(s_t)
        Â_t = δ_t + γ λ (1 − terminated_{t+1}) (1 − truncated_{t+1}) Â_{t+1}

    Args:
        reward: r_{t+1}, of the action at t.
        value: v(s_t).
        next_value: v(s'_{t+1}), of the true successor even where the environment has reset itself
            since.
        terminated: the action at t ended the task.
        truncated: the action at t was the last one before a cut.
        gamma: discount per step.
        gae_lambda: λ in [0, 1].

    Returns:
        Advantages and value targets.

    Source: Schulman et al. 2016 (arXiv 1506.02438), eq. 16; truncation after Pardo et al. 2018
    (arXiv 1712.00378).
    """
    delta = reward + gamma * jnp.where(terminated, 0.0, next_value) - value
    carry_on = jnp.where(terminated | truncated, 0.0, gamma * gae_lambda)

    def step(advantage, inputs):
        delta, carry_on = inputs
        # What the dead earn later, NaN even, is nothing to the living before.
        advantage = delta + jnp.where(carry_on > 0, carry_on * advantage, 0.0)
        return advantage, advantage

    carry_on = jnp.broadcast_to(carry_on, delta.shape)
    _, advantage = lax.scan(step, jnp.zeros_like(value[0]), (delta, carry_on), reverse=True)
    return Advantages(advantage=advantage, target=advantage + value)
