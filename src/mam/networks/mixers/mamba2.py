"""The Mamba-2 block: one decay per head, which makes the scan a matrix product.

Source: Dao and Gu 2024 (arXiv 2405.21060), §7.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mam.config import NetworkConfig
from mam.kernels.selective_scan import step_size
from mam.kernels.ssd import ssd, ssd_step
from mam.networks.layers import Dense, RMSNorm
from mam.networks.mixers.base import Mixing, by_channel, required, side_by_side
from mam.networks.mixers.roles import (
    AbstractSSM,
    CausalConv,
    SSMState,
    init_ssm_state,
    initial_dt_bias,
    largest_step_size,
    living,
    state_space_roles,
)

NORM_EPS = 1e-5


class DualInputs(eqx.Module):
    """The in-projections."""

    gate: Float[Array, "*batch D"]  # before the SiLU
    x: Float[Array, "*batch D"]  # the convolutions' inputs
    BC: Float[Array, "*batch F"]
    dt: Float[Array, "*batch H"]  # step sizes before the softplus


class DualSSM(AbstractSSM):
    """Mamba-2's block from in-projection to out-projection, with one group.

        z = W_z u;  x = SiLU(conv(W_in u));  B, C = split(SiLU(conv(W_BC u)))
        Δ = softplus(W_Δ u + b_Δ)
        h_i = exp(Δ_i A) h_{i-1} + (Δ_i x_i) ⊗ B_i;  y_i = h_i C_i + D x_i,  per head
        out = W_out RMSNorm(y ⊙ SiLU(z))

    As `cross`, C = W_C context, neither convolved nor activated. Difference: the paper's one
    in-projection and one convolution are kept in parts, which spares cutting activations up and,
    for the gradient, putting them together.
    """

    in_proj: Dense
    gate_proj: Dense
    state_proj: Dense
    dt_proj: Dense
    conv: CausalConv
    state_conv: CausalConv
    context_proj: Dense | None
    A_log: Float[Array, "H"]
    skip: Float[Array, "H"]
    norm: RMSNorm
    out_proj: Dense
    d_state: int = eqx.field(static=True)
    has_fused_decoder: ClassVar[bool] = True

    def __init__(self, config: NetworkConfig, *, key: Key[Array, ""], cross: bool = False):
        d_model, d_inner, d_state, heads = (
            config.d_model,
            config.d_inner,
            config.d_state,
            config.num_ssm_heads,
        )
        keys = iter(jax.random.split(key, 10))
        states = (1 if cross else 2) * d_state
        self.in_proj = Dense(d_model, d_inner, key=next(keys), bias=False)
        self.gate_proj = Dense(d_model, d_inner, key=next(keys), bias=False)
        self.state_proj = Dense(d_model, states, key=next(keys), bias=False)
        dt_proj = Dense(d_model, heads, key=next(keys))
        self.dt_proj = eqx.tree_at(
            lambda proj: proj.bias, dt_proj, initial_dt_bias(heads, key=next(keys))
        )
        self.conv = CausalConv(d_inner, config.d_conv, key=next(keys))
        self.state_conv = CausalConv(states, config.d_conv, key=next(keys))
        self.context_proj = Dense(d_model, d_state, key=next(keys), bias=False) if cross else None
        self.A_log = jnp.log(jax.random.uniform(next(keys), (heads,), minval=1.0, maxval=16.0))
        self.skip = jnp.ones(heads)
        self.norm = RMSNorm(d_inner, eps=NORM_EPS)
        self.out_proj = Dense(d_inner, d_model, key=next(keys), bias=False)
        self.d_state = d_state

    def metrics(self):
        return largest_step_size(self.dt_proj)

    def project(self, x):
        return DualInputs(
            gate=self.gate_proj(x), x=self.in_proj(x), BC=self.state_proj(x), dt=self.dt_proj(x)
        )

    def project_context(self, context):
        return required(self.context_proj)(context)

    def init_state(self, batch, dtype):
        return init_ssm_state(batch, self.d_state, (self.conv, self.state_conv), dtype)

    def step(self, state, inputs, C, *, reset=None):
        state = state.restarted(reset)
        conv_x, conv_BC = state.conv_state
        conv_x, x = self.conv.step(conv_x, inputs.x)
        conv_BC, BC = self.state_conv.step(conv_BC, inputs.BC)
        B, C = self._split(BC, C)
        dt = step_size(inputs.dt)
        ssm_state, y = ssd_step(state.ssm_state, x, dt, -jnp.exp(self.A_log), B, C, self.skip)
        return SSMState(ssm_state=ssm_state, conv_state=(conv_x, conv_BC)), self.norm(
            y * jax.nn.silu(inputs.gate)
        )

    def unroll(self, state, inputs, C, alive, *, reset=None, reverse=False):
        start, (conv_x, conv_BC) = (
            (None, (None, None)) if state is None else (state.ssm_state, state.conv_state)
        )
        conv_x, x = self.conv.unroll(conv_x, living(inputs.x, alive), reset=reset, reverse=reverse)
        conv_BC, BC = self.state_conv.unroll(
            conv_BC, living(inputs.BC, alive), reset=reset, reverse=reverse
        )
        B, C = self._split(BC, C)
        dt = step_size(inputs.dt, alive)
        rates = -jnp.exp(self.A_log)
        y, ssm_state = ssd(
            x, dt, rates, B, C, self.skip, initial_state=start, reset=reset, reverse=reverse
        )
        return SSMState(ssm_state=ssm_state, conv_state=(conv_x, conv_BC)), self.norm(
            y * jax.nn.silu(inputs.gate)
        )

    def decay(self, state, inputs, alive, *, reverse=False):
        total = step_size(inputs.dt, alive).sum(axis=-2)
        by_head = jnp.exp(-jnp.exp(self.A_log) * total)
        channels = inputs.x.shape[-1] // by_head.shape[-1]
        return jnp.repeat(by_head, channels, axis=-1)[..., None, :]

    def mixing(self, inputs, C, alive, *, reverse=False):
        u, gate = living(inputs.x, alive), jax.nn.silu(inputs.gate)
        conv, offset = self.conv.with_gate_of(u, reverse=reverse)
        BC = self.state_conv.unroll(None, living(inputs.BC, alive), reverse=reverse)[1]
        dt, (B, C) = step_size(inputs.dt, alive), self._split(BC, C)

        def run(x: Array) -> Array:
            return ssd(x, dt, -jnp.exp(self.A_log), B, C, self.skip, reverse=reverse)[0]

        # What the norm divides by is one number per agent, and another one in the other direction:
        # it belongs to the matrix.
        inverse = self.norm.inverse(run(conv(u) + offset) * gate)
        return Mixing(
            values=by_channel(u),
            apply=lambda v: by_channel(run(conv(living(side_by_side(v), alive))) * inverse),
            finish=lambda y: side_by_side(y) * gate * self.norm.scale,
            offset=by_channel(run(offset) * inverse),
        )

    def _split(self, BC: Float[Array, "*batch F"], C: Float[Array, "*batch S"] | None):
        """Return B and C, the latter the given one unless it is None."""
        return (BC[..., : self.d_state], BC[..., self.d_state :]) if C is None else (BC, C)


ROLES = state_space_roles(DualSSM)
