"""From a decoder to the layers of the decode kernel: matrices turned and cut to powers of two, tables worked out.

All of it depends on the parameters only; in a rollout XLA moves it out of the loop over environment steps.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mam.networks.blocks import DecoderBlock
from mam.networks.decoder import Decoder
from mam.networks.kernels.decode_columns import LOG2_E, Columns
from mam.networks.kernels.decode_layers import Block, Conv, Dual, Linear, Mixer, Network, Norm, Selective
from mam.networks.layers import Dense, LayerNorm, RMSNorm
from mam.networks.mixers import AbstractCausalMixer
from mam.networks.mixers.base import required
from mam.networks.mixers.mamba import SelectiveSSM
from mam.networks.mixers.mamba2 import DualSSM
from mam.networks.mixers.ssm import CausalSSM

MIN_SIDE = 16  # of a matrix, but for the columns


def padded(size: int) -> int:
    """The next power of two a matrix may have as its side."""
    return max(MIN_SIDE, 1 << (size - 1).bit_length())


def pack(decoder: Decoder, columns: Columns, dtype: Any, *, merge: bool) -> Network:
    """The decoder as the kernel reads it.

    Args:
        decoder: of state-space mixers and discrete actions.
        columns: how environments lie.
        dtype: of the matrices.
        merge: one matrix for Δ in place of a product of two (`SelectiveSSM`).
    """
    rows = decoder.embed.rows().astype(jnp.float32)
    head = decoder.head
    return Network(
        embed=_linear(rows, dtype),
        blocks=tuple(
            _block(block, rows if index == 0 else None, columns, dtype, merge)
            for index, block in enumerate(decoder.blocks)
        ),
        hidden=_dense(head.hidden, dtype),
        norm=_norm(head.norm),
        out=_dense(head.out, dtype),
    )


def _block(block: DecoderBlock, rows, columns, dtype, merge) -> Block:
    return Block(
        mixer=_mixer(block.mixer, rows, columns, dtype, merge),
        mixer_norm=_norm(block.mixer_norm),
        cross=_mixer(block.cross, None, columns, dtype, merge),
        cross_norm=_norm(block.cross_norm),
        hidden=_dense(block.mlp.hidden, dtype),
        out=_dense(block.mlp.out, dtype),
        mlp_norm=_norm(block.mlp_norm),
    )


def _mixer(mixer: AbstractCausalMixer, rows: Float[Array, "K E"] | None, columns, dtype, merge) -> Mixer:
    """With `rows`, the embeddings of all tokens: the projections are tables, applied to a one-hot token."""
    assert isinstance(mixer, CausalSSM)
    if isinstance(mixer.ssm, SelectiveSSM):
        parts = {"x": mixer.ssm.in_proj.weight, "z": mixer.ssm.gate_proj.weight}
        biases, ssm = {}, _selective(mixer.ssm, columns, dtype, merge)
    else:
        assert isinstance(mixer.ssm, DualSSM)
        parts, biases = _dual_parts(mixer.ssm)
        ssm = _dual(mixer.ssm, columns, dtype)
    if rows is not None:
        normed = mixer.pre_norm(rows)
        parts = {name: _product(normed, weight) for name, weight in parts.items()}
    return Mixer(
        pre_norm=_norm(mixer.pre_norm) if rows is None else None,
        parts={name: _linear(weight, dtype, biases.get(name)) for name, weight in parts.items()},
        ssm=ssm,
        post_norm=_norm(mixer.post_norm),
    )


def _selective(ssm: SelectiveSSM, columns: Columns, dtype, merge) -> Selective:
    (d_inner, d_state), dt_rank = ssm.A_log.shape, ssm.dt_proj.weight.shape[0]
    low, B, *own = jnp.split(ssm.x_proj.weight, [dt_rank, dt_rank + d_state], axis=1)
    high, bias = ssm.dt_proj.weight, ssm.dt_proj.bias
    rates = jnp.pad(-LOG2_E * jnp.exp(ssm.A_log), ((0, 0), (0, columns.d_state - d_state)))
    rates = rates.astype(jnp.float32).reshape(d_inner, columns.copies, columns.own_states)
    return Selective(
        conv=_conv(ssm.conv.weight, ssm.conv.bias),
        dt=(_linear(_product(low, high), dtype, bias),) if merge else (_linear(low, dtype), _linear(high, dtype, bias)),
        B=_linear(B, dtype),
        C=None if ssm.context_proj is not None else _linear(own[0], dtype),
        rates=tuple(rates[:, :, j] for j in range(columns.own_states)),
        skip=_vector(ssm.skip),
        out=_dense(ssm.out_proj, dtype),
    )


def _dual_parts(ssm: DualSSM) -> tuple[dict[str, Array], dict[str, Array | None]]:
    """Weights and biases. Δ's columns are repeated for each channel of the head, so that no row is needed twice."""
    weights = {"x": ssm.in_proj.weight, "z": ssm.gate_proj.weight, **_states(ssm, ssm.state_proj.weight)}
    dt, bias = (_per_channel(ssm, required(v)) for v in (ssm.dt_proj.weight, ssm.dt_proj.bias))
    return weights | {"dt": dt}, {"dt": bias}


def _dual(ssm: DualSSM, columns: Columns, dtype) -> Dual:
    weights, biases = (_states(ssm, v) for v in (ssm.state_conv.weight, ssm.state_conv.bias))
    return Dual(
        convs={"x": _conv(ssm.conv.weight, ssm.conv.bias), **{k: _conv(weights[k], biases[k]) for k in weights}},
        rate=_vector(-LOG2_E * _per_channel(ssm, jnp.exp(ssm.A_log))),
        skip=_vector(_per_channel(ssm, ssm.skip)),
        norm=_norm(ssm.norm),
        out=_dense(ssm.out_proj, dtype),
    )


def _states(ssm: DualSSM, v: Array) -> dict[str, Array]:
    """The parts that belong to B and, unless it is read from a context, C."""
    names = ("B",) if ssm.context_proj is not None else ("B", "C")
    return dict(zip(names, jnp.split(v, len(names), axis=-1), strict=True))


def _per_channel(ssm: DualSSM, v: Float[Array, "*F H"]) -> Float[Array, "*F D"]:
    return jnp.repeat(v, ssm.norm.scale.shape[0] // ssm.A_log.shape[0], axis=-1)


def _conv(weight: Float[Array, "K F"], bias: Float[Array, "F"]) -> Conv:
    return Conv(taps=tuple(_vector(tap) for tap in weight), bias=_vector(bias))


def _norm(norm: LayerNorm | RMSNorm) -> Norm:
    offset = _vector(norm.offset) if isinstance(norm, LayerNorm) else None
    return Norm(scale=_vector(norm.scale), offset=offset, eps=norm.eps)


def _dense(dense: Dense, dtype) -> Linear:
    return _linear(dense.weight, dtype, dense.bias)


def _linear(weight: Float[Array, "I O"], dtype, bias: Float[Array, "O"] | None = None) -> Linear:
    pads = [(0, padded(size) - size) for size in weight.shape]
    return Linear(weight=jnp.pad(weight, pads).T.astype(dtype), bias=None if bias is None else _vector(bias))


def _vector(v: Float[Array, "F"]) -> Float[Array, "P 1"]:
    """A column, padded with zeros."""
    return jnp.pad(v, (0, padded(v.shape[0]) - v.shape[0])).astype(jnp.float32)[:, None]


def _product(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)
