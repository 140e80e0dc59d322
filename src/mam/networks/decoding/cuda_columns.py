"""Activations of the decode kernel: features × columns, features the long side of every product.

Functions here are of values in a kernel. Sizes are powers of two, as Triton wants them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mam.kernels.cuda.launch import _instruction, exp2, multiply_add
from mam.kernels.selective_scan import DT_LIMIT

COLUMNS = 8  # the matrix units' narrowest product; Triton takes no narrower one
LOG2_E = 1.4426950408889634
GELU_SLOPE = -2 * LOG2_E * (2 / jnp.pi) ** 0.5
MAX_FLOAT16 = 65504.0
LOG1P_TERMS = 7  # of 2 artanh(s) = 2 Σ s^(2k+1) / (2k+1) with s ≤ 1/3: a relative error of 2e-8


@dataclass(frozen=True)
class Columns:
    """The columns: column c belongs to copy c // num_envs of environment c % num_envs.

    Fewer environments than columns stand there several times. The copies of an environment hold the
    same numbers but for the scan's states, which they share out: copy r has states r·J to
    (r + 1)·J − 1, J = d_state / copies.
    """

    num_envs: int
    d_state: int
    interpret: bool  # single instructions of the GPU are replaced by what they compute

    @property
    def copies(self) -> int:
        return COLUMNS // self.num_envs

    @property
    def own_states(self) -> int:
        """J: states of an environment in one of its columns."""
        return self.d_state // self.copies

    def env(self, shape: tuple[int, ...]) -> Int[Array, "..."]:
        """Return each column's environment, where columns are the last axis."""
        return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) % self.num_envs

    def state(self, shape: tuple[int, int]) -> Int[Array, "J C"]:
        """Return the number, from 0 to d_state − 1, of each copy's j-th state."""
        copy = lax.broadcasted_iota(jnp.int32, shape, 1) // self.num_envs
        return copy * self.own_states + lax.broadcasted_iota(jnp.int32, shape, 0)

    def zeros(self, features: int) -> Float[Array, "F C"]:
        return jnp.zeros((features, COLUMNS), jnp.float32)

    def spread(self, per_copy: Float[Array, "F R"]) -> Float[Array, "F C"]:
        """Repeat a number per copy in all its columns."""
        features = per_copy.shape[0]
        wide = jnp.broadcast_to(per_copy[:, :, None], (features, self.copies, self.num_envs))
        return wide.reshape(features, COLUMNS)

    def sum_copies(self, x: Float[Array, "F C"]) -> Float[Array, "F C"]:
        """Sum over an environment's copies; each of them gets the sum."""
        if self.copies == 1:
            return x
        shape = (x.shape[0], self.copies, self.num_envs)
        return jnp.broadcast_to(jnp.sum(x.reshape(shape), axis=1, keepdims=True), shape).reshape(
            x.shape
        )

    def own_rows(self, *vectors: Float[Array, "S C"]) -> list[list[Float[Array, "1 C"]]]:
        """Return the J rows that each copy needs, of one or two vectors over the states.

        Two go together: rows reach all warps through shared memory, at the cost of two barriers.
        """
        v = vectors[0] if len(vectors) == 1 else jnp.stack(vectors, axis=-1)
        if self.copies > 1:
            copy = lax.broadcasted_iota(jnp.int32, v.shape, 1) // self.num_envs
            mine = lax.broadcasted_iota(jnp.int32, v.shape, 0) // self.own_states == copy
            v = jnp.sum(
                jnp.where(mine, v, 0.0).reshape(self.copies, self.own_states, *v.shape[1:]), axis=0
            )
        rows = split_rows(v)
        if len(vectors) == 1:
            return [rows]
        pairs = [[half.reshape(1, COLUMNS) for half in jnp.split(row, 2, axis=-1)] for row in rows]
        return [list(rows) for rows in zip(*pairs, strict=True)]

    def multiply_add(self, a: Array, b: Array, c: Array) -> Array:
        return multiply_add(a, b, c, interpret=self.interpret)

    def sum_of_products(self, a: Sequence[Array], b: Sequence[Array]) -> Float[Array, "F C"]:
        total = a[0] * b[0]
        for x, y in zip(a[1:], b[1:], strict=True):
            total = self.multiply_add(x, y, total)
        return total

    def exp2(self, x: Array) -> Array:
        return exp2(x, interpret=self.interpret)

    def reciprocal(self, x: Array) -> Array:
        return 1 / x if self.interpret else _instruction("rcp.approx.ftz.f32 $0, $1;", x)

    def rsqrt(self, x: Array) -> Array:
        return lax.rsqrt(x) if self.interpret else _instruction("rsqrt.approx.ftz.f32 $0, $1;", x)

    def silu(self, x: Float[Array, "F C"]) -> Float[Array, "F C"]:
        return x * self.reciprocal(1 + self.exp2(-LOG2_E * x))

    def gelu(self, x: Float[Array, "F C"]) -> Float[Array, "F C"]:
        """Return the GELU in its tanh form: ½ x (1 + tanh t) = x / (1 + exp(−2t))."""
        slope = self.multiply_add(
            x * x, jnp.float32(0.044715 * GELU_SLOPE), jnp.float32(GELU_SLOPE)
        )
        return x * self.reciprocal(1 + self.exp2(x * slope))

    def bounded(self, x: Float[Array, "F C"]) -> Float[Array, "F C"]:
        """Clip to float16's range."""
        return jnp.clip(x, -MAX_FLOAT16, MAX_FLOAT16)

    def step_size(self, x: Float[Array, "F C"]) -> Float[Array, "F C"]:
        """Return what `mam.kernels.selective_scan.step_size` does, without a library call.

        log(1 + e) = 2 artanh(e / (2 + e)) keeps small Δ exact.
        """
        e = self.exp2(-LOG2_E * jnp.abs(x))
        s = e * self.reciprocal(2 + e)
        series = jnp.float32(2 / (2 * LOG1P_TERMS - 1))
        for k in reversed(range(LOG1P_TERMS - 1)):
            series = self.multiply_add(s * s, series, jnp.float32(2 / (2 * k + 1)))
        return jnp.minimum(self.multiply_add(s, series, jnp.maximum(x, 0.0)), DT_LIMIT)


def split_rows(v: Float[Array, "J ..."]) -> list[Float[Array, "1 ..."]]:
    return list(jnp.split(v, v.shape[0], axis=0)) if v.shape[0] > 1 else [v]
