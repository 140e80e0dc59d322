"""The dual form of Mamba-2's scan against a plain NumPy loop: values, gradients, chunks, steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mam.kernels.native.library import is_installed, without_native
from mam.kernels.ssd import CHUNK, ssd, ssd_step

needs_native = pytest.mark.skipif(
    not is_installed(), reason="the native kernels are not installed: make native"
)
IMPLEMENTATIONS = ("native", "products")
NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


def reference(x, dt, A, B, C, D, state):
    """The recurrence as it is written, one agent after another; accepts complex numbers."""
    h, y = state, np.zeros(x.shape, np.result_type(x, dt, A, B, C, D, state))
    channels = x.shape[-1] // len(A)
    A, D, dt = (np.repeat(v, channels, axis=-1) for v in (A, D, dt))
    for i in range(x.shape[-2]):
        u = (dt * x)[..., i, None, :] * B[..., i, :, None]
        h = np.exp(dt[..., i, None, :] * A) * h + u
        y[..., i, :] = np.sum(h * C[..., i, :, None], axis=-2) + D * x[..., i, :]
    return y, h


def make_arguments(rng, n, batch=(), heads=2, channels=3, s=4):
    """Arguments in the order of NAMES."""
    d = heads * channels
    shapes = (
        (*batch, n, d),
        (*batch, n, heads),
        (heads,),
        (*batch, n, s),
        (*batch, n, s),
        (heads,),
        (*batch, s, d),
    )
    arguments = [rng.normal(size=shape) for shape in shapes]
    arguments[1] = 0.5 * np.abs(arguments[1])
    arguments[2] = -np.exp(arguments[2] - 1.0)  # some heads remember far more than a chunk
    return arguments


@functools.partial(jax.jit, static_argnames=("chunk", "reverse", "implementation"))
def value_and_gradients(
    arguments, cotangents=None, chunk=CHUNK, reverse=False, implementation="products"
):
    """y, the final state, and the gradients of all arguments through both."""

    def run(*arguments):
        *xs, initial_state = arguments
        return ssd(
            *xs,
            initial_state=initial_state,
            chunk=chunk,
            reverse=reverse,
            implementation=implementation,
        )

    outputs, pull_back = jax.vjp(run, *arguments)
    return outputs, pull_back(outputs if cotangents is None else cotangents)


def assert_close(actual, expected, tolerance, what=""):
    """Largest error relative to the largest value."""
    scale = max(np.max(np.abs(expected)), 1e-3)
    error = np.max(np.abs(np.asarray(actual, np.float64) - expected)) / scale
    assert error <= tolerance, f"{what}: {error:.2e}"


@settings(max_examples=4, derandomize=True, deadline=None, database=None)
@given(
    n=st.integers(1, 2 * CHUNK + 6),
    batch=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    heads=st.integers(1, 3),
    channels=st.integers(1, 3),
    s=st.integers(1, 4),
    has_state=st.booleans(),
    seed=st.integers(0, 100),
)
@example(n=1, batch=(), heads=2, channels=2, s=3, has_state=False, seed=1)
@example(n=2, batch=(3,), heads=1, channels=3, s=1, has_state=True, seed=2)
@example(n=CHUNK - 1, batch=(2,), heads=2, channels=1, s=2, has_state=False, seed=3)
@example(n=CHUNK, batch=(2, 2), heads=2, channels=2, s=2, has_state=True, seed=4)
@example(n=CHUNK + 1, batch=(2,), heads=3, channels=2, s=2, has_state=False, seed=5)
@example(n=2 * CHUNK + 6, batch=(1, 2), heads=2, channels=2, s=2, has_state=True, seed=6)
def test_values_and_gradients_equal_the_loop(n, batch, heads, channels, s, has_state, seed):
    rng = np.random.default_rng(seed)
    arguments = make_arguments(rng, n, batch, heads, channels, s)
    if not has_state:
        arguments[-1] = np.zeros_like(arguments[-1])
    y, h = reference(*arguments)
    cotangents = rng.normal(size=y.shape), rng.normal(size=h.shape)
    with jax.enable_x64(True):
        given_arguments = arguments if has_state else [*arguments[:-1], None]
        outputs, gradients = jax.device_get(value_and_gradients(given_arguments, cotangents))
    assert_close(outputs[0], y, 1e-12, "y")
    assert_close(outputs[1], h, 1e-12, "final state")
    for k, gradient in enumerate(gradients):
        if gradient is None:
            continue
        # The derivative along a random direction, exact to rounding, by a complex step.
        direction = rng.normal(size=arguments[k].shape)
        moved = reference(
            *[a + 1e-30j * direction if i == k else a for i, a in enumerate(arguments)]
        )
        slope = sum(np.sum(g * out.imag) for g, out in zip(cotangents, moved, strict=True)) * 1e30
        scale = np.sum(np.abs(gradient * direction)) + 1e-3
        assert abs(np.sum(gradient * direction) - slope) <= 1e-12 * scale, f"gradient of {NAMES[k]}"


@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 100])
def test_chunks_of_any_size_give_the_same(chunk):
    arguments = make_arguments(np.random.default_rng(0), 10, batch=(2,))
    with jax.enable_x64(True):
        actual, expected = (value_and_gradients(arguments, chunk=size) for size in (chunk, CHUNK))
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(a, np.asarray(b), 1e-12)


@pytest.mark.parametrize("n", [3, CHUNK + 3])
def test_reverse_is_the_flipped_sequence(n):
    x, dt, A, B, C, D, state = make_arguments(np.random.default_rng(0), n, batch=(2,))
    flipped = [np.flip(v, axis=-2) for v in (x, dt, B, C)]
    with jax.enable_x64(True):
        (y, h), _ = value_and_gradients((x, dt, A, B, C, D, state), reverse=True)
        (z, g), _ = value_and_gradients((*flipped[:2], A, *flipped[2:], D, state))
    np.testing.assert_array_equal(y, np.flip(z, axis=-2))
    np.testing.assert_array_equal(h, g)


@needs_native
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("n", "sizes"), [(1, {}), (5, {"heads": 3, "channels": 7, "s": 17}), (40, {"channels": 20})]
)
def test_the_native_recurrence_equals_the_products(n, sizes, reverse):
    rng = np.random.default_rng(n)
    arguments = [a.astype(np.float32) for a in make_arguments(rng, n, batch=(3, 2), **sizes)]
    cotangents = [rng.normal(size=arguments[k].shape).astype(np.float32) for k in (0, -1)]
    native, products = (
        value_and_gradients(arguments, tuple(cotangents), reverse=reverse, implementation=i)
        for i in IMPLEMENTATIONS
    )
    for name, a, b in zip(
        ("y", "final state", *NAMES), *map(jax.tree.leaves, (native, products)), strict=True
    ):
        assert_close(a, np.asarray(b), 1e-5, name)


@needs_native
def test_the_native_recurrence_is_chosen_on_cpu():
    *xs, _ = (jnp.asarray(a, jnp.float32) for a in make_arguments(np.random.default_rng(0), 3))
    assert "mam_native_scan" in str(jax.make_jaxpr(ssd)(*xs))
    with without_native():
        assert "mam_native_scan" not in str(jax.make_jaxpr(ssd)(*xs))


@needs_native
def test_the_native_recurrence_is_for_single_precision():
    with jax.enable_x64(True), pytest.raises(ValueError, match="float32"):
        value_and_gradients(make_arguments(np.random.default_rng(0), 3), implementation="native")


@pytest.mark.parametrize("n", [7, CHUNK + 7])
def test_without_a_step_size_the_state_stays(n):
    """Δ = 0 is how a dead agent changes nothing: outputs are as if it were not there."""
    arguments = make_arguments(np.random.default_rng(0), n, batch=(2,))
    there = np.arange(n) % 3 != 1
    arguments[1][:, ~there] = 0.0
    x, dt, A, B, C, D, state = arguments
    y_compact, h_compact = reference(
        x[:, there], dt[:, there], A, B[:, there], C[:, there], D, state
    )
    with jax.enable_x64(True):
        (y, h), _ = value_and_gradients(arguments)
    assert_close(y[:, there], y_compact, 1e-12)
    assert_close(h, h_compact, 1e-12)


def test_step_equals_the_whole():
    *xs, state = arguments = make_arguments(np.random.default_rng(0), 7, batch=(2,))
    x, dt, A, B, C, D = xs
    with jax.enable_x64(True):
        (y, h), _ = value_and_gradients(arguments)
        step = jax.jit(ssd_step)
        for i in range(7):
            state, y_i = step(state, x[:, i], dt[:, i], A, B[:, i], C[:, i], D)
            assert_close(y_i, np.asarray(y[:, i]), 1e-12)
        assert_close(state, np.asarray(h), 1e-12)


def test_over_seeds_it_is_a_loop_over_seeds():
    """Training maps over seeds, and with them over A and D."""
    rng = np.random.default_rng(0)
    seeds = [[a.astype(np.float32) for a in make_arguments(rng, 3, batch=(2,))] for _ in range(2)]
    stacked = [np.stack(a) for a in zip(*seeds, strict=True)]
    together = jax.jit(jax.vmap(value_and_gradients.__wrapped__))(stacked)
    for i, seed in enumerate(seeds):
        for actual, expected in zip(
            jax.tree.leaves(together), jax.tree.leaves(value_and_gradients(seed)), strict=True
        ):
            assert_close(actual[i], np.asarray(expected), 1e-6)


def mild(rng, n, heads):
    return 0.5 * np.abs(rng.normal(size=(2, n, heads)))


def spread(rng, n, heads):
    """Over seven orders of magnitude, up to the largest there is."""
    return np.minimum(np.exp(3.0 * rng.normal(size=(2, n, heads)) - 3.0), 20.0)


def strong_then_weak(rng, n, heads):
    """The sum of exponents is large when the small ones come, whose spans are what counts then."""
    later = np.arange(n)[:, None] >= n // 2
    return np.where(later, 0.01 * rng.random((2, n, heads)), 20.0)


@pytest.mark.parametrize("step_sizes", [mild, spread, strong_then_weak])
@pytest.mark.parametrize("n", [3, CHUNK, 2 * CHUNK + 6])
def test_float32_is_accurate(n, step_sizes):
    rng = np.random.default_rng(0)
    arguments = make_arguments(rng, n, batch=(2,))
    arguments[1] = step_sizes(rng, n, heads=2)
    arguments[2] = np.array([-16.0, -1.0])
    single = [a.astype(np.float32) for a in arguments]
    wide = [a.astype(np.float64) for a in single]
    outputs = value_and_gradients(single)
    with jax.enable_x64(True):
        exact = jax.device_get(
            value_and_gradients(wide, tuple(np.asarray(v, np.float64) for v in outputs[0]))
        )
    names = ("y", "final state", *NAMES)
    for name, actual, expected in zip(
        names, jax.tree.leaves(outputs), jax.tree.leaves(exact), strict=True
    ):
        assert actual.dtype == jnp.float32
        # Strong decays let A do next to nothing, and its gradient is a small sum of large terms.
        assert_close(
            actual, expected, 1e-2 if name == "A" and step_sizes is strong_then_weak else 1e-5, name
        )


@pytest.mark.parametrize("n", [3, CHUNK + 3])
def test_half_precision_goes_in_and_comes_out_and_nothing_in_between(n):
    """As good as the inputs' own rounding; Δ, decays and states are single."""
    rng = np.random.default_rng(0)
    arguments = [jnp.asarray(a, jnp.float32) for a in make_arguments(rng, n, batch=(2,))]
    arguments = [
        v.astype(jnp.bfloat16) if name in "xBC" else v
        for name, v in zip(NAMES, arguments, strict=True)
    ]
    outputs = value_and_gradients(arguments)
    assert [v.dtype for v in outputs[0]] == [jnp.bfloat16, jnp.float32]
    assert [g.dtype for g in outputs[1]] == [v.dtype for v in arguments]
    y, h = reference(*[np.asarray(v, np.float64) for v in arguments])
    assert_close(outputs[0][0], y, 2**-8)
    assert_close(outputs[0][1], h, 1e-5)
    assert all(np.all(np.isfinite(np.asarray(g, np.float32))) for g in outputs[1])
