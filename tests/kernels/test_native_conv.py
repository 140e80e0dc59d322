"""The convolution in native code against the one in JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.kernels.native.conv import native_conv_silu, native_conv_supports
from mam.kernels.native.library import without_native
from mam.networks.mixers.roles import CausalConv

pytest.importorskip("mam_native", reason="the native kernels are not installed: make native")


def make_problem(seed, m, n, features, taps, has_reset=False):
    """Inputs, weights, bias, resets, and a gradient of the output."""
    rng = np.random.default_rng(seed)
    shapes = (m, n, features), (taps, features), (features,), (m, n, features)
    *arguments, gy = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return *arguments, rng.random((m, n)) < 0.2 if has_reset else None, gy


def reference(x, weight, bias, reset, gy, reverse):
    """Output and gradients, one agent and tap after another, in double precision."""
    x, weight, bias, gy = (v.astype(np.float64) for v in (x, weight, bias, gy))
    x, gy = (v[:, ::-1] if reverse else v for v in (x, gy))
    taps, n = weight.shape[0], x.shape[1]
    reset = np.zeros(x.shape[:2], bool) if reset is None else reset[:, ::-1] if reverse else reset
    # Agents, how long ago they read another, and in which rows none was reset since.
    pairs = [(i, k) for i in range(n) for k in range(min(taps, i + 1))]
    pairs = [(i, k, ~reset[:, i - k + 1 : i + 1].any(axis=1, keepdims=True)) for i, k in pairs]
    y = np.broadcast_to(bias, x.shape).copy()
    for i, k, there in pairs:
        y[:, i] += weight[taps - 1 - k] * x[:, i - k] * there
    gate = 1 / (1 + np.exp(-y))
    g = gy * gate * (1 + y * (1 - gate))
    gx, g_weight = np.zeros_like(x), np.zeros_like(weight)
    for i, k, there in pairs:
        gx[:, i - k] += weight[taps - 1 - k] * g[:, i] * there
        g_weight[taps - 1 - k] += np.sum(g[:, i] * x[:, i - k] * there, axis=0)
    y, gx = (v[:, ::-1] if reverse else v for v in (y * gate, gx))
    return y, gx, g_weight, np.sum(g, axis=(0, 1))


@functools.partial(jax.jit, static_argnames="reverse")
def run(x, weight, bias, reset, gy, reverse=False):
    y, pull_back = jax.vjp(lambda *a: native_conv_silu(*a, reset, reverse=reverse), x, weight, bias)
    return y, *pull_back(gy)


def assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert np.max(np.abs(np.asarray(a) - b)) <= 1e-5 * max(np.max(np.abs(b)), 1e-3)


def test_random_shapes(isa):
    rng = np.random.default_rng(0)
    for seed in range(12):
        n = int(rng.choice([1, 2, 3, 4, rng.integers(5, 40)]))
        sizes = rng.integers(1, 40), n, rng.integers(1, 70), 1 + seed % 4
        problem = make_problem(seed, *sizes, has_reset=seed % 2 == 0)
        assert_close(run(*problem, reverse=seed % 3 == 0), reference(*problem, seed % 3 == 0))


def test_a_map_over_seeds_is_a_loop_over_seeds():
    problems = [make_problem(k, 3, 5, 20, 4, has_reset=True) for k in range(2)]
    together = jax.jit(jax.vmap(run.__wrapped__))(*jax.tree.map(lambda *v: np.stack(v), *problems))
    for k, problem in enumerate(problems):
        for a, b in zip(together, run(*problem), strict=True):
            assert np.asarray(a[k]).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_the_layer_takes_it(with_state, reverse):
    conv = CausalConv(24, 4, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 3, 7, 24))
    state = tuple(jax.random.normal(jax.random.key(2), (3, 2, 3, 24))) if with_state else None
    run = jax.jit(lambda state, x: conv.unroll(state, x, reverse=reverse)[1])
    assert "mam_native_conv" in run.lower(state, x).as_text()
    native = run(state, x)
    with without_native():
        np.testing.assert_allclose(native, run(state, x), rtol=1e-5, atol=1e-5)


def test_what_it_does_not_take():
    x, weight = map(jnp.asarray, make_problem(0, 2, 3, 4, 4)[:2])
    assert native_conv_supports(x, weight)
    assert not native_conv_supports(x.astype(jnp.bfloat16), weight)
    assert not native_conv_supports(x, jnp.zeros((5, 4)))
