"""Attention in native code against double precision, and where it is taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import NetworkConfig
from mam.kernels.native.attention import (
    MOST_AGENTS,
    native_attention,
    native_attention_supports,
)
from mam.kernels.native.library import without_native
from mam.networks.mixers.attention import Attended, Attention, CausalAttention, attend

pytest.importorskip("mam_native", reason="the native kernels are not installed: make native")


@functools.partial(jax.jit, static_argnums=0)
def both_ways(f, visible, gradient, *arguments):
    """The output, and the gradients of queries, keys and values."""
    y, pull_back = jax.vjp(lambda *a: f(*a, visible), *arguments)
    return y, pull_back(gradient)


def plain(query, keys, values, visible):
    with without_native():
        return attend(query, Attended(keys, values, visible))


def problem(seed, batch, heads, agents, size):
    """The output's gradient, queries, keys and values."""
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(4, *batch, heads, agents, size)).astype(np.float32))


def assert_close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


CAUSAL = np.tril(np.ones((5, 5), bool))


@pytest.mark.parametrize(
    ("batch", "mask"),
    [
        ((7,), lambda alive: CAUSAL),
        ((7,), lambda alive: alive[..., None, :]),
        ((2, 3), lambda alive: CAUSAL & alive[..., None, :]),
        ((), lambda alive: np.ones((1, 5), bool)),
    ],
    ids=["causal", "the living", "both", "one sequence"],
)
@pytest.mark.parametrize("heads", [1, 3])
def test_it_is_the_plain_one(isa, batch, mask, heads):
    alive = np.random.default_rng(0).uniform(size=(*batch, 5)) < 0.7
    alive[..., 0] = True
    alive[:1] = False  # none of the first sequence: as many weights as agents, all alike
    visible = mask(alive)
    given = problem(1, batch, heads, 5, 32)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in given]
        expected = jax.tree.map(np.asarray, both_ways(plain, visible, *wide))
    assert_close(both_ways(native_attention, visible, *given), expected)


def test_seeds_side_by_side():
    given = [problem(k, (4,), 2, 5, 16) for k in range(2)]
    one_seed = functools.partial(both_ways.__wrapped__, native_attention)
    all_seeds = jax.jit(jax.vmap(one_seed, in_axes=(None, 0, 0, 0, 0)))
    together = all_seeds(CAUSAL, *map(np.stack, zip(*given, strict=True)))
    for k, one in enumerate(given):
        alone = both_ways(native_attention, CAUSAL, *one)
        assert jax.tree.all(
            jax.tree.map(lambda a, b, k=k: np.array_equal(a[k], b), together, alone)
        )


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("mixer", [Attention, CausalAttention])
def test_mixers_take_it(mixer, size):
    made = mixer(NetworkConfig(d_model=size), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 5, size))
    run = jax.jit(lambda x: made.mixing(x).output)
    assert ("mam_native_attention" in run.lower(x).as_text()) == (size == 16)
    with without_native():
        np.testing.assert_allclose(run(x), jax.jit(lambda x: made.mixing(x).output)(x), atol=1e-6)


@pytest.mark.parametrize(
    ("agents", "keys", "dtype", "supported"),
    [
        (MOST_AGENTS, MOST_AGENTS, jnp.float32, True),
        (MOST_AGENTS + 1, MOST_AGENTS + 1, jnp.float32, False),
        (1, 5, jnp.float32, False),
        (5, 5, jnp.bfloat16, False),
    ],
)
def test_what_it_takes(agents, keys, dtype, supported):
    query, keys = (jnp.zeros((2, 1, n, 16), dtype) for n in (agents, keys))
    assert native_attention_supports(query, keys) == supported


def test_no_sequences():
    empty = jnp.zeros((0, 2, 5, 16))
    assert native_attention(empty, empty, empty, jnp.asarray(CAUSAL)).shape == empty.shape
