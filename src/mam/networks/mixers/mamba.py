"""The causal Mamba block (arXiv 2312.00752, Fig. 3) as a mixer, and what its variants share."""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from mam.config import NetworkConfig
from mam.networks.layers import Dense, LayerNorm, RMSNorm
from mam.networks.mixers.base import AbstractCausalMixer
from mam.networks.scan import selective_scan, selective_step

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # Δ at initialisation: log-uniform between the first two
DT_LIMIT = 20.0  # Δ is clamped here: left alone it can drift upward until the update is NaN


class MambaState(eqx.Module):
    """The recurrent form's state: O(1) in the number of agents."""

    ssm_state: Float[Array, "*batch D S"]
    conv_state: Float[Array, "*batch W D"]  # the last d_conv − 1 inputs of the convolution, oldest first


class CausalConv(eqx.Module):
    """Depthwise convolution over the last d_conv agents, zero-padded at the first."""

    weight: Float[Array, "K D"]  # row k multiplies the input of d_conv − 1 − k agents ago
    bias: Float[Array, "D"]

    def __init__(self, d_inner: int, d_conv: int, *, key: Key[Array, ""]):
        bound = d_conv**-0.5
        self.weight = jax.random.uniform(key, (d_conv, d_inner), minval=-bound, maxval=bound)
        self.bias = jnp.zeros(d_inner)

    def __call__(self, x: Float[Array, "*batch N D"]) -> Float[Array, "*batch N D"]:
        # Shifted multiply-adds: on CPU 50 times faster than XLA's grouped convolution.
        n, width = x.shape[-2], self.weight.shape[0]
        y = x * self.weight[-1]
        for shift in range(1, min(width, n)):
            earlier = jnp.pad(x[..., : n - shift, :], [(0, 0)] * (x.ndim - 2) + [(shift, 0), (0, 0)])
            y = y + earlier * self.weight[width - 1 - shift]
        return y + self.bias

    def step(
        self, state: Float[Array, "*batch W D"], x: Float[Array, "*batch D"]
    ) -> tuple[Float[Array, "*batch W D"], Float[Array, "*batch D"]]:
        """The next output; W = d_conv − 1 inputs are the state."""
        window = jnp.concatenate([state, x[..., None, :]], axis=-2)
        return window[..., 1:, :], jnp.sum(window * self.weight, axis=-2) + self.bias


class SSMInputs(eqx.Module):
    """What the recurrence reads besides x: step sizes and input and output vectors."""

    dt: Float[Array, "*batch D"]
    B: Float[Array, "*batch S"]
    C: Float[Array, "*batch S"]


class AbstractSelectiveSSM(AbstractCausalMixer):
    """Mamba's block from in-projection to out-projection; a subclass says where Δ, B and C come from.

    x, z = split(W_in u);  x = SiLU(conv(x));  Δ, B, C = select(x, context)
    h_i = exp(Δ_i A) ⊙ h_{i-1} + (Δ_i x_i) ⊗ B_i;  y_i = h_i C_i + D ⊙ x_i
    out = W_out (y ⊙ SiLU(z))
    """

    in_proj: eqx.AbstractVar[Dense]
    conv: eqx.AbstractVar[CausalConv]
    A_log: eqx.AbstractVar[Float[Array, "D S"]]
    skip: eqx.AbstractVar[Float[Array, "D"]]
    out_proj: eqx.AbstractVar[Dense]

    @abstractmethod
    def _select(self, x: Float[Array, "*batch D"], context: Float[Array, "*batch E"] | None) -> SSMInputs: ...

    def __call__(self, x, context=None, *, alive=None):
        x, z = jnp.split(self.in_proj(x), 2, axis=-1)
        if alive is not None:
            x = jnp.where(alive[..., None], x, 0.0)
        x = jax.nn.silu(self.conv(x))
        inputs = self._select(x, context)
        dt = inputs.dt if alive is None else jnp.where(alive[..., None], inputs.dt, 0.0)
        y, _ = selective_scan(x, dt, -jnp.exp(self.A_log), inputs.B, inputs.C, self.skip)
        return self.out_proj(y * jax.nn.silu(z))

    def init_state(self, num_agents, batch=()):
        d_conv, d_inner = self.conv.weight.shape
        return MambaState(
            ssm_state=jnp.zeros((*batch, *self.A_log.shape)), conv_state=jnp.zeros((*batch, d_conv - 1, d_inner))
        )

    def step(self, state, x, context=None):
        x, z = jnp.split(self.in_proj(x), 2, axis=-1)
        conv_state, x = self.conv.step(state.conv_state, x)
        x = jax.nn.silu(x)
        inputs = self._select(x, context)
        A = -jnp.exp(self.A_log)
        ssm_state, y = selective_step(state.ssm_state, x, inputs.dt, A, inputs.B, inputs.C, self.skip)
        return MambaState(ssm_state=ssm_state, conv_state=conv_state), self.out_proj(y * jax.nn.silu(z))


class StepSize(eqx.Module):
    """Δ = softplus(W δ + b), bounded by DT_LIMIT."""

    proj: Dense

    def __init__(self, dt_rank: int, d_inner: int, *, key: Key[Array, ""]):
        weight_key, bias_key = jax.random.split(key)
        bound = dt_rank**-0.5
        weight = jax.random.uniform(weight_key, (dt_rank, d_inner), minval=-bound, maxval=bound)
        log_dt = jax.random.uniform(bias_key, (d_inner,), minval=jnp.log(DT_MIN), maxval=jnp.log(DT_MAX))
        dt = jnp.maximum(jnp.exp(log_dt), DT_FLOOR)
        proj = Dense(dt_rank, d_inner, key=key)
        inverse_softplus = dt + jnp.log(-jnp.expm1(-dt))
        self.proj = eqx.tree_at(lambda p: (p.weight, p.bias), proj, (weight, inverse_softplus))

    def __call__(self, delta: Float[Array, "*batch R"]) -> Float[Array, "*batch D"]:
        return jnp.minimum(jax.nn.softplus(self.proj(delta)), DT_LIMIT)


def s4d_real(d_inner: int, d_state: int) -> Float[Array, "D S"]:
    """A_log with A[d, s] = −s, s = 1…d_state (the S4D-Real initialisation)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1.0, d_state + 1)), (d_inner, d_state))


class SelectiveSSM(AbstractSelectiveSSM):
    """The Mamba block itself: Δ, B and C all come from the convolved input."""

    in_proj: Dense
    conv: CausalConv
    x_proj: Dense
    step_size: StepSize
    A_log: Float[Array, "D S"]
    skip: Float[Array, "D"]
    out_proj: Dense

    def __init__(self, sizes: NetworkConfig, *, key: Key[Array, ""]):
        d_inner, d_state, dt_rank = sizes.d_inner, sizes.d_state, sizes.resolved_dt_rank
        in_key, conv_key, x_key, dt_key, out_key = jax.random.split(key, 5)
        self.in_proj = Dense(sizes.d_model, 2 * d_inner, key=in_key, bias=False)
        self.conv = CausalConv(d_inner, sizes.d_conv, key=conv_key)
        self.x_proj = Dense(d_inner, dt_rank + 2 * d_state, key=x_key, bias=False)
        self.step_size = StepSize(dt_rank, d_inner, key=dt_key)
        self.A_log = s4d_real(d_inner, d_state)
        self.skip = jnp.ones(d_inner)
        self.out_proj = Dense(d_inner, sizes.d_model, key=out_key, bias=False)

    def _select(self, x, context):
        d_state = self.A_log.shape[1]
        dt_rank = self.x_proj.weight.shape[1] - 2 * d_state
        delta, B, C = jnp.split(self.x_proj(x), [dt_rank, dt_rank + d_state], axis=-1)
        return SSMInputs(dt=self.step_size(delta), B=B, C=C)


class Mamba(AbstractCausalMixer):
    """MAM's causal block: LayerNorm(x + SSM(RMSNorm(x))) (MAM, §4)."""

    pre_norm: RMSNorm
    ssm: SelectiveSSM
    post_norm: LayerNorm

    def __init__(self, sizes: NetworkConfig, *, key: Key[Array, ""]):
        self.pre_norm = RMSNorm(sizes.d_model)
        self.ssm = SelectiveSSM(sizes, key=key)
        self.post_norm = LayerNorm(sizes.d_model)

    def __call__(self, x, context=None, *, alive: Bool[Array, "*batch N"] | None = None):
        return self.post_norm(x + self.ssm(self.pre_norm(x), alive=alive))

    def init_state(self, num_agents, batch=()):
        return self.ssm.init_state(num_agents, batch)

    def step(self, state, x, context=None):
        state, y = self.ssm.step(state, self.pre_norm(x))
        return state, self.post_norm(x + y)
