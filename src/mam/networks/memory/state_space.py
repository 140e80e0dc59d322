"""State-space memories: the blocks that mix agents, along time."""

from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mam.config import NetworkConfig
from mam.networks.layers import LayerNorm, RMSNorm
from mam.networks.memory.base import AbstractRecurrence
from mam.networks.mixers.roles import AbstractSSM, initial_dt_bias, with_small_output


class StateSpaceMemory(AbstractRecurrence):
    """out = LN(x + SSM(RMSNorm(x))) with the block's skip weights D starting at zero.

    The state is O(1) in the length of the episode. What is alike at every step would sum up in it
    and drown what happened once, so the block starts with convolutions whose weights add up to
    zero: it takes in what changes. (On a cue to be told after 50 steps, supervised, that halves the
    gradient steps; the residual makes it learnable at all.) `config.recurrence.normalise` puts an
    RMSNorm before the out-projection. That cue takes a third fewer steps with it; but small states
    count as much as large ones, and updates of a policy may go wrong (RWARE: five times MAT's KL).
    """

    pre_norm: RMSNorm
    ssm: AbstractSSM
    ssm_norm: RMSNorm | None
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
        ssm_key, dt_key = jax.random.split(key)
        sizes = replace(
            config, d_state=own.d_state, d_conv=own.d_conv, expand=own.expand, head_dim=None
        )
        ssm = with_small_output(make(sizes, key=ssm_key))
        dt_bias = initial_dt_bias(
            ssm.dt_proj.weight.shape[1], key=dt_key, least=own.dt_min, most=own.dt_max
        )
        conv = ssm.conv.weight - ssm.conv.weight.mean(axis=0)
        self.ssm = eqx.tree_at(
            lambda ssm: (ssm.conv.weight, ssm.skip, ssm.dt_proj.bias),
            ssm,
            (conv, jnp.zeros_like(ssm.skip), dt_bias),
        )
        self.ssm_norm = RMSNorm(sizes.d_inner) if own.normalise else None
        self.pre_norm, self.post_norm = RMSNorm(config.d_model), LayerNorm(config.d_model)

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
        y = self.ssm_norm(y) if self.ssm_norm else y
        return self.post_norm(x, self.ssm.out_proj(y))
