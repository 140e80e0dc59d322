"""Your own environment: traffic lights in a row that let through what their neighbours send them.

mam check-env examples.traffic:make_env
mam train --env examples.traffic:make_env --total-timesteps 300000
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp

from mam.envs.base import restart, transition
from mam.types import Environment, EnvSpec, Observation


class TrafficState(eqx.Module):
    """Any pytree will do."""

    queue: jax.Array  # cars waiting to go along the road and across it, [N, 2]
    step_count: jax.Array


@dataclass(frozen=True)
class Traffic(Environment):
    """Each light is green along the road (action 0) or across it (action 1).

    Cars along the road visit every light.
    """

    num_lights: int = 4
    time_limit: int = 40

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec(
            "examples/traffic",
            self.num_lights,
            obs_dim=4,
            num_actions=2,
            time_limit=self.time_limit,
        )

    def reset(self, key):
        queue = jax.random.randint(key, (self.num_lights, 2), 0, 5)
        state = TrafficState(queue, step_count=jnp.zeros((), jnp.int32))
        return state, restart(self._observe(state))

    def step(self, state, action, key):
        green = jnp.stack([action == 0, action == 1], axis=1)
        leaving = jnp.minimum(state.queue, 2) * green  # two cars a step
        entering = jax.random.bernoulli(key, 0.4, (self.num_lights, 2)).astype(jnp.int32)
        entering = entering.at[1:, 0].set(
            leaving[:-1, 0]
        )  # the next light gets what this one lets through
        queue = jnp.minimum(state.queue - leaving + entering, 10)
        state = TrafficState(queue, state.step_count + 1)
        reward = (
            -queue.mean() / self.time_limit
        )  # the whole team's; an array [N] where agents earn their own
        return state, transition(
            self._observe(state), reward, truncated=state.step_count >= self.time_limit
        )

    def _observe(self, state) -> Observation:
        """A light sees its own queues and those before it."""
        before = jnp.roll(state.queue, 1, axis=0).at[0].set(0)
        view = jnp.concatenate([state.queue, before], axis=1) / 10.0
        all_of_them = jnp.ones(self.num_lights, bool)
        return Observation(
            view, action_mask=jnp.ones((self.num_lights, 2), bool), alive=all_of_them
        )


def make_env() -> Environment:
    return Traffic()
