"""All agents' decisions in one kernel: the loop of `decide`, for state-space decoders.

As XLA runs that loop each agent takes 40 to 60 launches, and nothing else takes time. Here a
program runs all agents of a few environments, and nothing leaves its multiprocessor but actions and
outputs.

* Activations are features × columns (`cuda_columns`): features are the long side of every product,
  environments the 8 columns that are the least the matrix units take. Fewer environments stand
  there several times and share out the work on the scan's states, so that no column is idle.
* Matrices stay in shared memory, as float16: at d_model 64, d_state 16 and one block they take
  176 KB with `mam` and 124 KB with `mam2`, and 2 to 4 KB are for exchanges between warps; an H100
  has 227 KB. So there is one program per multiprocessor. Where they do not fit, those at the end
  are read from the L2 cache at every use.
* Δ's two projections are merged into one matrix where that fits: a product less in the chain of
  products, each of which ends in an exchange between all warps.
* States, convolutions' inputs and vectors stay in registers: 64 of a thread's 255 are for states.
  With one warp per 16 channels (the height of a matrix instruction) and at most 8, that is 4
  environments per program at the sizes above. Fewer environments are faster, so there are no more
  of them than are needed to occupy the GPU.
* The first block's projections of a token are tables, like its embedding: rows of products computed
  before.

Operands are float16, not bfloat16, whose outputs are eight times as far off; sums, states, norms
and exponentials are float32. Compiled for an H100, a step of `mam` for 4 environments is 1,800
instructions per warp and 40 barriers.
"""

import importlib.util
import math
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mam.networks.actions import mask_noise
from mam.networks.decoder import Context, Decoder
from mam.networks.decoding.cuda_columns import COLUMNS
from mam.networks.decoding.cuda_pack import MIN_SIDE, padded
from mam.networks.decoding.cuda_programs import (
    SHARED_MEMORY,
    Inputs,
    Plan,
    Tiling,
    matrix_shapes,
    run,
)
from mam.networks.mixers.mamba import SelectiveSSM
from mam.networks.mixers.mamba2 import DualSSM

MULTIPROCESSORS = 132  # of an H100
STATES_PER_THREAD, MOST_STATES_PER_THREAD = 64, 128  # of 255 registers: better, and at most
MAX_TOKENS = 256


@runtime_checkable
class DecodeInputsLike(Protocol):
    """The part of `mam.networks.decoding.decide.DecodeInputs` that fused decoders read."""

    @property
    def context(self) -> Context: ...
    @property
    def mask(self) -> Bool[Array, "*batch N A"]: ...
    @property
    def noise(self) -> Float[Array, "*batch N A"]: ...


def kernel_supports(decoder: Decoder, operand_dtype: Any = jnp.float16) -> bool:
    """Say whether `decode_kernel` takes this decoder.

    Its agents must make one choice each, of at most 255, and its blocks be of Mamba and Mamba-2
    mixers only, in any mixture; d_model and d_inner must be powers of two from 16 on. States of one
    environment must fit into registers, and any one of the matrices, in `operand_dtype`, into a
    third of the shared memory.
    """
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return False
    ssms = decoder.fused
    if not decoder.embed.indexed or ssms is None or decoder.embed.table.shape[0] > MAX_TOKENS:
        return False
    sides = {size for ssm in ssms for size in ssm.out_proj.weight.shape}
    if len(_d_states(decoder)) > 1 or any(size != padded(size) for size in sides):
        return False
    if _states_per_thread(decoder, Tiling(1, _num_warps(decoder))) > MOST_STATES_PER_THREAD:
        return False
    largest = max(math.prod(shape) for shape in matrix_shapes(decoder, merge=False))
    return largest * jnp.dtype(operand_dtype).itemsize <= SHARED_MEMORY // 3


def decode_kernel(
    decoder: Decoder,
    ahead: DecodeInputsLike,
    *,
    operand_dtype: Any = jnp.float16,
    interpret: bool = False,
    tiling: Tiling | None = None,
) -> tuple[Int[Array, "*batch N"], Float[Array, "*batch N A"]]:
    """Choose all agents' actions, one after another: argmax(logits + noise), the lowest on ties.

    Has no gradient. May be mapped over seeds, decoders and all.

    Args:
        decoder: one that `kernel_supports`.
        ahead: what is known before the first agent acts, in the order of deciding.
        operand_dtype: of the operands of products; float32 is for comparisons, and slow.
        interpret: run as ordinary JAX operations, on any device.
        tiling: how the work is cut; chosen from the sizes if None.

    Returns:
        The actions, and the logits they were chosen by, before masking.

    Raises:
        ValueError: for a decoder that it does not support.
    """
    if not kernel_supports(decoder, operand_dtype):
        raise ValueError("no decode kernel for this decoder")
    *batch, num_agents, num_actions = ahead.mask.shape
    size = math.prod(batch)
    tiling = tiling or default_tiling(decoder, size)
    # 1. [batch, N, …], the batch a multiple of the environments per program. The scores of actions
    #    apart from their logits: where illegal, that is all there is; past the last action, less
    #    than any.
    score = mask_noise(ahead.noise, ahead.mask)
    obs_rep, blocks = ahead.context.obs_rep, ahead.context.blocks
    inputs = Inputs(
        obs_rep=_rows(obs_rep, size, tiling, obs_rep.shape[-1]),
        C=tuple(_rows(C, size, tiling, padded(C.shape[-1])) for C in blocks),
        score=_rows(score.astype(jnp.float32), size, tiling, padded(num_actions), fill=-jnp.inf),
    )
    # 2. The kernels.
    plan = Plan.of(decoder, padded(_d_states(decoder).pop()), tiling, operand_dtype, interpret)
    action, out = run(plan, decoder, inputs)
    # 3. As the caller has it.
    return (
        action[:size].reshape(*batch, num_agents),
        out[:size, :, :num_actions].reshape(*batch, num_agents, num_actions),
    )


def default_tiling(decoder: Decoder, batch: int) -> Tiling:
    """Choose as few environments per program as occupy the GPU, and as fit into registers.

    Args:
        decoder: one that `kernel_supports`.
        batch: the number of environments.
    """
    num_warps, num_envs = _num_warps(decoder), 1
    while (
        num_envs < COLUMNS
        and num_envs * MULTIPROCESSORS < batch
        and _states_per_thread(decoder, Tiling(2 * num_envs, num_warps)) <= STATES_PER_THREAD
    ):
        num_envs *= 2
    return Tiling(num_envs, num_warps)


def _rows(v: Array, size: int, tiling: Tiling, features: int, fill: float = 0.0) -> Array:
    """Reshape [*batch, N, F] to [batch, N, features], the batch padded to whole programs."""
    v = v.reshape(size, *v.shape[-2:])
    pads = [(0, -size % tiling.num_envs), (0, 0), (0, features - v.shape[-1])]
    return jnp.pad(v, pads, constant_values=fill)


def _ssms(decoder: Decoder) -> list[SelectiveSSM | DualSSM]:
    return decoder.fused or []


def _d_states(decoder: Decoder) -> set[int]:
    return {
        ssm.d_state if isinstance(ssm, DualSSM) else ssm.A_log.shape[1] for ssm in _ssms(decoder)
    }


def _num_warps(decoder: Decoder) -> int:
    """Return the warps of a program: one per 16 channels, at most 8."""
    return min(max(ssm.out_proj.weight.shape[0] for ssm in _ssms(decoder)) // MIN_SIDE, 8)


def _states_per_thread(decoder: Decoder, tiling: Tiling) -> float:
    states = sum(ssm.out_proj.weight.shape[0] for ssm in _ssms(decoder)) * padded(
        max(_d_states(decoder))
    )
    return states * tiling.num_envs / (32 * tiling.num_warps)
