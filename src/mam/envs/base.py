"""What every adapter shares: how time steps are put together."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mam.types import Observation, TimeStep


def restart(observation: Observation) -> TimeStep:
    """Returns the first time step of an episode: no reward, not ended."""
    return transition(observation, jnp.zeros(()))


def transition(
    observation: Observation,
    team_reward: Float[Array, ""],
    *,
    terminated: Bool[Array, ""] | bool = False,
    truncated: Bool[Array, ""] | bool = False,
) -> TimeStep:
    """Returns the time step after a joint action; every agent receives the whole team reward."""
    num_agents = observation.alive.shape[0]
    return TimeStep(
        observation=observation,
        reward=jnp.full(num_agents, team_reward, jnp.float32),
        terminated=jnp.asarray(terminated),
        truncated=jnp.asarray(truncated),
        final_observation=observation,
        metrics={},
    )
