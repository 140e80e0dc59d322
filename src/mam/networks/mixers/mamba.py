"""The Mamba block: a state per channel, and Δ, B and C read from the input.

Source: Mamba (arXiv 2312.00752), Fig. 3.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mam.config import NetworkConfig
from mam.kernels.selective_scan import gated_scan, gated_step, selective_scan, step_size
from mam.networks.layers import Dense
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


class SelectiveInputs(eqx.Module):
    """The two in-projections: the convolution's input, and the gate."""

    x: Float[Array, "*batch D"]
    gate: Float[Array, "*batch D"]  # before the SiLU


class SelectiveSSM(AbstractSSM):
    """Mamba's block from in-projection to out-projection.

        x = SiLU(conv(W_in u));  z = W_z u;  δ, B, C = split(W_x x);  Δ = softplus(W_Δ δ + b_Δ)
        h_i = exp(Δ_i A) ⊙ h_{i-1} + (Δ_i x_i) ⊗ B_i;  y_i = h_i C_i + D ⊙ x_i
        out = W_out (y ⊙ SiLU(z))

    As `cross`, C = W_C context in place of a share of W_x x.
    """

    in_proj: Dense
    gate_proj: Dense
    conv: CausalConv
    x_proj: Dense
    context_proj: Dense | None
    dt_proj: Dense
    A_log: Float[Array, "D S"]
    skip: Float[Array, "D"]
    out_proj: Dense
    scan: str | None = eqx.field(static=True)
    has_fused_decoder: ClassVar[bool] = True

    def __init__(self, config: NetworkConfig, *, key: Key[Array, ""], cross: bool = False):
        d_inner, d_state, dt_rank = config.d_inner, config.d_state, config.resolved_dt_rank
        in_key, gate_key, conv_key, x_key, context_key, dt_key, dt_bias_key, out_key = (
            jax.random.split(key, 8)
        )
        self.in_proj = Dense(config.d_model, d_inner, key=in_key, bias=False)
        self.gate_proj = Dense(config.d_model, d_inner, key=gate_key, bias=False)
        self.conv = CausalConv(d_inner, config.d_conv, key=conv_key)
        self.x_proj = Dense(d_inner, dt_rank + (1 if cross else 2) * d_state, key=x_key, bias=False)
        self.context_proj = (
            Dense(config.d_model, d_state, key=context_key, bias=False) if cross else None
        )
        bound = dt_rank**-0.5
        weight = jax.random.uniform(dt_key, (dt_rank, d_inner), minval=-bound, maxval=bound)
        self.dt_proj = eqx.tree_at(
            lambda proj: (proj.weight, proj.bias),
            Dense(dt_rank, d_inner, key=dt_key),
            (weight, initial_dt_bias(d_inner, key=dt_bias_key)),
        )
        # S4D-Real.
        self.A_log = jnp.broadcast_to(jnp.log(jnp.arange(1.0, d_state + 1)), (d_inner, d_state))
        self.skip = jnp.ones(d_inner)
        self.out_proj = Dense(d_inner, config.d_model, key=out_key, bias=False)
        self.scan = None if config.scan == "auto" else config.scan

    def metrics(self):
        return largest_step_size(self.dt_proj)

    def project(self, x):
        return SelectiveInputs(x=self.in_proj(x), gate=self.gate_proj(x))

    def project_context(self, context):
        return required(self.context_proj)(context)

    def init_state(self, batch, dtype):
        return init_ssm_state(batch, self.A_log.shape[1], (self.conv,), dtype)

    def step(self, state, inputs, C, *, reset=None):
        conv_state, x = self.conv.step(state.restarted(reset).conv_state[0], inputs.x)
        args = self._recurrence(x, C, inputs.gate)
        ssm_state, y = gated_step(state.ssm_state, *args, reset=reset, implementation=self.scan)
        return SSMState(ssm_state=ssm_state, conv_state=(conv_state,)), y

    def unroll(self, state, inputs, C, alive, *, reset=None, reverse=False):
        start, (before,) = (None, (None,)) if state is None else (state.ssm_state, state.conv_state)
        conv_state, x = self.conv.unroll(
            before, living(inputs.x, alive), reset=reset, reverse=reverse
        )
        y, ssm_state = gated_scan(
            *self._recurrence(x, C, inputs.gate),
            alive=alive,
            initial_state=start,
            reset=reset,
            reverse=reverse,
            implementation=self.scan,
        )
        return SSMState(ssm_state=ssm_state, conv_state=(conv_state,)), y

    def decay(self, state, inputs, alive, *, reverse=False):
        x = self.conv.unroll(state.conv_state[0], living(inputs.x, alive), reverse=reverse)[1]
        features = self.x_proj(x)[..., : self.dt_proj.weight.shape[0]]
        total = step_size(self.dt_proj(features), alive).sum(axis=-2)
        return jnp.exp(-jnp.exp(self.A_log).T * total[..., None, :])

    def mixing(self, inputs, C, alive, *, reverse=False):
        u = living(inputs.x, alive)
        conv, offset = self.conv.with_gate_of(u, reverse=reverse)
        features, B, C = self._select(conv(u) + offset, C)
        dt, A = step_size(self.dt_proj(features), alive), -jnp.exp(self.A_log)

        def scan(x: Array) -> Array:
            how = {"reverse": reverse, "implementation": self.scan}
            return by_channel(selective_scan(x, dt, A, B, C, self.skip, **how)[0])

        return Mixing(
            values=by_channel(u),
            apply=lambda values: scan(conv(living(side_by_side(values), alive))),
            finish=lambda y: side_by_side(y) * jax.nn.silu(inputs.gate),
            offset=scan(offset),
        )

    def _recurrence(
        self,
        x: Float[Array, "*batch D"],
        C: Float[Array, "*batch S"] | None,
        gate: Float[Array, "*batch D"],
    ):
        """Return what `gated_scan` and `gated_step` read, of what the convolution puts out."""
        features, B, C = self._select(x, C)
        weights = self.dt_proj.weight, required(self.dt_proj.bias), -jnp.exp(self.A_log)
        return x, features, *weights, B, C, self.skip, gate

    def _select(self, x: Float[Array, "*batch D"], C: Float[Array, "*batch S"] | None):
        """Return δ, B and C, the latter the given one unless it is None."""
        dt_rank, d_state = self.dt_proj.weight.shape[0], self.A_log.shape[1]
        features, B, *own = jnp.split(self.x_proj(x), [dt_rank, dt_rank + d_state], axis=-1)
        return features, B, own[0] if C is None else C


ROLES = state_space_roles(SelectiveSSM)
