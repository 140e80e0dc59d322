"""State-space memories: the blocks that mix agents, along time."""

from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mam.config import NetworkConfig
from mam.networks.layers import Dense, LayerNorm, RMSNorm
from mam.networks.memory.base import OUTPUT_GAIN, AbstractRecurrence
from mam.networks.mixers.roles import AbstractSSM, initial_dt_bias


class StateSpaceMemory(AbstractRecurrence):
    """out = LN(x + W RMSNorm(SSM(RMSNorm(x)))), the block's skip weights D starting at zero.

    The state is O(1) in the length of the episode. With the two inner norms and the residual, what
    happened once is heard beside what is seen at every step; in the decoder's wrapper it drowns.
    """

    pre_norm: RMSNorm
    ssm: AbstractSSM
    ssm_norm: RMSNorm
    post_norm: LayerNorm

    def __init__(
        self, make: Callable[..., AbstractSSM], config: NetworkConfig, *, key: Key[Array, ""]
    ):
        """Build the block `make(config, key=key)` with the memory's own settings.

        Args:
            make: the block.
            config: of the network; `config.recurrence` is that of the memory.
            key: of the weights.
        """
        own = config.recurrence
        ssm_key, dt_key, out_key = jax.random.split(key, 3)
        sizes = replace(
            config, d_state=own.d_state, d_conv=own.d_conv, expand=own.expand, head_dim=None
        )
        ssm = make(sizes, key=ssm_key)
        dt_bias = initial_dt_bias(
            ssm.dt_proj.weight.shape[1], key=dt_key, least=own.dt_min, most=own.dt_max
        )
        out_proj = Dense(sizes.d_inner, sizes.d_model, key=out_key, gain=OUTPUT_GAIN, bias=False)
        self.ssm = eqx.tree_at(
            lambda ssm: (ssm.skip, ssm.dt_proj.bias, ssm.out_proj),
            ssm,
            (jnp.zeros_like(ssm.skip), dt_bias, out_proj),
        )
        self.pre_norm, self.ssm_norm = RMSNorm(config.d_model), RMSNorm(sizes.d_inner)
        self.post_norm = LayerNorm(config.d_model)

    def init(self, shape):
        return self.ssm.init_state(shape, None)

    def step(self, state, x, reset):
        reset = jnp.broadcast_to(reset[..., None], x.shape[:-1])
        inputs = self.ssm.project(self.pre_norm(x))
        state, y = self.ssm.step(state, inputs, None, reset=reset)
        return state, self._out(x, y)

    def unroll(self, state, x, reset, action):
        x = jnp.moveaxis(x, 0, -2)  # [*batch, N, T, E]: time is what the block runs along
        reset = jnp.broadcast_to(jnp.moveaxis(reset, 0, -1)[..., None, :], x.shape[:-1])
        inputs = self.ssm.project(self.pre_norm(x))
        state, y = self.ssm.unroll(state, inputs, None, None, reset=reset)
        return state, jnp.moveaxis(self._out(x, y), -2, 0)

    def _out(
        self, x: Float[Array, "*batch E"], y: Float[Array, "*batch D"]
    ) -> Float[Array, "*batch E"]:
        return self.post_norm(x, self.ssm.out_proj(self.ssm_norm(y)))
