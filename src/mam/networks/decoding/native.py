"""All agents' decisions in one call on CPU, by `mam_native`: the loop of `decide`.

As XLA runs that loop each agent takes some fifty small operations, and starting them takes most of
the time. In the package a thread runs a few environments through all agents, with states and
weights in its cache. All arithmetic is in float32, so the actions are those of the loop but for
ties within rounding.
"""

import math
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mam.kernels.native.library import LANES, library
from mam.networks.blocks import DecoderBlock
from mam.networks.decoder import Decoder, Embedded
from mam.networks.decoding.cuda import DecodeInputsLike
from mam.networks.layers import Dense, LayerNorm, RMSNorm
from mam.networks.mixers.base import AbstractCausalMixer
from mam.networks.mixers.mamba import SelectiveInputs, SelectiveSSM
from mam.networks.mixers.mamba2 import DualInputs, DualSSM
from mam.networks.mixers.roles import CausalConv, CausalSSM, NormedInputs

# Environments that go through the layers together: kMaxRows in native/src/cpp/decode.h.
MAX_ROWS = 16
ROWS_IN_WORK = 8  # Decode::kRowsInWork there
LOG2_E = math.log2(math.e)


def native_supports(decoder: Decoder, ahead: DecodeInputsLike) -> bool:
    """Say whether `native_decode` takes `decoder` and `ahead`.

    They must be all in float32, with one choice per agent and blocks of Mamba and Mamba-2 mixers
    only, in any mixture; d_model and d_inner must be multiples of 16.
    """
    ssms = decoder.fused
    if not decoder.embed.indexed or ssms is None:
        return False
    arrays = [ahead.noise, ahead.context.obs_rep, *jax.tree.leaves(decoder)]
    sides = [side for ssm in ssms for side in ssm.out_proj.weight.shape]
    return all(v.dtype == jnp.float32 for v in arrays) and all(side % LANES == 0 for side in sides)


def native_decode(
    decoder: Decoder, ahead: DecodeInputsLike
) -> tuple[Int[Array, "*batch N"], Float[Array, "*batch N A"]]:
    """Choose all agents' actions, one after another: argmax(logits + noise), the lowest on ties.

    Has no gradient. May be mapped over seeds, which then come one after another.

    Args:
        decoder: one that `native_supports`.
        ahead: what is known before the first agent acts, in the order of deciding.

    Returns:
        The actions, and the logits they were chosen by, before masking.
    """
    *batch, num_agents, num_actions = ahead.mask.shape
    size, obs_rep = math.prod(batch), ahead.context.obs_rep
    tokens = jnp.arange(decoder.embed.table.shape[0])
    workers = os.cpu_count() or 1
    rows = _rows(size, workers)
    pack = _Pack(rows)
    pack.decoder(
        decoder,
        decoder.embedder(obs_rep.dtype)(tokens),
        [_flat(C, size) for C in ahead.context.blocks],
    )
    scratch = (min(workers, -(-size // rows)), rows * pack.memory)
    outputs = [
        jax.ShapeDtypeStruct((size, num_agents), jnp.int32),
        jax.ShapeDtypeStruct((size, num_agents, num_actions), jnp.float32),
        jax.ShapeDtypeStruct(scratch, jnp.float32),
    ]
    library()
    action, out, _ = jax.ffi.ffi_call("mam_native_decode", outputs, vmap_method="sequential")(
        *(_flat(v, size) for v in (ahead.mask, ahead.noise, obs_rep)),
        *pack.arrays,
        sizes=np.asarray(pack.sizes, np.int64),
        eps=np.asarray(pack.eps, np.float32),
    )
    return action.reshape(*batch, num_agents), out.reshape(*batch, num_agents, num_actions)


def _rows(size: int, workers: int) -> int:
    """Return the environments per task: at most MAX_ROWS, and equal work for each thread."""
    rounds = max(1, -(-size // (workers * MAX_ROWS)))
    return max(1, -(-size // (workers * rounds)))


def _flat(v: Array, size: int) -> Array:
    return v.reshape(size, *v.shape[-2:])


class _Pack:
    """A decoder's parameters, in the order in which native/src/cpp/ffi_decode.cc takes them."""

    def __init__(self, rows: int):
        self.arrays: list[Array] = []
        self.sizes: list[int] = [rows]
        self.eps: list[float] = []
        self.widest = 0
        self.states = 0  # numbers that are remembered of earlier agents, per environment

    @property
    def memory(self) -> int:
        """Floats of scratch memory per environment: Decode::scratch_size."""
        return ROWS_IN_WORK * self.widest + self.states

    def decoder(self, decoder: Decoder, table: Embedded, contexts: Sequence[Array]) -> None:
        self.sizes.append(len(decoder.blocks))
        for block, context in zip(decoder.blocks, contexts, strict=True):
            self.block(block)
            self.arrays.append(context)
        self.table(*table)
        self.dense(decoder.head.hidden)
        self.norm(decoder.head.norm)
        self.dense(decoder.head.out)

    def block(self, block: DecoderBlock) -> None:
        self.mixer(block.mixer)
        self.norm(block.mixer_norm)
        self.mixer(block.cross)
        self.norm(block.cross_norm)
        self.dense(block.mlp.hidden)
        self.dense(block.mlp.out)
        self.norm(block.mlp_norm)

    def mixer(self, mixer: AbstractCausalMixer) -> None:
        assert isinstance(mixer, CausalSSM)
        ssm = mixer.ssm
        assert isinstance(ssm, SelectiveSSM | DualSSM)
        channels, taps = ssm.out_proj.weight.shape[0], ssm.conv.weight.shape[0]
        if isinstance(ssm, DualSSM):
            self.sizes += [1, channels, ssm.d_state, ssm.A_log.shape[0], taps, 1]
        else:
            self.sizes += [0, channels, ssm.A_log.shape[1], 1, taps, ssm.dt_proj.weight.shape[0]]
        self.states += channels * self.sizes[-4]
        self.norm(mixer.pre_norm)
        self.dense(ssm.in_proj)
        self.dense(ssm.gate_proj)
        self.conv(ssm.conv)
        rates = -LOG2_E * jnp.exp(ssm.A_log)
        if isinstance(ssm, DualSSM):
            self.dense(ssm.state_proj)
            self.dense(ssm.dt_proj)
            self.conv(ssm.state_conv)
            self.arrays.append(_padded(rates))
            self.norm(ssm.norm)
            skip = jnp.repeat(ssm.skip, channels // ssm.skip.shape[0])
        else:
            self.dense(ssm.x_proj)
            self.dense(ssm.dt_proj)
            self.arrays.append(jnp.swapaxes(rates.reshape(channels // LANES, LANES, -1), 1, 2))
            skip = ssm.skip
        self.arrays.append(skip)
        self.dense(ssm.out_proj)
        self.norm(mixer.post_norm)

    def table(self, x: Array, inputs: NormedInputs) -> None:
        """Add all tokens' embeddings `x`, and what the first mixer reads of them (`inputs`)."""
        own = inputs.ssm
        assert isinstance(own, SelectiveInputs | DualInputs)
        self.arrays += [x, own.x, jax.nn.silu(own.gate)]
        if isinstance(own, DualInputs):
            self.arrays += [_padded(own.BC), _padded(own.dt)]

    def dense(self, dense: Dense) -> None:
        weight = _padded(dense.weight)
        self.widest = max(self.widest, *weight.shape)
        self.arrays += [weight] if dense.bias is None else [weight, _padded(dense.bias)]

    def conv(self, conv: CausalConv) -> None:
        weight = _padded(conv.weight)
        self.states += math.prod(weight.shape)
        self.arrays += [weight, _padded(conv.bias)]

    def norm(self, norm: LayerNorm | RMSNorm) -> None:
        self.eps.append(norm.eps)
        self.arrays += [norm.scale, norm.offset] if isinstance(norm, LayerNorm) else [norm.scale]


def _padded(v: Array) -> Array:
    """Pad the last axis with zeros to a multiple of the widest vector."""
    return jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, -v.shape[-1] % LANES)])
