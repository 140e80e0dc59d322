"""`reset` in every implementation of every recurrence: the sequence is cut, and nothing leaks."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.kernels.native.library import is_installed, without_native
from mam.kernels.selective_scan import (
    gated_scan,
    selective_scan,
    selective_step,
    step_size,
    zero_where,
)
from mam.kernels.ssd import ssd, ssd_step
from mam.networks.mixers.roles import CausalConv

D, S, R, HEADS, TAPS = 8, 4, 3, 2, 4
ROWS, PIECES = 3, 3  # the first row is reset before its first agent, too
A = -jnp.exp(jnp.linspace(-2.0, 1.0, D * S)).reshape(D, S)
CONV = CausalConv(D, TAPS, key=jax.random.key(0))


def split(v, *sizes):
    return jnp.split(v, np.cumsum(sizes), axis=-1)


# A recurrence is `whole(weights, xs, state, …)`, and for one agent `step(weights, x, state)`. What
# it reads of an agent is one array.
def select(weights, xs):
    x, dt, B, C = split(xs, D, D, S)
    return x, 0.5 * jnp.abs(dt), B, C


def selective(weights, xs, state, **how):
    x, dt, B, C = select(weights, xs)
    return selective_scan(x, dt, weights["A"], B, C, weights["skip"], initial_state=state, **how)


def selective_one(weights, x, state):
    x, dt, B, C = select(weights, x)
    return selective_step(state, x, dt, weights["A"], B, C, weights["skip"])


def gated(weights, xs, state, **how):
    x, gate, features, B, C = split(xs, D, D, R, S)
    projection = weights["weight"], weights["bias"]
    skip = weights["skip"]
    return gated_scan(
        x, features, *projection, weights["A"], B, C, skip, gate, initial_state=state, **how
    )


def gated_one(weights, x, state):
    x, gate, features, B, C = split(x, D, D, R, S)
    dt = step_size(features @ weights["weight"] + weights["bias"])
    state, y = selective_step(state, x, dt, weights["A"], B, C, weights["skip"])
    return state, y * jax.nn.silu(gate)


def dual(weights, xs, state, **how):
    x, dt, B, C = split(xs, D, HEADS, S)
    dt, rates, skip = 0.5 * jnp.abs(dt), weights["A"][:HEADS, 0], weights["skip"][:HEADS]
    return ssd(x, dt, rates, B, C, skip, initial_state=state, **how)


def dual_one(weights, x, state):
    x, dt, B, C = split(x, D, HEADS, S)
    return ssd_step(
        state, x, 0.5 * jnp.abs(dt), weights["A"][:HEADS, 0], B, C, weights["skip"][:HEADS]
    )


def convolved(weights, xs, state, *, implementation, **how):
    state, y = weights["conv"].unroll(tuple(jnp.unstack(state, axis=1)), xs, **how)
    return y, jnp.stack(state, axis=1)


def convolved_one(weights, x, state):
    state, y = weights["conv"].step(tuple(jnp.unstack(state, axis=1)), x)
    return jnp.stack(state, axis=1), y


NATIVE = pytest.mark.skipif(
    not is_installed(), reason="the native kernels are not installed: make native"
)
RECURRENCES = {
    "selective": (
        selective,
        selective_one,
        2 * D + 2 * S,
        ("sequential", "associative", "pairwise", "interpret"),
    ),
    "gated": (gated, gated_one, 2 * D + R + 2 * S, ("sequential",)),
    "ssd": (dual, dual_one, D + HEADS + 2 * S, ("scan",)),
    "convolution": (convolved, convolved_one, D, ("xla",)),
}
PLAIN = [(name, how) for name, (*_, hows) in RECURRENCES.items() for how in hows]
CASES = [*PLAIN, *(pytest.param(name, "native", marks=NATIVE) for name in RECURRENCES)]
SINGLE = [(*case, jnp.float32) for case in PLAIN]
SINGLE += [pytest.param(name, "native", jnp.float32, marks=NATIVE) for name in RECURRENCES]
# The native kernels are for single precision, and these read and write as `sequential` does.
HALF = [(*case, jnp.bfloat16) for case in PLAIN if case[1] not in ("associative", "pairwise")]
# Pieces longer and shorter than chunks and the convolution; the sum over pairs is unrolled.
LENGTHS = {False: 9, True: 3}


def length(implementation, reverse):
    return 1 if implementation == "pairwise" else LENGTHS[reverse]


def make_problem(name, n, seed=0, dtype=jnp.float32):
    """Weights, what is read, the state before, and gradients of outputs and last state."""
    rng = np.random.default_rng(seed)
    state = (ROWS, TAPS - 1, D) if name == "convolution" else (ROWS, S, D)
    shapes = (ROWS, n, RECURRENCES[name][2]), state, (ROWS, n, D), state
    xs, state, gy, g_state = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    xs, state = xs.astype(dtype), state.astype(dtype if name == "convolution" else jnp.float32)
    weight, bias, skip = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((R, D), D, D)
    )
    weights = (
        {"conv": CONV}
        if name == "convolution"
        else {"A": A, "skip": skip, "weight": weight, "bias": bias}
    )
    return weights, xs, state, (gy, g_state)


def resets_between_pieces(n, reverse):
    """Where pieces of equal length start, as read; the first piece in the first row only."""
    reset = np.zeros((ROWS, n), bool)
    reset[:, :: n // PIECES] = True
    reset[1:, 0] = False
    return jnp.asarray(reset[:, ::-1] if reverse else reset)


def both_ways(implementation, function, weights, xs, state, gradients):
    """Outputs, and the gradients of the arguments."""
    with without_native() if implementation != "native" else contextlib.nullcontext():
        outputs, pull_back = jax.vjp(function, weights, xs, state)
        return outputs, pull_back(jax.tree.map(lambda g, v: g.astype(v.dtype), gradients, outputs))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(name, implementation, reverse, weights, xs, state, reset, gradients):
    """Output, last state, and the gradients of weights, xs and state."""

    def whole(weights, xs, state):
        how = {"reset": reset, "reverse": reverse, "implementation": implementation}
        return RECURRENCES[name][0](weights, xs, state, **how)

    return both_ways(implementation, whole, weights, xs, state, gradients)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_pieces(name, implementation, weights, xs, state, gradients):
    """The same, each piece as a sequence of its own, from zeros where there is a reset."""

    def pieces(weights, xs, state):
        state = jnp.zeros((ROWS, PIECES, *state.shape[1:]), state.dtype).at[1:, 0].set(state[1:])
        cut = xs.reshape(ROWS * PIECES, -1, xs.shape[-1]), state.reshape(-1, *state.shape[2:])
        y, state = RECURRENCES[name][0](weights, *cut, implementation=implementation)
        return y.reshape(ROWS, -1, D), state.reshape(ROWS, PIECES, *state.shape[1:])[:, -1]

    return both_ways(implementation, pieces, weights, xs, state, gradients)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_steps(name, reverse, weights, xs, state, reset, gradients):
    """The same, agent after agent."""
    step = RECURRENCES[name][1]

    def steps(weights, xs, state):
        def agent(state, inputs):
            x, reset = inputs
            return step(weights, x, zero_where(reset, state))

        read = jnp.swapaxes(xs, 0, 1), reset.T
        state, y = jax.lax.scan(agent, state, read, reverse=reverse)
        return jnp.swapaxes(y, 0, 1), state

    return both_ways(None, steps, weights, xs, state, gradients)


def assert_close(actual, expected, tolerance):
    """Largest error of each leaf, relative to its largest value."""
    for (path, a), b in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-3)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


@pytest.mark.parametrize(("name", "implementation", "dtype"), [*SINGLE, *HALF])
def test_resets_cut_the_sequence(name, implementation, dtype):
    n = PIECES * length(implementation, False)
    weights, xs, state, gradients = make_problem(name, n, dtype=dtype)
    reset = resets_between_pieces(n, False)
    whole = run(name, implementation, False, weights, xs, state, reset, gradients)
    pieces = run_pieces(name, implementation, weights, xs, state, gradients)
    assert_close(whole, pieces, 1e-5 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_random_resets(name, implementation, reverse):
    """From none to all."""
    n = PIECES * length(implementation, reverse)
    for seed, share in enumerate((0.0, 0.1, 0.3, 0.7, 1.0)):
        weights, xs, state, gradients = make_problem(name, n, seed)
        reset = jnp.asarray(np.random.default_rng(seed).random((ROWS, n)) < share)
        actual = run(name, implementation, reverse, weights, xs, state, reset, gradients)
        assert_close(actual, run_steps(name, reverse, weights, xs, state, reset, gradients), 1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("name", "implementation"), CASES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_leaks_across_a_reset(name, implementation, reverse, bad):
    """Neither values into what follows nor gradients into what preceded: to the bit."""
    piece = length(implementation, reverse)
    weights, xs, state, (gy, g_state) = make_problem(name, PIECES * piece)
    reset = resets_between_pieces(PIECES * piece, reverse)
    outcome = functools.partial(run, name, implementation, reverse, weights)
    (y, last), (_, g_xs, g_state_in) = outcome(xs, state, reset, (gy, g_state))
    first, middle, final = (
        slice(k * piece, (k + 1) * piece) for k in ((2, 1, 0) if reverse else (0, 1, 2))
    )
    # 1. The first piece is bad; in the first row, reset at once, the state before it instead.
    bad_xs, bad_state = xs.at[1:, first].set(bad), state.at[0].set(bad)
    (y_bad, last_bad), (_, g_bad, g_state_bad) = outcome(bad_xs, bad_state, reset, (gy, g_state))
    assert not np.any(np.isfinite(y_bad[1:, first]))
    np.testing.assert_array_equal(last_bad, last)
    np.testing.assert_array_equal(g_state_bad[0], np.zeros_like(state[0]))
    np.testing.assert_array_equal(g_state_in[0], np.zeros_like(state[0]))
    for actual, expected in ((y_bad, y), (g_bad, g_xs)):
        np.testing.assert_array_equal(actual[0], expected[0])
        for clean in (middle, final):
            np.testing.assert_array_equal(actual[:, clean], expected[:, clean])
    # 2. The gradients of what comes last are.
    bad_gradients = gy.at[:, final].set(bad), jnp.full_like(g_state, bad)
    _, (_, g_bad, g_state_bad) = outcome(xs, state, reset, bad_gradients)
    for clean in (first, middle):
        np.testing.assert_array_equal(g_bad[:, clean], g_xs[:, clean])
    np.testing.assert_array_equal(g_state_bad, g_state_in)


def test_the_products_of_ssd_refuse_resets():
    weights, xs, state, _ = make_problem("ssd", 3)
    with pytest.raises(ValueError, match="choose scan, native or None"):
        dual(weights, xs, state, reset=resets_between_pieces(3, False), implementation="products")
