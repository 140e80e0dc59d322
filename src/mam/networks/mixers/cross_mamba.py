"""The cross block of MAM's decoder: a Mamba block on the actions, read out by the observations (MAM, §4)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mam.config import NetworkConfig
from mam.networks.layers import Dense, LayerNorm, RMSNorm
from mam.networks.mixers.base import AbstractCausalMixer, required
from mam.networks.mixers.mamba import AbstractSelectiveSSM, CausalConv, SSMInputs, StepSize, s4d_real


class CrossSSM(AbstractSelectiveSSM):
    """A selective SSM on the action stream in which only C comes from the context: C = W_C context.

    As in cross-attention the context asks (C is Mamba's query) and the action stream answers.
    """

    in_proj: Dense
    conv: CausalConv
    x_proj: Dense
    context_proj: Dense
    step_size: StepSize
    A_log: Float[Array, "D S"]
    skip: Float[Array, "D"]
    out_proj: Dense

    def __init__(self, sizes: NetworkConfig, *, key: Key[Array, ""]):
        d_inner, d_state, dt_rank = sizes.d_inner, sizes.d_state, sizes.resolved_dt_rank
        in_key, conv_key, x_key, context_key, dt_key, out_key = jax.random.split(key, 6)
        self.in_proj = Dense(sizes.d_model, 2 * d_inner, key=in_key, bias=False)
        self.conv = CausalConv(d_inner, sizes.d_conv, key=conv_key)
        self.x_proj = Dense(d_inner, dt_rank + d_state, key=x_key, bias=False)
        self.context_proj = Dense(sizes.d_model, d_state, key=context_key, bias=False)
        self.step_size = StepSize(dt_rank, d_inner, key=dt_key)
        self.A_log = s4d_real(d_inner, d_state)
        self.skip = jnp.ones(d_inner)
        self.out_proj = Dense(d_inner, sizes.d_model, key=out_key, bias=False)

    def _select(self, x, context):
        dt_rank = self.x_proj.weight.shape[1] - self.A_log.shape[1]
        delta, B = jnp.split(self.x_proj(x), [dt_rank], axis=-1)
        return SSMInputs(dt=self.step_size(delta), B=B, C=self.context_proj(required(context)))


class CrossMamba(AbstractCausalMixer):
    """LayerNorm(x + CrossSSM(RMSNorm(x), RMSNorm(context))); each stream has its own RMSNorm."""

    pre_norm: RMSNorm
    context_norm: RMSNorm
    ssm: CrossSSM
    post_norm: LayerNorm

    def __init__(self, sizes: NetworkConfig, *, key: Key[Array, ""]):
        self.pre_norm, self.context_norm = RMSNorm(sizes.d_model), RMSNorm(sizes.d_model)
        self.ssm = CrossSSM(sizes, key=key)
        self.post_norm = LayerNorm(sizes.d_model)

    def __call__(self, x, context=None, *, alive=None):
        return self.post_norm(x + self.ssm(self.pre_norm(x), self.context_norm(required(context)), alive=alive))

    def init_state(self, num_agents, batch=()):
        return self.ssm.init_state(num_agents, batch)

    def step(self, state, x, context=None):
        state, y = self.ssm.step(state, self.pre_norm(x), self.context_norm(required(context)))
        return state, self.post_norm(x + y)
