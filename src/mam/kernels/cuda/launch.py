"""What the kernels share: a launch whose blocks are named by axes, and single GPU instructions.

Pallas is imported inside functions: the import takes a while, and only running a kernel needs it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def launch(
    kernel: Callable[..., None],
    operands: Sequence[tuple[jax.Array | None, str]],
    outputs: Sequence[tuple[Any, str]],
    *,
    sizes: Mapping[str, int],
    blocks: Mapping[str, int | None],
    grid: Sequence[str],
    interpret: bool,
    name: str,
) -> tuple[jax.Array | None, ...]:
    """Run a Pallas-Triton kernel, one warp per program.

    Args:
        kernel: takes a reference to its block of each operand and each output; None for each that
            is None.
        operands: an array, or None, and its axes, a letter each.
        outputs: a type, or None for no output, and axes.
        sizes: of the axes.
        blocks: per axis that is cut, the length of a program's block; None for a block of one
            without the axis.
        grid: the axes that are cut, those of neighbouring programs first. Letters of one word are
            cut together.
        interpret: run as ordinary JAX operations, on any device.
        name: of the kernel, for profiles.

    Returns:
        The outputs, None for each whose type is None.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    place = {axis: i for i, axes in enumerate(grid) for axis in axes}
    block = {axis: size for axis, size in sizes.items() if axis not in place} | dict(blocks)

    def spec(axes):
        return pl.BlockSpec(
            tuple(block[axis] for axis in axes),
            lambda *program: tuple(program[place[axis]] if axis in place else 0 for axis in axes),
        )

    return pl.pallas_call(
        kernel,
        tuple(
            dtype and jax.ShapeDtypeStruct([sizes[axis] for axis in axes], dtype)
            for dtype, axes in outputs
        ),
        grid=tuple(sizes[axes[0]] // (block[axes[0]] or 1) for axes in grid),
        in_specs=tuple(None if v is None else spec(axes) for v, axes in operands),
        out_specs=tuple(None if dtype is None else spec(axes) for dtype, axes in outputs),
        interpret=interpret,
        name=name,
        # Without parameters of Triton's, some versions of JAX would give the kernel to another
        # compiler (Mosaic).
        compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
    )(*(v for v, _ in operands))


def multiply_add(a, b, c, *, interpret):
    """Return a b + c, rounded once.

    In Triton as XLA runs it, a product is rounded before it is added: two instructions, not one.

    Args:
        a: blocks of float32, like b and c of shapes that broadcast.
        b: the other factors.
        c: what is added to the products.
        interpret: compute it by ordinary JAX operations.
    """
    return a * b + c if interpret else _instruction("fma.rn.f32 $0, $1, $2, $3;", a, b, c)


def exp2(x, *, interpret):
    """Return 2^x, zero below 2^-126; by ordinary JAX operations if `interpret`.

    XLA's own keeps those results, at four instructions instead of one.
    """
    return jnp.exp2(x) if interpret else _instruction("ex2.approx.ftz.f32 $0, $1;", x)


def _instruction(assembly, *operands):
    """Apply an instruction to each element of operands of float32."""
    from jax.experimental.pallas import triton

    operands = jnp.broadcast_arrays(*operands)
    [result] = triton.elementwise_inline_asm(
        assembly,
        args=operands,
        constraints="=f" + ",f" * len(operands),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(operands[0].shape, jnp.float32)],
    )
    return result
