"""The gated recurrent unit: the memory of published recurrent baselines."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from mam.config import NetworkConfig
from mam.networks.layers import Dense
from mam.networks.memory.base import AbstractRecurrence, Actions


class GRU(AbstractRecurrence):
    """A gated recurrent unit; the state is the output as well.

    r, z = σ(W x + U h + b);  n = tanh(W x + b + r ⊙ (U h + c));  h' = (1 − z) ⊙ n + z ⊙ h

    Source: Cho et al. 2014 (arXiv 1406.1078).
    """

    inputs: Dense  # of r, z and n side by side
    hidden: Dense
    new_bias: Float[Array, "E"]

    def __init__(self, config: NetworkConfig, *, key: Key[Array, ""]):
        input_key, hidden_key = jax.random.split(key)
        d_model = config.d_model
        self.inputs = Dense(d_model, 3 * d_model, key=input_key, gain=1.0)
        self.hidden = Dense(d_model, 3 * d_model, key=hidden_key, gain=1.0, bias=False)
        self.new_bias = jnp.zeros(d_model)

    def init(self, shape: tuple[int, ...]) -> Float[Array, "*batch N E"]:
        return jnp.zeros((*shape, self.new_bias.shape[0]), self.new_bias.dtype)

    def step(
        self,
        state: Float[Array, "*batch N E"],
        x: Float[Array, "*batch N E"],
        reset: Bool[Array, "*batch"],
    ) -> tuple[Float[Array, "*batch N E"], Float[Array, "*batch N E"]]:
        state = self._advance(state, self.inputs(x), reset)
        return state, state

    def unroll(
        self,
        state: Float[Array, "*batch N E"],
        x: Float[Array, "T *batch N E"],
        reset: Bool[Array, "T *batch"],
        action: Actions,
    ) -> tuple[Float[Array, "*batch N E"], Float[Array, "T *batch N E"]]:
        """Return the last state and all outputs; the inputs' share of the gates is one product."""

        def step(state, inputs):
            state = self._advance(state, *inputs)
            return state, state

        return lax.scan(step, state, (self.inputs(x), reset))

    def _advance(self, hidden, gates, reset):
        hidden = jnp.where(reset[..., None, None], 0.0, hidden)
        reset_x, update_x, new_x = jnp.split(gates, 3, axis=-1)
        reset_h, update_h, new_h = jnp.split(self.hidden(hidden), 3, axis=-1)
        update = jax.nn.sigmoid(update_x + update_h)
        new = jnp.tanh(new_x + jax.nn.sigmoid(reset_x + reset_h) * (new_h + self.new_bias))
        return (1 - update) * new + update * hidden
