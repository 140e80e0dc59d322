"""The selective scan against a plain NumPy loop: every implementation, values and gradients."""

import functools
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mam.kernels.selective_scan import (
    CHUNK,
    TILE,
    gated_scan,
    gated_step,
    selective_scan,
    selective_step,
)
from mam.kernels.ssd import ssd

IMPLEMENTATIONS = ("sequential", "associative", "pairwise")
MAX_PAIRWISE_LENGTH = 3  # unrolled over pairs: longer ones only cost compilation
NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


def reference(x, dt, A, B, C, D, initial_state, reset, reverse):
    """The recurrence as it is written, one agent after another; accepts complex numbers."""
    h, y = initial_state, np.zeros(x.shape, np.result_type(x, dt, A, B, C, D, initial_state))
    for i in reversed(range(x.shape[-2])) if reverse else range(x.shape[-2]):
        h = np.where(reset[..., i, None, None], 0.0, h)
        h = np.exp(dt[..., i, None, :] * A.T) * h + (dt * x)[..., i, None, :] * B[..., i, :, None]
        y[..., i, :] = np.sum(h * C[..., i, :, None], axis=-2) + D * x[..., i, :]
    return y, h


def make_arguments(rng, n, batch=(), d=3, s=4):
    """Arguments of the scan, in the order of NAMES."""
    shapes = (
        (*batch, n, d),
        (*batch, n, d),
        (d, s),
        (*batch, n, s),
        (*batch, n, s),
        (d,),
        (*batch, s, d),
    )
    arguments = [rng.normal(size=shape) for shape in shapes]
    arguments[1] = 0.5 * np.abs(arguments[1])
    arguments[2] = -np.exp(arguments[2] - 1.0)  # some channels remember far more than a chunk
    return arguments


def run(implementation, reverse, arguments, reset=None):
    *xs, initial_state = arguments
    return selective_scan(
        *xs,
        initial_state=initial_state,
        reset=reset,
        reverse=reverse,
        implementation=implementation,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(implementations, reverse, arguments, reset, cotangents):
    """Per implementation: y, the final state, and the gradients of all arguments through both."""
    results = {}
    for name in implementations:
        outputs, pull_back = jax.vjp(lambda *a, name=name: run(name, reverse, a, reset), *arguments)
        results[name] = (outputs, pull_back(outputs if cotangents is None else cotangents))
    return results


def suitable(n):
    return tuple(name for name in IMPLEMENTATIONS if name != "pairwise" or n <= MAX_PAIRWISE_LENGTH)


def assert_close(actual, expected, tolerance, what=""):
    """Largest error relative to the largest value."""
    scale = max(np.max(np.abs(expected)), 1e-3)
    error = np.max(np.abs(np.asarray(actual) - expected)) / scale
    assert error <= tolerance, f"{what}: {error:.2e}"


@settings(max_examples=5, derandomize=True, deadline=None, database=None)
@given(
    n=st.integers(1, 40),
    batch=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    d=st.integers(1, 4),
    s=st.integers(1, 4),
    has_state=st.booleans(),
    has_reset=st.booleans(),
    reverse=st.booleans(),
    seed=st.integers(0, 100),
)
@example(
    n=MAX_PAIRWISE_LENGTH,
    batch=(2,),
    d=2,
    s=3,
    has_state=True,
    has_reset=True,
    reverse=True,
    seed=1,
)
@example(n=2, batch=(), d=2, s=3, has_state=False, has_reset=False, reverse=False, seed=2)
@example(
    n=2 * CHUNK + 1, batch=(2, 1), d=2, s=2, has_state=True, has_reset=True, reverse=False, seed=4
)
@example(
    n=2 * CHUNK + 1, batch=(2,), d=2, s=2, has_state=True, has_reset=True, reverse=True, seed=5
)
@example(n=2, batch=(2, TILE), d=2, s=2, has_state=False, has_reset=False, reverse=False, seed=6)
@example(
    n=3, batch=(3, TILE // 2 + 1), d=1, s=2, has_state=True, has_reset=True, reverse=True, seed=7
)
def test_values_and_gradients_equal_the_loop(n, batch, d, s, has_state, has_reset, reverse, seed):
    rng = np.random.default_rng(seed)
    arguments = make_arguments(rng, n, batch, d, s)
    reset = rng.random((*batch, n)) < 0.2 if has_reset else np.zeros((*batch, n), bool)
    cotangents = rng.normal(size=(*batch, n, d)), rng.normal(size=(*batch, s, d))
    if not has_state:
        arguments[-1] = np.zeros((*batch, s, d))
    expected = reference(*arguments, reset, reverse)
    with jax.enable_x64(True):
        given_arguments = arguments if has_state else [*arguments[:-1], None]
        results = value_and_gradients(
            suitable(n), reverse, given_arguments, reset if has_reset else None, cotangents
        )
        results = jax.device_get(results)
    for name, ((y, h), gradients) in results.items():
        assert_close(y, expected[0], 1e-12, f"{name}: y")
        assert_close(h, expected[1], 1e-12, f"{name}: final state")
        for k, gradient in enumerate(gradients):
            if gradient is None:
                continue
            # The derivative along a random direction, exact to rounding, by a complex step.
            direction = rng.normal(size=arguments[k].shape)
            moved = [a + 1e-30j * direction if i == k else a for i, a in enumerate(arguments)]
            outputs = reference(*moved, reset, reverse)
            slope = (
                sum(np.sum(g * out.imag) for g, out in zip(cotangents, outputs, strict=True)) * 1e30
            )
            scale = np.sum(np.abs(gradient * direction)) + 1e-3
            assert abs(np.sum(gradient * direction) - slope) <= 1e-12 * scale, (
                f"{name}: gradient of {NAMES[k]}"
            )


@pytest.mark.parametrize("n", [MAX_PAIRWISE_LENGTH, 40])
def test_float32_is_accurate(n):
    rng = np.random.default_rng(0)
    arguments = [a.astype(np.float32) for a in make_arguments(rng, n, batch=(2,))]
    reset = rng.random((2, n)) < 0.1
    y, h = (v.astype(np.float32) for v in reference(*arguments, reset, False))
    with jax.enable_x64(True):
        wide = [a.astype(np.float64) for a in (*arguments, y, h)]
        exact = value_and_gradients(("sequential",), False, wide[:-2], reset, tuple(wide[-2:]))[
            "sequential"
        ]
    for name, results in value_and_gradients(suitable(n), False, arguments, reset, (y, h)).items():
        for actual, expected in zip(jax.tree.leaves(results), jax.tree.leaves(exact), strict=True):
            assert actual.dtype == jnp.float32
            assert_close(actual, np.asarray(expected), 1e-5, name)


def test_a_scan_over_seeds_is_a_loop_over_seeds():
    """Training maps over seeds, and with them over A and D."""
    rng = np.random.default_rng(0)
    seeds = [[a.astype(np.float32) for a in make_arguments(rng, 3, batch=(2,))] for _ in range(2)]
    stacked = [np.stack(a) for a in zip(*seeds, strict=True)]
    one = functools.partial(value_and_gradients.__wrapped__, ("sequential", "pairwise"), False)
    together = jax.jit(jax.vmap(lambda a: one(a, None, None)))(stacked)
    for i, seed in enumerate(seeds):
        alone = value_and_gradients(("sequential", "pairwise"), False, seed, None, None)
        for actual, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            assert_close(actual[i], np.asarray(expected), 1e-6)


def test_step_equals_scan():
    rng = np.random.default_rng(0)
    *xs, state = arguments = make_arguments(rng, 7, batch=(2,))
    x, dt, A, B, C, D = xs
    y, final_state = reference(*arguments, np.zeros((2, 7), bool), False)
    with jax.enable_x64(True):
        step = jax.jit(selective_step)
        for i in range(7):
            state, y_i = step(state, x[:, i], dt[:, i], A, B[:, i], C[:, i], D)
            assert_close(y_i, y[:, i], 1e-12)
    assert_close(state, final_state, 1e-12)


@pytest.mark.parametrize("implementation", [None, "sequential"])
def test_gated_step_equals_gated_scan(implementation):
    """With the native kernels, where they are, and without."""
    rng, (m, n, d, s, r) = np.random.default_rng(0), (3, 5, 8, 4, 2)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x, features, gate, B, C = (draw(m, n, size) for size in (d, r, d, s, s))
    weights = draw(r, d), draw(d), -jnp.exp(draw(d, s))
    skip, state, reset = draw(d), draw(m, s, d), jnp.asarray(rng.random((m, n)) < 0.4)
    options = {"implementation": implementation}
    y, final_state = gated_scan(
        x, features, *weights, B, C, skip, gate, initial_state=state, reset=reset, **options
    )
    step = jax.jit(functools.partial(gated_step, **options))
    for i in range(n):
        agent = [v[:, i] for v in (x, features, B, C, gate)]
        state, y_i = step(
            state, *agent[:2], *weights, *agent[2:4], skip, agent[4], reset=reset[:, i]
        )
        assert_close(y_i, y[:, i], 1e-5)
    assert_close(state, final_state, 1e-5)


def lengths(implementation):
    """A length, and a place to cut it in two inside a chunk."""
    return (MAX_PAIRWISE_LENGTH, 1) if implementation == "pairwise" else (CHUNK + 7, 10)


@functools.partial(jax.jit, static_argnums=(0, 1))
def cut_in_two(implementation, cut, arguments):
    """The whole at once, in two parts with the state carried over, and reset at the cut."""
    x, dt, A, B, C, D, state = arguments
    n = x.shape[-2]
    first = (x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D)
    second = (x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D)
    results = []
    for reverse in (False, True):
        # In reverse the agent before the cut is the one whose reset separates the parts.
        reset = jnp.broadcast_to(jnp.arange(n) == (cut - 1 if reverse else cut), x.shape[:-1])
        early, late = (second, first) if reverse else (first, second)
        y_early, carried = run(implementation, reverse, (*early, state))
        y_late, end = run(implementation, reverse, (*late, carried))
        y_anew, end_anew = run(implementation, reverse, (*late, None))
        join = functools.partial(jnp.concatenate, axis=1)
        results.append(
            {
                "whole": run(implementation, reverse, arguments),
                "parts": (join([y_late, y_early] if reverse else [y_early, y_late]), end),
                "reset": run(implementation, reverse, arguments, reset),
                "anew": (join([y_anew, y_early] if reverse else [y_early, y_anew]), end_anew),
            }
        )
    return results


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_sequence_may_be_cut_anywhere(implementation):
    n, cut = lengths(implementation)
    with jax.enable_x64(True):
        results = cut_in_two(
            implementation, cut, make_arguments(np.random.default_rng(0), n, batch=(2,))
        )
    for result in results:
        for actual, expected in (("parts", "whole"), ("reset", "anew")):
            for a, b in zip(result[actual], result[expected], strict=True):
                assert_close(a, np.asarray(b), 1e-12, actual)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_a_step_size_the_state_stays(implementation):
    """Δ = 0 is how a dead agent changes nothing: outputs are as if it were not there."""
    n, _ = lengths(implementation)
    rng = np.random.default_rng(0)
    arguments = make_arguments(rng, n, batch=(2,))
    there = np.arange(n) % 3 != 1
    arguments[1][:, ~there] = 0.0
    x, dt, A, B, C, D, state = arguments
    compact = (x[:, there], dt[:, there], A, B[:, there], C[:, there], D, state)
    with jax.enable_x64(True):
        y, h = jax.jit(functools.partial(run, implementation, False))(arguments)
    y_compact, h_compact = reference(*compact, np.zeros((2, there.sum()), bool), False)
    assert_close(y[:, there], y_compact, 1e-12)
    assert_close(h, h_compact, 1e-12)


def intermediate_sizes(jaxpr):
    """The number of elements of every intermediate value, in loops and called functions too."""
    for equation in jaxpr.eqns:
        yield from (np.prod(v.aval.shape, dtype=int) for v in equation.outvars)
        for sub in jax.extend.core.jaxprs_in_params(equation.params):
            yield from intermediate_sizes(sub)


def test_training_keeps_no_states():
    """Of all [B, N, D, S] states the sequential form keeps one per chunk and forms one chunk's."""
    n, batch, d, s = 64, 2, 32, 32
    arguments = [
        jnp.asarray(a, jnp.float32)
        for a in make_arguments(np.random.default_rng(0), n, (batch,), d, s)
    ]
    states = batch * n * d * s

    def largest(implementation):
        def residuals(*a):
            return jax.vjp(lambda *a: run(implementation, False, a), *a)[1]

        def gradients(*a):
            y, h = jnp.ones((batch, n, d)), jnp.ones((batch, s, d))
            return residuals(*a)((y, h))

        kept = max(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(residuals, *arguments)))
        return kept, max(intermediate_sizes(jax.make_jaxpr(gradients)(*arguments).jaxpr))

    kept, formed = largest("sequential")
    assert kept <= states // CHUNK
    assert formed <= states // (n // CHUNK)
    assert largest("associative")[0] >= states  # what the check is sensitive to


@pytest.mark.parametrize(("m", "n"), [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("scan", ["selective", "gated", "ssd"])
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "native", None])
def test_nothing_to_read_leaves_the_state(scan, implementation, m, n):
    """No agents, or no sequences: values and gradients."""
    d, s = 4, 2
    x, B, state = jnp.ones((m, n, d)), jnp.ones((m, n, s)), jnp.full((m, s, d), 3.0)
    how = {"initial_state": state, "implementation": implementation}
    if scan == "ssd":
        how["implementation"] = implementation if implementation in ("native", None) else "products"

    def run(x):
        if scan == "ssd":
            return ssd(x, x[..., :2], -jnp.ones(2), B, B, jnp.ones(2), **how)
        if scan == "selective":
            return selective_scan(x, x, -jnp.ones((d, s)), B, B, jnp.ones(d), **how)
        return gated_scan(
            x, x[..., :1], *PROJECTION, -jnp.ones((d, s)), B, B, jnp.ones(d), x, **how
        )

    (y, h), pull_back = jax.vjp(run, x)
    assert y.shape == x.shape
    np.testing.assert_array_equal(h, state)
    (gradient,) = pull_back((y, h))
    assert gradient.shape == x.shape


PROJECTION = jnp.ones((1, 4)), jnp.zeros(4)


def test_the_unrolled_scan_refuses_what_it_would_leave_out():
    x, scalars = jnp.zeros((1, 3, 2)), jnp.zeros((1, 3, 2))
    with pytest.raises(ValueError, match="takes no reset"):
        selective_scan(
            x,
            x,
            -jnp.ones((2, 2)),
            scalars,
            scalars,
            jnp.ones(2),
            reset=jnp.ones((1, 3), bool),
            implementation="unrolled",
        )


def test_unknown_implementation():
    arguments = make_arguments(np.random.default_rng(0), 2)
    with pytest.raises(ValueError, match=r"'parallel'.*sequential, associative, pairwise"):
        run("parallel", False, [jnp.asarray(a) for a in arguments])


@pytest.mark.parametrize("n", [3, 33])
@pytest.mark.parametrize("reverse", [False, True])
def test_unrolled_equals_the_loop(n, reverse):
    """In one piece and in two, from a state and from none."""
    keys = iter(jax.random.split(jax.random.key(n), 6))
    x, dt = (jax.random.normal(next(keys), (2, n, 4)) for _ in range(2))
    B, C = (jax.random.normal(next(keys), (2, n, 3)) for _ in range(2))
    A, h0 = (
        -jnp.exp(jax.random.normal(next(keys), (4, 3))),
        jax.random.normal(next(keys), (2, 3, 4)),
    )
    args = x, jax.nn.softplus(dt), A, B, C, jnp.ones(4)
    for state in (None, h0):
        loop, unrolled = (
            selective_scan(
                *args, initial_state=state, reverse=reverse, implementation=implementation
            )
            for implementation in ("sequential", "unrolled")
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), unrolled, loop)
