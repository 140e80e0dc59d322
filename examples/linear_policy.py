"""Your own policy: every agent by itself, a linear layer for its actions and one for its value.

mam train --env lbf/8x8-2p-2f-coop --policy examples.linear_policy:make
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from mam.networks.actions import ActionDistribution, agent_noise, make_distribution
from mam.networks.layers import Dense
from mam.types import Evaluation, PolicyOutput


class LinearPolicy(eqx.Module):
    """Without memory, and in no order: see `mam.types.Policy` for what each method is given."""

    action_layer: Dense
    value_layer: Dense  # of this name: normalised values (Pop-Art) rescale it
    distribution: ActionDistribution

    def init_memory(self, batch=()):
        return ()

    def act(self, memory, obs, reset, key, *, greedy=False):
        noise = agent_noise(self.distribution, key, obs.alive.shape[-1])
        return self.act_on_noise(memory, obs, reset, jnp.where(greedy, 0.0, noise))

    def act_on_noise(self, memory, obs, reset, noise):  # what `mam export` asks for
        out = self._outputs(obs)
        action = self.distribution.sample_from_noise(out, obs.action_mask, noise)
        agents = jnp.arange(obs.alive.shape[-1], dtype=jnp.int32)
        return memory, PolicyOutput(
            action=action,
            log_prob=self.distribution.log_prob(out, obs.action_mask, action),
            value=self._values(obs),
            order=jnp.broadcast_to(agents, obs.alive.shape),
        )

    def evaluate(self, memory, obs, action, order, reset):
        out = self._outputs(obs)
        return Evaluation(
            log_prob=self.distribution.log_prob(out, obs.action_mask, action),
            entropy=self.distribution.entropy(out, obs.action_mask),
            value=self._values(obs),
        )

    def successor_values(self, memory, obs, action, reset, successor):
        return self._values(successor)

    def _outputs(self, obs):
        return self.action_layer(_seen(obs))

    def _values(self, obs):
        return self.value_layer(_seen(obs))[..., 0]


def _seen(obs):
    """Whatever stands in the rows of the dead, NaN included, is read as zeros."""
    return jnp.where(obs.alive[..., None], obs.agents_view, 0.0)


def make(spec, config, *, key):
    """`config` is `NetworkConfig`: a larger policy would read `config.d_model` and the like."""
    action_key, value_key = jax.random.split(key)
    distribution = make_distribution(spec)
    return LinearPolicy(
        Dense(spec.obs_dim, distribution.num_outputs, key=action_key, gain=0.01),
        Dense(spec.obs_dim, 1, key=value_key),
        distribution,
    )
