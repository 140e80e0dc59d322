"""State-space mixers: what Mamba-1 and Mamba-2 share, and the three roles they play in MAM.

Source: MAM (arXiv 2410.19382), §4.
"""

import operator
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial, reduce
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from mam.config import NetworkConfig
from mam.errors import UserError
from mam.kernels.native.conv import native_conv_silu, native_conv_supports
from mam.kernels.native.library import use_native
from mam.kernels.selective_scan import step_size, zero_where
from mam.networks.chunks import cut_agents, hand_on, join_agents
from mam.networks.layers import MIXED_GAIN, Dense, LayerNorm, RMSNorm
from mam.networks.mixers import spread
from mam.networks.mixers.base import (
    AbstractCausalMixer,
    AbstractMixer,
    MixerInputs,
    Mixing,
    Roles,
    required,
)

DT_MIN, DT_MAX = 1e-3, 1e-1  # Δ at initialisation: log-uniform between them

# The last d_conv − 1 inputs of a convolution, [*batch, F] each, oldest first.
Before = tuple[Float[Array, "..."], ...]


class SSMState(eqx.Module):
    """The recurrent form's state: O(1) in the number of agents."""

    ssm_state: Float[Array, "*batch S D"]
    conv_state: tuple[Before, ...]  # of each convolution

    def restarted(self, reset: Bool[Array, "*batch"] | None) -> "SSMState":
        """Return the state, zeros where a new sequence starts; None: nowhere."""
        return jax.tree.map(partial(zero_where, reset), self)


class CausalConv(eqx.Module):
    """SiLU of a depthwise convolution over the last d_conv agents, zero-padded at the first."""

    weight: Float[Array, "K F"]  # row k multiplies the input of d_conv − 1 − k agents ago
    bias: Float[Array, "F"]

    def __init__(self, channels: int, d_conv: int, *, key: Key[Array, ""]):
        bound = d_conv**-0.5
        self.weight = jax.random.uniform(key, (d_conv, channels), minval=-bound, maxval=bound)
        self.bias = jnp.zeros(channels)

    def unroll(
        self,
        state: Before | None,
        x: Float[Array, "*batch M F"],
        *,
        reset: Bool[Array, "*batch M"] | None = None,
        reverse: bool = False,
    ) -> tuple[Before, Float[Array, "*batch M F"]]:
        """Return the next M outputs, and the state after them.

        They are shifted multiply-adds: on CPU 50 times faster than XLA's grouped convolution.

        Args:
            state: the inputs so far; None before the first.
            x: the next M inputs.
            reset: True where what was read before an agent counts as zeros from it on.
            reverse: read from the last to the first; outputs stay in the order of the inputs.

        Returns:
            The state after all M inputs, and their outputs.
        """
        num_new, before = x.shape[-2], self.weight.shape[0] - 1
        if state:
            known = jnp.stack(state[::-1] if reverse else state, axis=-2)
            if reset is not None:
                # The outputs at known places are dropped, but zero times their derivative may be
                # NaN.
                known = zero_where(reset[..., -1 if reverse else 0], known)
                reset = jnp.pad(
                    reset, [(0, 0)] * (x.ndim - 2) + [(0, before) if reverse else (before, 0)]
                )
            x = jnp.concatenate([x, known] if reverse else [known, x], axis=-2)
        y = _convolve(
            x, self.weight.astype(x.dtype), self.bias.astype(x.dtype), reset, reverse=reverse
        )
        y = y[..., :num_new, :] if reverse else y[..., -num_new:, :]

        def last(k):
            """Return the k-th last input read, zeros if one after it was reset."""
            later = slice(k - 1) if reverse else slice(x.shape[-2] - k + 1, None)
            is_gone = None if reset is None else reset[..., later].any(axis=-1)
            return zero_where(is_gone, x[..., k - 1 if reverse else -k, :])

        there = min(before, x.shape[-2])
        zeros = (jnp.zeros_like(x[..., 0, :]),) * (before - there)
        return zeros + tuple(last(k) for k in range(there, 0, -1)), y

    def step(
        self, state: Before, x: Float[Array, "*batch F"]
    ) -> tuple[Before, Float[Array, "*batch F"]]:
        """Return the state after the next input, and its output.

        Args:
            state: the last d_conv − 1 inputs before it, the oldest first.
            x: the next input.
        """
        window, weight = (*state, x), self.weight.astype(x.dtype)
        y = sum(v * weight[k] for k, v in enumerate(window)) + self.bias.astype(x.dtype)
        return window[1:], jax.nn.silu(y)

    def with_gate_of(
        self, x: Float[Array, "*batch M F"], *, reverse: bool = False
    ) -> tuple[Callable[[Array], Array], Float[Array, "*batch M F"]]:
        """Return v ↦ σ(c) K v and σ(c) b with c = K x + b: for v = x they add up to SiLU(c).

        Args:
            x: the inputs.
            reverse: read from the last to the first.
        """
        weight, bias = self.weight.astype(x.dtype), self.bias.astype(x.dtype)

        def conv(v: Array) -> Array:
            return _conv(-1 if reverse else 1, v, weight, 0.0, None)

        gate = jax.nn.sigmoid(conv(x) + bias)
        return lambda v: gate * conv(v), gate * bias


def _convolve(x: Array, weight: Array, bias: Array, reset: Array | None, *, reverse: bool) -> Array:
    """Return SiLU of the convolution: natively on CPU, where that is installed and takes it."""
    if use_native() and native_conv_supports(x, weight):
        return native_conv_silu(x, weight, bias, reset, reverse=reverse)
    return _conv_silu(-1 if reverse else 1, x, weight, bias, reset)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv_silu(step, x, weight, bias, reset):
    """Return SiLU of the convolution; the backward pass keeps the input only and convolves again.

    `step` is 1, or -1 if agents are read from the last to the first.
    """
    return jax.nn.silu(_conv(step, x, weight, bias, reset))


def _conv(step, x, weight, bias, reset):
    taps = weight.shape[0]
    return sum(_read(step, x, reset, taps - 1 - k) * weight[k] for k in range(taps)) + bias


def _read(step, x, reset, ago):
    """Return what every agent reads of the one `ago` agents before it."""
    return zero_where(_reset_since(step, reset, ago), _shifted(x, step * ago))


def _reset_since(step, reset, ago):
    """Say whether an agent or one of those before it, `ago` in all, was reset: [*batch, N]."""
    if reset is None or not ago:
        return None
    return reduce(operator.or_, (_shifted(reset[..., None], step * k) for k in range(ago)))[..., 0]


def _shifted(x, places):
    """Move every agent's row so many places later (earlier, if negative), zeros where none was."""
    n = x.shape[-2]
    if not places:
        return x
    if abs(places) >= n:
        return jnp.zeros_like(x)
    kept = lax.slice_in_dim(x, max(-places, 0), n - max(places, 0), axis=x.ndim - 2)
    return jnp.pad(kept, [(0, 0)] * (x.ndim - 2) + [(max(places, 0), max(-places, 0)), (0, 0)])


def _conv_silu_fwd(step, x, weight, bias, reset):
    return _conv_silu(step, x, weight, bias, reset), (x, weight, bias, reset)


def _conv_silu_bwd(step, residuals, gy):
    x, weight, bias, reset = residuals
    taps, rows = weight.shape[0], tuple(range(x.ndim - 1))
    y = _conv(step, x, weight, bias, reset)
    gate = jax.nn.sigmoid(y)
    g = gy * gate * (1 + y * (1 - gate))
    readers = [zero_where(_reset_since(step, reset, taps - 1 - k), g) for k in range(taps)]
    gx = sum(_shifted(readers[k], step * (k + 1 - taps)) * weight[k] for k in range(taps))
    read = [_read(step, x, reset, taps - 1 - k) for k in range(taps)]
    g_weight = jnp.stack([jnp.sum(v * g, axis=rows) for v in read])
    return gx, g_weight, jnp.sum(g, axis=rows), None


_conv_silu.defvjp(_conv_silu_fwd, _conv_silu_bwd)


class AbstractSSM(eqx.Module):
    """A state-space block without norms and residual; mixers apply its out-projection."""

    conv: eqx.AbstractVar[CausalConv]  # of what the state takes in
    dt_proj: eqx.AbstractVar[Dense]
    skip: eqx.AbstractVar[Float[Array, "..."]]
    out_proj: eqx.AbstractVar[Dense]
    has_fused_decoder: ClassVar[bool] = False  # whether decoders of one call (native, CUDA) know it

    @abstractmethod
    def project(self, x: Float[Array, "*batch E"]) -> MixerInputs:
        """Compute everything up to the convolution, of each agent by itself."""

    @abstractmethod
    def project_context(self, context: Float[Array, "*batch E"]) -> Float[Array, "*batch S"]:
        """Compute C, where it is read from a second sequence."""

    @abstractmethod
    def init_state(self, batch: tuple[int, ...], dtype: jnp.dtype | None) -> SSMState:
        """Return the state before anything was read: zeros.

        Args:
            batch: leading axes.
            dtype: of the inputs; states of the recurrence are in float32 or wider.
        """

    @abstractmethod
    def step(
        self,
        state: SSMState,
        inputs: MixerInputs,
        C: Float[Array, "*batch S"] | None,
        *,
        reset: Bool[Array, "*batch"] | None = None,
    ) -> tuple[SSMState, Float[Array, "*batch D"]]:
        """Read the next agent.

        Args:
            state: after the agents before.
            inputs: what `project` gave for the agent.
            C: read from the agent itself if None.
            reset: True where the state counts as zero.

        Returns:
            The state after the agent, and the output before the out-projection.
        """

    @abstractmethod
    def unroll(
        self,
        state: SSMState | None,
        inputs: MixerInputs,
        C: Float[Array, "*batch M S"] | None,
        alive: Bool[Array, "*batch M"] | None,
        *,
        reset: Bool[Array, "*batch M"] | None = None,
        reverse: bool = False,
    ) -> tuple[SSMState, Float[Array, "*batch M D"]]:
        """Read the next M agents, or M steps of one agent's time.

        Args:
            state: the state before them; None: nothing was read.
            inputs: what `project` gave.
            C: read from the agents themselves if None.
            alive: the dead leave the state as it was.
            reset: True where a new sequence starts, such as an episode: nothing before reaches it.
            reverse: read from the last to the first; a reset separates an agent from those after
                it.

        Returns:
            The state after the last one read, and the outputs before the out-projection.
        """

    @abstractmethod
    def decay(
        self,
        state: SSMState,
        inputs: MixerInputs,
        alive: Bool[Array, "*batch M"] | None,
        *,
        reverse: bool = False,
    ) -> Float[Array, "*batch S D"] | Float[Array, "*batch 1 D"]:
        """Return what `unroll` multiplies the scan's state by.

        Args:
            state: the state before the M agents.
            inputs: what `project` gave.
            alive: the dead leave the state as it was.
            reverse: read from the last to the first.
        """

    @abstractmethod
    def mixing(
        self,
        inputs: MixerInputs,
        C: Float[Array, "*batch N S"] | None,
        alive: Bool[Array, "*batch N"] | None,
        *,
        reverse: bool = False,
    ) -> Mixing:
        """Return what `unroll` does to agents that nothing comes before, as matrices.

        The values are the convolution's inputs. `finish` is linear and the same both ways, so that
        passes may be added before it.

        Args:
            inputs: what `project` gave.
            C: read from the agents themselves if None.
            alive: the others' columns are zero.
            reverse: read from the last to the first.
        """

    def metrics(self) -> dict[str, Float[Array, ""]]:
        """Return numbers to watch in training, such as `largest_step_size`."""
        return {}


MakeSSM = Callable[..., AbstractSSM]  # make(config, key=key, cross=cross)


def with_small_output(ssm: AbstractSSM) -> AbstractSSM:
    """Return a new block whose out-projection starts small."""
    weight = MIXED_GAIN * ssm.out_proj.weight
    return eqx.tree_at(lambda ssm: ssm.out_proj.weight, ssm, weight)


class BidirectionalSSM(AbstractMixer):
    """One set of weights, a pass in each direction: the encoder's mixer.

        u = RMSNorm(x);  f = SSM(u);  r = flip(SSM(flip(u)));  out = LayerNorm(x + f + r)

    Difference: as published (`cascade`) the reverse pass reads the forward pass's output, and they
    are multiplied, r = flip(SSM(flip(f))) and out = LayerNorm(x + f ⊙ r). That starts near 0 with
    hardly a gradient and grows with a high power of x: in training it first mixes nothing and then
    drowns x. The sum is also cheaper: both passes read the same in-projections, and share the
    out-projection.
    """

    pre_norm: RMSNorm
    ssm: AbstractSSM
    post_norm: LayerNorm
    cascade: bool = eqx.field(static=True)
    chunk: int | None = eqx.field(static=True)  # agents at a time; all if None

    def __init__(self, make: MakeSSM, config: NetworkConfig, *, key: Key[Array, ""]):
        self.pre_norm = RMSNorm(config.d_model)
        self.cascade = config.encoder.combine == "product"
        self.chunk = config.agent_chunk
        if self.cascade and self.chunk:
            raise UserError("network.agent_chunk needs network.encoder.combine sum")
        ssm = make(config, key=key, cross=False)
        self.ssm = ssm if self.cascade else with_small_output(ssm)
        self.post_norm = LayerNorm(config.d_model)

    def __call__(self, x, context=None, *, alive=None):
        if self.chunk and self.chunk < x.shape[-2] and spread.num_shares() == 1:
            return self._in_chunks(x, jnp.ones(x.shape[:-1], bool) if alive is None else alive)
        inputs = self.ssm.project(self.pre_norm(x))
        if self.cascade:
            # The dead come last: the living do not see them yet.
            forward = self.ssm.out_proj(self._pass(inputs, None))
            backward = self.ssm.out_proj(self._pass(self.ssm.project(forward), alive, reverse=True))
            return self.post_norm(x, forward * backward)
        both = self._pass(inputs, alive) + self._pass(inputs, alive, reverse=True)
        return self.post_norm(x, self.ssm.out_proj(both))

    def metrics(self):
        return self.ssm.metrics()

    def mixing(self, x, context=None, *, alive=None):
        """Return one matrix for both directions; with `cascade` the heads of one pass, then those
        of the other, whose outputs are multiplied.
        """
        inputs = self.ssm.project(self.pre_norm(x))
        if not self.cascade:
            both = [self.ssm.mixing(inputs, None, alive, reverse=back) for back in (False, True)]
            summed = replace(
                both[0],
                apply=lambda v: both[0].apply(v) + both[1].apply(v),
                offset=both[0].offset + both[1].offset,
            )
            return summed.then(lambda y: self.post_norm(x, self.ssm.out_proj(y)))
        first = self.ssm.mixing(inputs, None, None)
        again = self.ssm.project(self.ssm.out_proj(first.output))
        passes = (first, self.ssm.mixing(again, None, alive, reverse=True))

        def each(v: Array) -> Iterator[tuple[Mixing, Array]]:
            return zip(passes, jnp.split(v, 2, axis=-3), strict=True)

        def join(parts: Iterable[Any]) -> Array:
            return jnp.concatenate(list(parts), axis=-3)

        def finish(y: Array) -> Array:
            forward, backward = (self.ssm.out_proj(one.finish(part)) for one, part in each(y))
            return self.post_norm(x, forward * backward)

        return Mixing(
            values=join(one.values for one in passes),
            apply=lambda v: join(one.apply(part) for one, part in each(v)),
            finish=finish,
            offset=join(one.offset for one in passes),
        )

    def _in_chunks(self, x: Array, alive: Array) -> Array:
        """Compute both passes chunk by chunk, so that little is there of all agents at once.

        What the passes hand from chunk to chunk is found before: for the one from the end, all
        chunks are read twice.
        """
        axis, start = x.ndim - 2, self.ssm.init_state(x.shape[:-2], x.dtype)
        chunks = cut_agents((x, alive), required(self.chunk), axis=axis)

        def read(state: SSMState, chunk: tuple[Array, Array], *, reverse: bool):
            x, alive = chunk
            inputs = self.ssm.project(self.pre_norm(x))
            return self.ssm.unroll(state, inputs, None, alive, reverse=reverse)

        def back(state, chunk):
            return read(state, chunk, reverse=True)[0], state

        def both(state, chunk):
            agents, from_end = chunk
            state, forward = read(state, agents, reverse=False)
            backward = read(from_end, agents, reverse=True)[1]
            return state, self.post_norm(agents[0], self.ssm.out_proj(forward + backward))

        from_end = hand_on(back, start, chunks, reverse=True)[1]
        return join_agents(hand_on(both, start, (chunks, from_end))[1], x.shape[axis], axis=axis)

    def _pass(self, inputs: MixerInputs, alive: Array | None, *, reverse: bool = False) -> Array:
        return spread.unroll(self.ssm, None, inputs, None, alive, reverse=reverse)[1]


class NormedInputs(eqx.Module):
    """The block's inputs of an agent, and the agent itself for the residual."""

    x: Float[Array, "*batch E"]
    ssm: MixerInputs


class CausalSSM(AbstractCausalMixer):
    """LayerNorm(x + SSM(RMSNorm(x))): the decoder's mixers.

    As `cross`, C = W_C RMSNorm(context): as in cross-attention the context gives the query (which C
    is in a state-space model). Everything else comes from x, the action stream, which starts small
    beside the observations, as in MAT: at full size earlier agents' actions are noise at first
    (RWARE: half of MAT's return after 500,000 steps).
    """

    pre_norm: RMSNorm
    context_norm: RMSNorm | None  # of the second sequence, if there is one
    ssm: AbstractSSM
    post_norm: LayerNorm
    has_constant_state: ClassVar[bool] = True

    def __init__(
        self, make: MakeSSM, config: NetworkConfig, *, key: Key[Array, ""], cross: bool = False
    ):
        self.pre_norm = RMSNorm(config.d_model)
        self.context_norm = RMSNorm(config.d_model) if cross else None
        self.ssm = with_small_output(make(config, key=key, cross=cross))
        self.post_norm = LayerNorm(config.d_model, scale=MIXED_GAIN if cross else 1.0)

    def metrics(self):
        return self.ssm.metrics()

    @property
    def fused(self):
        return self.ssm if self.ssm.has_fused_decoder else None

    def project(self, x):
        return NormedInputs(x=x, ssm=self.ssm.project(self.pre_norm(x)))

    def project_context(self, context):
        return (
            self.ssm.project_context(self.context_norm(required(context)))
            if self.context_norm
            else None
        )

    def init_state(self, num_agents, batch=(), dtype=None):
        return self.ssm.init_state(batch, dtype)

    def step(self, state, inputs, context):
        state, y = self.ssm.step(state, inputs.ssm, context)
        return state, self._out(inputs.x, y)

    def unroll(self, state, inputs, context, alive=None):
        state, y = spread.unroll(self.ssm, state, inputs.ssm, context, alive)
        return state, self._out(inputs.x, y)

    def mixing(self, x, context=None, *, alive=None):
        inputs = self.project(x)
        mixed = self.ssm.mixing(inputs.ssm, self.project_context(context), alive)
        return mixed.then(lambda y: self._out(x, y))

    def _out(
        self, x: Float[Array, "*batch E"], y: Float[Array, "*batch D"]
    ) -> Float[Array, "*batch E"]:
        return self.post_norm(x, self.ssm.out_proj(y))


def init_ssm_state(
    batch: tuple[int, ...], d_state: int, convs: tuple[CausalConv, ...], dtype: jnp.dtype | None
) -> SSMState:
    """Return a state of zeros.

    Args:
        batch: leading axes.
        d_state: S, states per channel.
        convs: the convolutions; the first is that of the scan's channels.
        dtype: of the inputs; the default type if None.
    """
    dtype = dtype or jnp.zeros(()).dtype
    scanned = jnp.zeros(
        (*batch, d_state, convs[0].bias.shape[0]), jnp.promote_types(dtype, jnp.float32)
    )
    before = tuple(
        (jnp.zeros((*batch, conv.bias.shape[0]), dtype),) * (conv.weight.shape[0] - 1)
        for conv in convs
    )
    return SSMState(ssm_state=scanned, conv_state=before)


def living(
    x: Float[Array, "*batch F"], alive: Bool[Array, "*batch"] | None
) -> Float[Array, "*batch F"]:
    """Return x, zeros where `alive` is False (all alive if None)."""
    return x if alive is None else jnp.where(alive[..., None], x, 0.0)


def initial_dt_bias(
    size: int, *, key: Key[Array, ""], least: float = DT_MIN, most: float = DT_MAX
) -> Float[Array, "D"]:
    """Draw softplus⁻¹(Δ), with Δ log-uniform.

    Args:
        size: D, the number of step sizes.
        key: decides them.
        least: the smallest Δ.
        most: the largest Δ.
    """
    dt = jnp.exp(jax.random.uniform(key, (size,), minval=jnp.log(least), maxval=jnp.log(most)))
    return dt + jnp.log(-jnp.expm1(-dt))


def largest_step_size(dt_proj: Dense) -> dict[str, Float[Array, ""]]:
    """Return the largest Δ that an input of zeros gets, as a metric.

    Where Δ drifts upward in training, it is seen here, long before anything is NaN.
    """
    return {"step_size_max": step_size(required(dt_proj.bias)).max()}


def state_space_roles(make: MakeSSM) -> Roles:
    """Return the roles of a state-space block."""
    return Roles(
        encoder=partial(BidirectionalSSM, make),
        decoder=partial(CausalSSM, make),
        cross=partial(CausalSSM, make, cross=True),
    )
