"""Norms and dense layers in native code against double precision, and where they are taken."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.kernels.native.dense import BLOCK, native_product, native_product_supports
from mam.kernels.native.library import without_native
from mam.kernels.native.norm import native_norm, native_norm_supports
from mam.networks.layers import Dense, LayerNorm, RMSNorm

pytest.importorskip("mam_native", reason="the native kernels are not installed: make native")

EPS = 1e-5


@functools.partial(jax.jit, static_argnums=0)
def both_ways(f, gradient, *arguments):
    """The output, and the gradients of all arguments."""
    y, pull_back = jax.vjp(f, *arguments)
    return y, pull_back(gradient)


def assert_close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.max(np.abs(np.asarray(a) - b)) <= 1e-5 * max(np.max(np.abs(b)), 1e-3)


def in_double(f, *arguments):
    with jax.enable_x64(True):
        return jax.tree.map(
            np.asarray,
            both_ways(f, *jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), arguments)),
        )


def plain_norm(x, plus, scale, offset):
    x = x if plus is None else x + plus
    centred = x if offset is None else x - x.mean(-1, keepdims=True)
    y = centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + EPS) * scale
    return y if offset is None else y + offset


def native(x, plus, scale, offset):
    return native_norm(x, plus, scale, offset, eps=EPS)


def norm_problem(seed, *batch, size, has_plus=True, has_offset=True):
    """The output's gradient, and the arguments."""
    rng = np.random.default_rng(seed)
    gradient, x, plus = rng.normal(1.0, 2.0, size=(3, *batch, size)).astype(np.float32)
    scale, offset = rng.normal(size=(2, size)).astype(np.float32)
    return gradient, x, plus if has_plus else None, scale, offset if has_offset else None


@pytest.mark.parametrize("has_plus", [False, True])
@pytest.mark.parametrize("has_offset", [False, True])
def test_norms(isa, has_plus, has_offset):
    rng = np.random.default_rng(0)
    for seed in range(4):
        batch = rng.integers(1, 12, size=2)
        size = 16 * int(rng.integers(1, 9))
        problem = norm_problem(seed, *batch, size=size, has_plus=has_plus, has_offset=has_offset)
        assert_close(both_ways(native, *problem), in_double(plain_norm, *problem))


def test_norms_of_each_seed():
    problems = [norm_problem(k, 40, size=32) for k in range(2)]
    together = jax.jit(jax.vmap(functools.partial(both_ways.__wrapped__, native)))(
        *jax.tree.map(lambda *v: np.stack(v), *problems)
    )
    for k, problem in enumerate(problems):
        alone = both_ways(native, *problem)
        assert jax.tree.all(
            jax.tree.map(lambda a, b, k=k: np.array_equal(a[k], b), together, alone)
        )


@pytest.mark.parametrize(("size", "is_native"), [(16, True), (24, False)])
def test_the_norms_take_it(size, is_native):
    x, plus = jax.random.normal(jax.random.key(0), (2, 3, 5, size))
    for norm, arguments in ((LayerNorm(size), (x, plus)), (RMSNorm(size), (x,))):
        run = jax.jit(lambda *a, norm=norm: norm(*a))
        assert ("mam_native_norm" in run.lower(*arguments).as_text()) == is_native
        y = run(*arguments)
        with without_native():
            np.testing.assert_allclose(y, run(*arguments), rtol=1e-5, atol=1e-5)
    assert native_norm_supports(x, None, plus) == is_native
    assert not native_norm_supports(x.astype(jnp.bfloat16))


def test_a_norm_of_no_rows():
    assert native_norm(jnp.zeros((0, 16)), None, jnp.ones(16), None, eps=EPS).shape == (0, 16)


@pytest.mark.parametrize(
    "shape", [(1, 1, 16), (7, 16, 1), (5, 33, 48), (64, 48, 20), (BLOCK + 77, 65, 80)]
)
def test_products(isa, shape):
    """Both sides of a weight, in blocks of all sizes, and more than one block of rows."""
    rows, width, out = shape
    rng = np.random.default_rng(rows)
    shapes = (rows, out), (rows, width), (width, out)
    problem = [rng.normal(size=s).astype(np.float32) for s in shapes]
    assert_close(both_ways(native_product, *problem), in_double(jnp.matmul, *problem))


def test_products_of_each_seed():
    rng = np.random.default_rng(0)
    problems = [rng.normal(size=s).astype(np.float32) for s in ((2, 9, 16), (2, 9, 5), (2, 5, 16))]
    together = jax.jit(jax.vmap(functools.partial(both_ways.__wrapped__, native_product)))(
        *problems
    )
    for k in range(2):
        assert_close(
            jax.tree.map(lambda v, k=k: v[k], together),
            both_ways(native_product, *(v[k] for v in problems)),
        )


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="processors cannot be taken away here"
)
def test_the_same_bits_for_any_number_of_threads():
    """A program's own threads, where it may use one processor and where it may use all."""
    script = (
        "import sys, numpy as np, jax; from mam.kernels.native.dense import native_product as f;"
        "a = [np.random.default_rng(0).normal(size=s).astype('f') "
        "for s in ((5000, 48), (5000, 36), (36, 48))];"
        "g = jax.jit(lambda y, *x: jax.vjp(f, *x)[1](y)[1])(*a); "
        "sys.stdout.buffer.write(np.asarray(g).tobytes())"
    )
    one = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
    alone, together = (
        subprocess.check_output([sys.executable, "-c", first + script]) for first in (one, "")
    )
    assert len(alone) == 36 * 48 * 4
    assert alone == together


@pytest.mark.parametrize(
    ("sizes", "is_native"), [((5, 16), True), ((16, 5), True), ((5, 7), False)]
)
def test_the_layer_takes_it(sizes, is_native):
    dense, x = (
        Dense(*sizes, key=jax.random.key(0)),
        jax.random.normal(jax.random.key(1), (2, 3, sizes[0])),
    )
    run = jax.jit(jax.grad(lambda dense, x: jnp.sum(jnp.cos(dense(x)))))
    assert ("mam_native_weight_gradient" in run.lower(dense, x).as_text()) == is_native
    gradient = run(dense, x)
    with without_native():
        assert_close(gradient, run(dense, x))
    assert native_product_supports(x, dense.weight) == is_native
    assert not native_product_supports(x.astype(jnp.bfloat16), dense.weight.astype(jnp.bfloat16))
