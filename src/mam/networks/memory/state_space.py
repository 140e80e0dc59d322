"""State-space memories: the blocks that mix agents, along time."""

from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mam.config import NetworkConfig
from mam.networks.layers import Dense, LayerNorm, RMSNorm
from mam.networks.memory.base import AbstractRecurrence
from mam.networks.mixers.roles import AbstractSSM, SSMState, initial_dt_bias

OUTPUT_GAIN = 0.1  # memory starts as a whisper: early learning is that of the policy without


class StateSpaceState(eqx.Module):
    """The block's state, of every agent, and which step of its episode comes next."""

    ssm: SSMState
    step_count: Int[Array, "*batch N"]


class StateSpaceMemory(AbstractRecurrence):
    """out = LN(x + W RMSNorm(SSM(RMSNorm(x)))), the block's skip weights D starting at zero.

    The state is O(1) in the length of the episode. Residual and output norm let what happened once
    be heard beside what is seen now; with the decoder's wrapper it drowns.

    B and C of step t are turned by t θ, a speed θ_p for every pair of states (`rotary`): a real
    state sums what is alike at every step, beside which a single cue is lost; turned states cancel
    it.
    """

    pre_norm: RMSNorm
    ssm: AbstractSSM
    ssm_norm: RMSNorm
    post_norm: LayerNorm
    speeds: tuple[float, ...] = eqx.field(static=True)  # θ, radians per step; none if not rotary

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
        self.speeds = rotation_speeds(own.d_state // 2) if own.rotary else ()

    def init(self, shape):
        return StateSpaceState(self.ssm.init_state(shape, None), jnp.zeros(shape, jnp.int32))

    def step(self, state, x, reset):
        reset = jnp.broadcast_to(reset[..., None], x.shape[:-1])
        count = jnp.where(reset, 0, state.step_count)
        inputs = self.ssm.project(self.pre_norm(x))
        ssm, y = self.ssm.step(state.ssm, inputs, None, reset=reset, angle=self._angle(count))
        return StateSpaceState(ssm, count + 1), self._out(x, y)

    def unroll(self, state, x, reset, action):
        x = jnp.moveaxis(x, 0, -2)  # [*batch, N, T, E]
        reset = jnp.broadcast_to(jnp.moveaxis(reset, 0, -1)[..., None, :], x.shape[:-1])
        count = _step_counts(state.step_count, reset)
        inputs = self.ssm.project(self.pre_norm(x))
        ssm, y = self.ssm.unroll(
            state.ssm, inputs, None, None, reset=reset, angle=self._angle(count)
        )
        last = StateSpaceState(ssm, count[..., -1] + 1)
        return last, jnp.moveaxis(self._out(x, y), -2, 0)

    def _angle(self, count: Int[Array, "*batch"]) -> Float[Array, "*batch P"] | None:
        return count[..., None] * jnp.asarray(self.speeds) if self.speeds else None

    def _out(
        self, x: Float[Array, "*batch E"], y: Float[Array, "*batch D"]
    ) -> Float[Array, "*batch E"]:
        return self.post_norm(x, self.ssm.out_proj(self.ssm_norm(y)))


def rotation_speeds(count: int) -> tuple[float, ...]:
    """Return angles per step from a quarter turn down to one turn in 512 steps, geometrically."""
    steps = np.geomspace(4.0, 512.0, count)
    return tuple((2 * np.pi / steps).tolist())


def _step_counts(
    first: Int[Array, "*batch"], reset: Bool[Array, "*batch T"]
) -> Int[Array, "*batch T"]:
    """Return which step of its episode each is, `first` being that of the first unless reset."""
    place = jnp.arange(reset.shape[-1], dtype=jnp.int32)
    start = lax.cummax(jnp.where(reset, place, -1), axis=reset.ndim - 1)
    return jnp.where(start < 0, first[..., None] + place, place - start)
