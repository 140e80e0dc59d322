"""From a decoder's parameters to the layers of the decode kernel.

Matrices are transposed, cut, multiplied and rounded by a kernel of its own, before. As XLA
operations that would be some thirty launches per joint action, which XLA does not move out of a
rollout's loop; and what the decode kernel computes by itself Triton keeps in registers, where there
is no space, not in shared memory. Vectors are read where they are. Sizes that are not powers of two
are filled up with zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mam.networks.blocks import DecoderBlock
from mam.networks.decoder import Decoder
from mam.networks.decoding.cuda_columns import LOG2_E, Columns
from mam.networks.decoding.cuda_layers import (
    Block,
    Conv,
    Dual,
    Linear,
    Mixer,
    Network,
    Norm,
    Selective,
    Vector,
)
from mam.networks.layers import Dense, LayerNorm, RMSNorm
from mam.networks.mixers.base import AbstractCausalMixer
from mam.networks.mixers.mamba import SelectiveSSM
from mam.networks.mixers.mamba2 import DualSSM
from mam.networks.mixers.roles import CausalSSM

MIN_SIDE = 16  # of a matrix, but for the columns


Cut = tuple[int, int]  # a range of columns


def padded(size: int) -> int:
    """Return the next power of two a matrix may have as its side."""
    return max(MIN_SIDE, 1 << (size - 1).bit_length())


Make = Callable[[], Float[Array, "O I"]]


@dataclass(frozen=True)
class Packer:
    """Makes layers of modules whose parameters are references (or arrays)."""

    columns: Columns
    dtype: Any  # of the matrices
    merge: bool  # one matrix for Δ in place of a product of two
    place: Callable[[Make], Any]  # given what makes a weight, what the layer is to have; in order

    def network(self, decoder: Decoder) -> Network:
        embed, head = decoder.embed, decoder.head

        def rows():
            return self.norm(embed.norm)(self.columns, self.columns.gelu(_matrix(embed.table)))

        return Network(
            embed=Linear(self.place(rows)),
            num_tokens=padded(embed.table.shape[0]),
            blocks=tuple(
                self.block(block, None if i else rows) for i, block in enumerate(decoder.blocks)
            ),
            hidden=self.dense(head.hidden),
            norm=self.norm(head.norm),
            out=self.dense(head.out),
        )

    def block(self, block: DecoderBlock, rows: Make | None) -> Block:
        return Block(
            mixer=self.mixer(block.mixer, rows),
            mixer_norm=self.norm(block.mixer_norm),
            cross=self.mixer(block.cross, None),
            cross_norm=self.norm(block.cross_norm),
            hidden=self.dense(block.mlp.hidden),
            out=self.dense(block.mlp.out),
            mlp_norm=self.norm(block.mlp_norm),
        )

    def mixer(self, mixer: AbstractCausalMixer, rows: Make | None) -> Mixer:
        """Make a mixer's layers; with `rows`, its projections are tables over all tokens.

        Args:
            mixer: a `CausalSSM`.
            rows: all tokens' embeddings as columns, in the first block.
        """
        assert isinstance(mixer, CausalSSM)
        make = self.linear
        if rows is not None:
            make = partial(self.table, lambda: self.norm(mixer.pre_norm)(self.columns, rows()))
        if isinstance(mixer.ssm, SelectiveSSM):
            parts, ssm = {}, self.selective(mixer.ssm)
        else:
            assert isinstance(mixer.ssm, DualSSM)
            parts, ssm = self.dual_parts(mixer.ssm, make), self.dual(mixer.ssm)
        return Mixer(
            pre_norm=self.norm(mixer.pre_norm) if rows is None else None,
            parts={
                "x": make(mixer.ssm.in_proj.weight),
                "z": make(mixer.ssm.gate_proj.weight),
                **parts,
            },
            ssm=ssm,
            post_norm=self.norm(mixer.post_norm),
        )

    def selective(self, ssm: SelectiveSSM) -> Selective:
        d_state, dt_rank = ssm.A_log.shape[1], ssm.dt_proj.weight.shape[0]
        B, C = ((dt_rank + i * d_state, dt_rank + (i + 1) * d_state) for i in range(2))
        weight, dt = ssm.x_proj.weight, ssm.dt_proj
        if self.merge:
            merged = self.place(
                lambda: self.product(_matrix(dt.weight), _matrix(weight, (0, dt_rank)))
            )
            steps = (Linear(merged, _vector(dt.bias)),)
        else:
            steps = (self.linear(weight, (0, dt_rank)), self.dense(dt))
        return Selective(
            conv=self.conv(ssm.conv.weight, ssm.conv.bias),
            dt=steps,
            B=self.linear(weight, B),
            C=None if ssm.context_proj is not None else self.linear(weight, C),
            rates=tuple(
                self.rate(_own_states(ssm.A_log, self.columns, j))
                for j in range(self.columns.own_states)
            ),
            skip=_vector(ssm.skip),
            out=self.dense(ssm.out_proj),
        )

    def dual_parts(self, ssm: DualSSM, make: Callable[..., Linear]) -> dict[str, Linear]:
        # Δ's rows are repeated for each channel of the head: a product's row cannot be read twice.
        channels = ssm.norm.scale.shape[0] // ssm.A_log.shape[0]
        dt = make(
            ssm.dt_proj.weight, bias=_vector(ssm.dt_proj.bias, repeat=channels), repeat=channels
        )
        return {"dt": dt} | {
            name: make(ssm.state_proj.weight, cut) for name, cut in _states(ssm).items()
        }

    def dual(self, ssm: DualSSM) -> Dual:
        channels = ssm.norm.scale.shape[0] // ssm.A_log.shape[0]
        states = {
            name: self.conv(ssm.state_conv.weight, ssm.state_conv.bias, cut)
            for name, cut in _states(ssm).items()
        }
        return Dual(
            convs={"x": self.conv(ssm.conv.weight, ssm.conv.bias), **states},
            rate=self.rate(_vector(ssm.A_log, repeat=channels)),
            skip=_vector(ssm.skip, repeat=channels),
            norm=self.norm(ssm.norm),
            out=self.dense(ssm.out_proj),
        )

    def rate(self, log: Array) -> Array:
        """Return A / ln 2, given log(−A)."""
        return -LOG2_E * self.columns.exp2(LOG2_E * log)

    def conv(self, weight: Any, bias: Any, cut: Cut | None = None) -> Conv:
        return Conv(
            tuple(_vector(weight, cut, row=k) for k in range(weight.shape[0])), _vector(bias, cut)
        )

    def norm(self, norm: LayerNorm | RMSNorm) -> Norm:
        return Norm(
            _vector(norm.scale),
            _vector(norm.offset) if isinstance(norm, LayerNorm) else None,
            norm.eps,
        )

    def dense(self, dense: Dense) -> Linear:
        return self.linear(dense.weight, bias=None if dense.bias is None else _vector(dense.bias))

    def linear(
        self, weight: Any, cut: Cut | None = None, *, bias: Vector | None = None, repeat: int = 1
    ) -> Linear:
        """Make a layer of (some of) the columns of [I, O].

        Args:
            weight: [I, O].
            cut: the range of columns; all if None.
            bias: of the layer.
            repeat: how many times each column is taken.
        """
        return Linear(self.place(lambda: _matrix(weight, cut, repeat)), bias)

    def table(
        self, operand: Make, weight: Any, cut: Cut | None = None, *, bias=None, repeat: int = 1
    ) -> Linear:
        """Make a table of what `linear` would make of the columns of an operand.

        Args:
            operand: makes the columns.
            weight: as in `linear`, as are cut, bias and repeat.
            cut: the range of columns.
            bias: of the layer.
            repeat: how many times each column is taken.
        """

        def make():
            product = self.product(_matrix(weight, cut, repeat), operand())
            return product if bias is None else product + bias

        return Linear(self.place(make))

    def product(self, a: Float[Array, "O H"], b: Float[Array, "H I"]) -> Float[Array, "O I"]:
        return Linear(a.astype(self.dtype))(b)


def _states(ssm: DualSSM) -> dict[str, Cut]:
    """Return the columns of B and, unless it is read from a context, of C in the projection."""
    names = ("B",) if ssm.context_proj is not None else ("B", "C")
    return {name: (i * ssm.d_state, (i + 1) * ssm.d_state) for i, name in enumerate(names)}


def _own_states(v: Any, columns: Columns, j: int) -> Float[Array, "D R"]:
    """Return each copy's j-th state of [D, S]."""
    shape = (v.shape[0], columns.copies)
    state = _iota(shape, 1) * columns.own_states + j
    return _pick(
        v, (_iota(shape, 0), state), state < v.shape[1] if v.shape[1] < columns.d_state else None
    )


def _matrix(v: Any, cut: Cut | None = None, repeat: int = 1) -> Float[Array, "O I"]:
    """Return columns of [I, O], each `repeat` times, transposed."""
    start, stop = cut or (0, v.shape[1])
    size = (v.shape[0], (stop - start) * repeat)
    shape = tuple(padded(n) for n in size)
    i, o = _iota(shape, 0), _iota(shape, 1)
    return _pick(
        v, (i, start + o // repeat), None if shape == size else (i < size[0]) & (o < size[1])
    ).T


def _vector(
    v: Any,
    cut: Cut | None = None,
    repeat: int = 1,
    row: int | None = None,
    column: int | None = None,
) -> Vector:
    """Return entries of [F], or of a row or a column of a matrix, each `repeat` times."""
    start, stop = cut or (0, v.shape[0 if row is None else 1])
    size = (stop - start) * repeat
    i = _iota((padded(size), 1), 0)
    index = (start + i // repeat,)
    index = index if row is None else (jnp.full_like(i, row), *index)
    index = index if column is None else (*index, jnp.full_like(i, column))
    return _pick(v, index, None if padded(size) == size else i < size)


def _pick(v: Any, index: tuple[Array, ...], there: Array | None) -> Array:
    """Return v[index] in float32, zero where it is not `there`."""
    if there is None:
        return v[index].astype(jnp.float32)
    inside = tuple(jnp.where(there, i, 0) for i in index)
    return jnp.where(there, v[inside], 0.0).astype(jnp.float32)


def _iota(shape: tuple[int, ...], axis: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)
