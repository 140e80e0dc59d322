"""The two kernels of decoding: one makes matrices of parameters, one runs the agents' loop."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mam.networks.actions import add_logits
from mam.networks.decoder import Decoder
from mam.networks.decoding.cuda_columns import COLUMNS, Columns, split_rows
from mam.networks.decoding.cuda_pack import Packer

SHARED_MEMORY = 227 * 1024  # of a program on an H100
EXCHANGE = 8 * 1024  # of it, for exchanges between warps: twice what is needed
PACKING_WARPS = 4


class Inputs(NamedTuple):
    """The inputs of a program's environments: arrays, or references to blocks of them."""

    obs_rep: Any  # [batch, N, E]
    C: tuple[Any, ...]  # of each block's cross mixer, [batch, N, S]
    score: Any  # [batch, N, A]: an action's, apart from its logit


@dataclass(frozen=True)
class Tiling:
    """The cut of the work of decoding into programs."""

    num_envs: int  # per program: 1, 2, 4 or 8
    num_warps: int
    shared_memory: int = SHARED_MEMORY  # in which matrices are kept, as far as they fit


@dataclass(frozen=True)
class Plan:
    """The static part of a call of the kernels."""

    columns: Columns
    num_warps: int
    dtype: Any  # of the matrices
    merge: bool  # whether Δ's projection is one matrix
    shapes: tuple[tuple[int, ...], ...]  # of the matrices
    kept: tuple[bool, ...]  # which of them are kept in shared memory, not read again at every use

    @classmethod
    def of(
        cls, decoder: Decoder, d_state: int, tiling: Tiling, dtype: Any, interpret: bool
    ) -> "Plan":
        """Merge Δ's projections where all matrices fit, and keep the first ones that do.

        Args:
            decoder: whose matrices they are.
            d_state: of its mixers, padded.
            tiling: how the work is cut.
            dtype: of the matrices.
            interpret: run as ordinary JAX operations, on any device.
        """
        columns, room = (
            Columns(tiling.num_envs, d_state, interpret),
            tiling.shared_memory - EXCHANGE,
        )
        itemsize = jnp.dtype(dtype).itemsize
        shapes = {merge: matrix_shapes(decoder, merge) for merge in (True, False)}
        sizes = {
            merge: [math.prod(shape) * itemsize for shape in shapes[merge]] for merge in shapes
        }
        merge = sum(sizes[True]) <= room
        if sum(sizes[merge]) > room:
            room -= max(sizes[merge])  # what is read at every use passes through shared memory
        kept = []
        for size in sizes[merge]:
            # Operands of float32 do not go to the matrix units, and would stay in registers.
            kept.append(size <= room and jnp.dtype(dtype) != jnp.float32)
            room -= size * kept[-1]
        return cls(columns, tiling.num_warps, dtype, merge, tuple(shapes[merge]), tuple(kept))


def matrix_shapes(decoder: Decoder, merge: bool) -> list[tuple[int, ...]]:
    """Return the shapes of a step's matrices, in the order in which they are made.

    Args:
        decoder: whose matrices they are.
        merge: one matrix for Δ in place of a product of two.
    """
    shapes = []

    def place(make):
        shapes.append(make().shape)
        return make

    def network(decoder):
        Packer(Columns(COLUMNS, COLUMNS, interpret=True), jnp.float32, merge, place).network(
            decoder
        )

    jax.eval_shape(network, jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), decoder))
    return shapes


def run(
    plan: Plan, decoder: Decoder, inputs: Inputs
) -> tuple[Int[Array, "batch N"], Float[Array, "batch N A"]]:
    """Run both kernels and return actions and outputs.

    Args:
        plan: of the call.
        decoder: whose parameters are used.
        inputs: of whole programs: the batch is a multiple of the environments per program.
    """
    batch, num_agents, num_actions = inputs.score.shape
    num_envs = plan.columns.num_envs
    outputs = [jax.ShapeDtypeStruct(shape, plan.dtype) for shape in plan.shapes]
    matrices = _launch(
        partial(_make_matrices, plan=plan),
        (decoder,),
        outputs,
        specs=((_whole(decoder),), _whole(outputs)),
        num_programs=len(outputs),
        num_warps=PACKING_WARPS,
        plan=plan,
        name="decode_matrices",
    )
    outputs = (
        jax.ShapeDtypeStruct((batch, num_agents), jnp.int32),
        jax.ShapeDtypeStruct((batch, num_agents, num_actions), jnp.float32),
    )
    return _launch(
        partial(_decide, plan=plan),
        (decoder, matrices, inputs),
        outputs,
        specs=(
            (_whole(decoder), _whole(matrices), _parts(inputs, num_envs)),
            _parts(outputs, num_envs),
        ),
        num_programs=batch // num_envs,
        num_warps=plan.num_warps,
        plan=plan,
        name="decode",
    )


def _launch(kernel, operands, outputs, *, specs, num_programs, num_warps, plan, name):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    return pl.pallas_call(
        kernel,
        outputs,
        grid=(num_programs,),
        in_specs=specs[0],
        out_specs=specs[1],
        interpret=plan.columns.interpret,
        name=name,
        # Without parameters of Triton's, some versions of JAX would give the kernel to another
        # compiler (Mosaic).
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=1),
    )(*operands)


def _whole(tree: Any) -> Any:
    """Return block specs by which every program has all of each array."""
    from jax.experimental import pallas as pl

    return jax.tree.map(lambda v: pl.BlockSpec(v.shape, lambda program: (0,) * len(v.shape)), tree)


def _parts(tree: Any, rows: int) -> Any:
    """Return block specs by which every program has `rows` rows of each array."""
    from jax.experimental import pallas as pl

    def part(v):
        return pl.BlockSpec(
            (rows, *v.shape[1:]), lambda program: (program,) + (0,) * (len(v.shape) - 1)
        )

    return jax.tree.map(part, tree)


def _make_matrices(decoder, *outputs, plan):
    """Make one matrix per program."""
    from jax.experimental import pallas as pl

    makes = []

    def place(make):
        makes.append(make)
        return make

    Packer(plan.columns, plan.dtype, plan.merge, place).network(decoder)
    for index, (make, output) in enumerate(zip(makes, outputs, strict=True)):

        @pl.when(pl.program_id(0) == index)
        def _(make=make, output=output):
            output[...] = make().astype(output.dtype)


def _decide(decoder, matrices, inputs, action, out, *, plan):
    """Run all agents of a program's environments, one after another."""
    columns, places = plan.columns, zip(matrices, plan.kept, strict=True)

    def place(_):
        matrix, kept = next(places)
        return matrix[...] if kept else lambda: matrix[...]

    network = Packer(columns, plan.dtype, plan.merge, place).network(decoder)
    envs = columns.env((COLUMNS,))
    state_envs, states = (
        columns.env((columns.own_states, COLUMNS)),
        columns.state((columns.own_states, COLUMNS)),
    )

    def agent(index, carry):
        state, token = carry
        # Reads come first, so that they are there when they are needed.
        here = jnp.full((COLUMNS,), index, jnp.int32)
        obs_rep = inputs.obs_rep[envs, here].astype(jnp.float32).T
        score = inputs.score[envs, here].T
        own = (state_envs, jnp.full(states.shape, index, jnp.int32), states)
        C = [split_rows(block[own].astype(jnp.float32)) for block in inputs.C]
        state, logits = network.step(columns, state, token, obs_rep, C)
        chosen = lax.argmax(add_logits(score, logits), 0, jnp.int32)
        # Columns of one environment write the same.
        action[envs, here] = chosen
        out[envs, here] = logits.T
        return state, chosen

    start = jnp.full((COLUMNS,), decoder.embed.table.shape[0] - 1, jnp.int32)
    lax.fori_loop(0, inputs.score.shape[1], agent, (network.init_state(columns), start))
