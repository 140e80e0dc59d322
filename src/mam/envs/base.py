"""What every adapter shares: how time steps and states are put together."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mam.types import EnvState, Observation, TimeStep

Metrics = dict[str, Float[Array, ""]]


def restart(observation: Observation, metrics: Metrics | None = None) -> TimeStep:
    """Return the first time step of an episode: no reward, not ended."""
    return transition(observation, jnp.zeros(()), metrics=metrics)


def transition(
    observation: Observation,
    reward: Float[Array, ""] | Float[Array, "N"],
    *,
    terminated: Bool[Array, ""] | bool = False,
    truncated: Bool[Array, ""] | bool = False,
    metrics: Metrics | None = None,
) -> TimeStep:
    """Return the time step after a joint action; a scalar reward is paid to every agent."""
    return TimeStep(
        observation=observation,
        reward=jnp.broadcast_to(jnp.asarray(reward, jnp.float32), observation.alive.shape),
        terminated=jnp.asarray(terminated),
        truncated=jnp.asarray(truncated),
        final_observation=observation,
        metrics=metrics or {},
    )


def strongly_typed(state: EnvState) -> EnvState:
    """Return a state without weak types.

    Where a suite's reset gives Python's numbers and its step does not, every jitted loop would
    compile twice.
    """

    def typed(leaf: Any) -> Any:
        kind = jnp.result_type(leaf)
        return leaf if jnp.issubdtype(kind, jax.dtypes.prng_key) else jnp.asarray(leaf, kind)

    return jax.tree.map(typed, state)
