"""The decoder's layers as the decode kernel runs them, one agent at a time.

Each stands for a module of `mam.networks`. Their arrays are values in the kernel, not parameters;
`cuda_pack` makes them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mam.networks.decoding.cuda_columns import COLUMNS, Columns

Vector = Float[Array, "F 1"]
Row = Float[Array, "1 C"]


@dataclass(frozen=True)
class Linear:
    """y = W x + b, with operands of the weights' type and sums in float32."""

    # What is read at every use is a function.
    weight: Float[Array, "O I"] | Callable[[], Float[Array, "O I"]]
    bias: Vector | None = None

    def __call__(self, x: Float[Array, "I C"]) -> Float[Array, "O C"]:
        weight = self.weight() if callable(self.weight) else self.weight
        precision = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
        y = jnp.dot(
            weight, x.astype(weight.dtype), precision=precision, preferred_element_type=jnp.float32
        )
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Norm:
    """LayerNorm, or RMSNorm if there is no offset."""

    scale: Vector
    offset: Vector | None
    eps: float

    def __call__(self, columns: Columns, x: Float[Array, "F C"]) -> Float[Array, "F C"]:
        features, width = x.shape
        if self.offset is None:
            square = jnp.sum(x * x, axis=0, keepdims=True) / features
            return x * columns.rsqrt(square + self.eps) * self.scale
        # Both means in one sum over the features: each such sum crosses warps, at the cost of two
        # barriers.
        means = jnp.sum(jnp.stack([x, x * x], axis=-1), axis=0, keepdims=True) / features
        mean, square = (v.reshape(1, width) for v in jnp.split(means, 2, axis=-1))
        inverse = columns.rsqrt(jnp.maximum(square - mean * mean, 0.0) + self.eps)
        return columns.multiply_add((x - mean) * inverse, self.scale, self.offset)


@dataclass(frozen=True)
class Conv:
    """`CausalConv`, with its SiLU."""

    taps: tuple[Vector, ...]  # d_conv, the oldest input's first
    bias: Vector

    def init_state(self, columns: Columns) -> tuple[Float[Array, "F C"], ...]:
        return (columns.zeros(self.bias.shape[0]),) * (len(self.taps) - 1)

    def __call__(
        self, columns: Columns, before: tuple[Float[Array, "F C"], ...], x: Float[Array, "F C"]
    ) -> tuple[tuple[Float[Array, "F C"], ...], Float[Array, "F C"]]:
        total, window = self.bias, (*before, x)
        for v, tap in zip(window, self.taps, strict=True):
            total = columns.multiply_add(v, tap, total)
        return window[1:], columns.silu(total)


class State(NamedTuple):
    """A mixer's memory of earlier agents."""

    conv: dict[str, tuple[Float[Array, "F C"], ...]]  # the last inputs of each convolution
    # J arrays: each column has an environment's J states, or its share of them.
    ssm: tuple[Float[Array, "D C"], ...]


@dataclass(frozen=True)
class Selective:
    """`SelectiveSSM` after its in-projections, which give x and z."""

    conv: Conv
    dt: tuple[Linear, ...]  # one matrix, or the two whose product it is
    B: Linear
    C: Linear | None
    rates: tuple[Float[Array, "D R"], ...]  # A / ln 2 of each copy's j-th state
    skip: Vector
    out: Linear

    def init_state(self, columns: Columns) -> State:
        ssm = (columns.zeros(self.skip.shape[0]),) * columns.own_states
        return State({"x": self.conv.init_state(columns)}, ssm)

    def __call__(
        self, columns: Columns, state: State, inputs: dict[str, Array], C: list[Row] | None
    ) -> tuple[State, Float[Array, "E C"]]:
        conv, x = self.conv(columns, state.conv["x"], inputs["x"])
        dt = x
        for layer in self.dt:
            dt = layer(dt)
        dt = columns.step_size(dt)
        B, *own = (
            columns.own_rows(self.B(x))
            if self.C is None
            else columns.own_rows(self.B(x), self.C(x))
        )
        decays = [columns.exp2(dt * columns.spread(rate)) for rate in self.rates]
        h, y = _recur(columns, state.ssm, decays, dt * x, B, C or own[0])
        y = columns.multiply_add(self.skip, x, y) * columns.silu(inputs["z"])
        return State({"x": conv}, h), self.out(columns.bounded(y))


@dataclass(frozen=True)
class Dual:
    """`DualSSM` after its in-projections.

    They give x, z, Δ before the softplus, B and, unless it is read from a context, C. What belongs
    to a head stands in each of its channels.
    """

    convs: dict[str, Conv]  # of x, B and C
    rate: Vector  # A / ln 2
    skip: Vector
    norm: Norm
    out: Linear

    def init_state(self, columns: Columns) -> State:
        conv = {name: part.init_state(columns) for name, part in self.convs.items()}
        return State(conv, (columns.zeros(self.skip.shape[0]),) * columns.own_states)

    def __call__(
        self, columns: Columns, state: State, inputs: dict[str, Array], C: list[Row] | None
    ) -> tuple[State, Float[Array, "E C"]]:
        parts = {
            name: conv(columns, state.conv[name], inputs[name]) for name, conv in self.convs.items()
        }
        conv, x = {name: before for name, (before, _) in parts.items()}, parts["x"][1]
        B, *own = columns.own_rows(*(parts[name][1] for name in ("B", "C") if name in parts))
        dt = columns.step_size(inputs["dt"])
        decays = [columns.exp2(dt * self.rate)] * len(state.ssm)
        h, y = _recur(columns, state.ssm, decays, dt * x, B, C or own[0])
        y = columns.multiply_add(self.skip, x, y) * columns.silu(inputs["z"])
        return State(conv, h), self.out(self.norm(columns, y))


def _recur(columns, h, decays, u, B, C):
    """Return the states after the agent, decay ⊙ h + u ⊗ B, and Σ h C."""
    h = tuple(columns.multiply_add(a, v, u * b) for a, v, b in zip(decays, h, B, strict=True))
    return h, columns.sum_copies(columns.sum_of_products(h, C))


@dataclass(frozen=True)
class Mixer:
    """`CausalSSM`, which projects the normed input or, in the first block, the token."""

    pre_norm: Norm | None
    parts: dict[str, Linear]
    ssm: Selective | Dual
    post_norm: Norm

    def __call__(
        self,
        columns: Columns,
        state: State,
        x: Float[Array, "E C"],
        token: Float[Array, "K C"],
        C: list[Row] | None,
    ) -> tuple[State, Float[Array, "E C"]]:
        source = token if self.pre_norm is None else self.pre_norm(columns, x)
        inputs = {name: part(source) for name, part in self.parts.items()}
        state, y = self.ssm(columns, state, inputs, C)
        return state, self.post_norm(columns, x + y)


@dataclass(frozen=True)
class Block:
    """`DecoderBlock`."""

    mixer: Mixer
    mixer_norm: Norm
    cross: Mixer
    cross_norm: Norm
    hidden: Linear
    out: Linear
    mlp_norm: Norm

    def __call__(
        self,
        columns: Columns,
        state: tuple[State, State],
        x: Float[Array, "E C"],
        token: Float[Array, "K C"],
        obs_rep: Float[Array, "E C"],
        C: list[Row],
    ) -> tuple[tuple[State, State], Float[Array, "E C"]]:
        mixer_state, mixed = self.mixer(columns, state[0], x, token, None)
        x = self.mixer_norm(columns, x + mixed)
        cross_state, crossed = self.cross(columns, state[1], x, token, C)
        x = self.cross_norm(columns, obs_rep + crossed)
        x = self.mlp_norm(columns, x + self.out(columns.gelu(self.hidden(x))))
        return (mixer_state, cross_state), x


@dataclass(frozen=True)
class Network:
    """`Decoder`."""

    embed: Linear  # all tokens' embeddings
    num_tokens: int  # padded
    blocks: tuple[Block, ...]
    hidden: Linear
    norm: Norm
    out: Linear

    def init_state(self, columns: Columns) -> tuple[tuple[State, State], ...]:
        return tuple(
            (b.mixer.ssm.init_state(columns), b.cross.ssm.init_state(columns)) for b in self.blocks
        )

    def step(
        self,
        columns: Columns,
        states: tuple[tuple[State, State], ...],
        token: Int[Array, "C"],
        obs_rep: Float[Array, "E C"],
        C: list[list[Row]],
    ) -> tuple[tuple[tuple[State, State], ...], Float[Array, "A C"]]:
        """Return the states after the next agent, and its output.

        Args:
            columns: what the columns are.
            states: after the agents before, of every block.
            token: the action before, or the start token.
            obs_rep: the agent's observation representation.
            C: the rows of the agent's C, of every block.
        """
        # Rows of a table are looked up by a product: it leaves them where later products need them,
        # a load does not.
        one_hot = lax.broadcasted_iota(jnp.int32, (self.num_tokens, COLUMNS), 0) == token[None]
        one_hot = one_hot.astype(jnp.float32)
        x, new = self.embed(one_hot), []
        for block, state, own in zip(self.blocks, states, C, strict=True):
            state, x = block(columns, state, x, one_hot, obs_rep, own)
            new.append(state)
        return tuple(new), self.out(self.norm(columns, columns.gelu(self.hidden(x))))
