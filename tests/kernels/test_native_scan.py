"""The scan in native code against NumPy and XLA; native/tests has those that need no Python."""

import functools
import os
import subprocess
import sys

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from mam.errors import UserError
from mam.kernels.native import library as native
from mam.kernels.native import scan as native_scan
from mam.kernels.selective_scan import gated_scan, selective_scan

mam_native = pytest.importorskip(
    "mam_native", reason="the native kernels are not installed: make native"
)

NAMES = (
    "y",
    "final state",
    *(f"gradient of {name}" for name in ("x", "dt", "A", "B", "C", "D", "initial_state")),
)


def reference(x, dt, A, B, C, D, h, reset, reverse, gy, gh):
    """The recurrence and its gradients as written, agent after agent, in the order of NAMES."""
    order = np.arange(x.shape[1])[:: -1 if reverse else 1]
    y, states, decays = np.zeros_like(x), [h], {}
    for i in order:
        decays[i] = np.exp(dt[:, i, None, :] * A.T) * ~reset[:, i, None, None]
        states.append(decays[i] * states[-1] + (dt * x)[:, i, None, :] * B[:, i, :, None])
        y[:, i] = np.sum(states[-1] * C[:, i, :, None], axis=1) + D * x[:, i]
    last, gA = states[-1], np.zeros_like(A)
    gx, gdt, gB, gC = (np.zeros_like(v) for v in (x, dt, B, C))
    for i in order[::-1]:
        h, G = states.pop(), gh + gy[:, i, None, :] * C[:, i, :, None]
        gC[:, i] = np.sum(gy[:, i, None, :] * h, axis=2)
        gB[:, i] = np.sum(G * (dt * x)[:, i, None, :], axis=2)
        gu, gh = np.sum(G * B[:, i, :, None], axis=1), G * decays[i]
        gx[:, i] = gu * dt[:, i] + gy[:, i] * D
        gdt[:, i] = gu * x[:, i] + np.sum(gh * states[-1] * A.T, axis=1)
        gA += np.einsum("bsd,bd->ds", gh * states[-1], dt[:, i])
    return y, last, gx, gdt, gA, gB, gC, np.sum(gy * x, axis=(0, 1)), gh


def make_problem(seed, m, n, d, s, has_reset=True):
    """Arguments with the initial state last, resets, and gradients of both outputs."""
    rng = np.random.default_rng(seed)
    shapes = ((m, n, d), (m, n, d), (d, s), (m, n, s), (m, n, s), (d,), (m, s, d))
    arguments = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    arguments[1] = 0.5 * np.abs(arguments[1])
    arguments[2] = -np.exp(arguments[2] - 1)  # some channels remember far more than a chunk
    reset = rng.random((m, n)) < (0.2 if has_reset else 0)
    return (
        arguments,
        reset,
        [rng.normal(size=shape).astype(np.float32) for shape in (shapes[0], shapes[-1])],
    )


@functools.partial(jax.jit, static_argnames=("implementation", "reverse"))
def run(arguments, reset, gradients, *, reverse=False, implementation="native"):
    """Outputs in the order of NAMES."""

    def scan(*arguments):
        *xs, h = arguments
        return selective_scan(
            *xs, initial_state=h, reset=reset, reverse=reverse, implementation=implementation
        )

    outputs, pull_back = jax.vjp(scan, *arguments)
    return (*outputs, *pull_back(tuple(gradients)))


def run_outputs(arguments, implementation="native"):
    return selective_scan(*map(jnp.asarray, arguments[:-1]), implementation=implementation)[0]


def assert_close(actual, expected, tolerance, context=""):
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        error = np.max(np.abs(np.asarray(a) - b)) / max(np.max(np.abs(b)), 1e-3)
        assert error <= tolerance, f"{name}: {error:.1e} {context}"


def exact(arguments, reset, gradients, reverse):
    wide = [np.asarray(v, np.float64) for v in (*arguments, *gradients)]
    return reference(*wide[:7], reset, reverse, *wide[7:])


@pytest.mark.parametrize("seed", range(10))
def test_random_shapes(seed):
    """100 of them, from one agent, one channel and one state on."""
    rng = np.random.default_rng(seed)
    for _ in range(10):
        m, d, s = rng.integers(1, [9, 70, 34])
        n = int(rng.choice([1, 2, 3, rng.integers(4, 16), 16, 17, rng.integers(18, 70)]))
        reverse = bool(rng.integers(2))
        problem = make_problem(seed, m, n, d, s, has_reset=bool(rng.integers(2)))
        assert_close(
            run(*problem, reverse=reverse),
            exact(*problem, reverse),
            1e-5,
            f"with {m, n, d, s, reverse}",
        )


def test_every_instruction_set(isa):
    assert mam_native.isa() == isa
    for m, n, d, s, reverse in ((5, 35, 40, 17, False), (3, 7, 19, 15, True)):
        problem = make_problem(0, m, n, d, s)
        assert_close(run(*problem, reverse=reverse), exact(*problem, reverse), 1e-5)


def test_the_environment_chooses_the_instruction_set():
    isa = mam_native.available()[0]
    script = "import mam_native; print(mam_native.isa())"
    environment = os.environ | {"MAM_NATIVE_ISA": isa}
    assert (
        subprocess.check_output([sys.executable, "-c", script], env=environment, text=True).strip()
        == isa
    )
    with pytest.raises(ValueError, match=isa):
        mam_native.choose("z80")


@pytest.mark.parametrize(("n", "reverse"), [(2, False), (3, True), (40, False)])
def test_equals_xla(n, reverse):
    problem = make_problem(n, 20, n, 32, 16)
    assert_close(
        run(*problem, reverse=reverse),
        run(*problem, reverse=reverse, implementation="sequential"),
        1e-5,
    )


def test_the_same_bits_each_time_and_for_any_number_of_threads(monkeypatch):
    problem = make_problem(0, 40, 33, 48, 16)
    one, two = run(*problem), run(*problem)
    jax.clear_caches()
    monkeypatch.setattr(native_scan.os, "cpu_count", lambda: 1)
    alone = run(*problem)
    for a, b, c in zip(one, two, alone, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes() == np.asarray(c).tobytes()


def test_a_scan_over_seeds_is_a_loop_over_seeds():
    """Every seed has its own A and D; what has no batch axis is the same for all."""
    problems = [make_problem(k, 6, 18, 20, 5) for k in range(3)]
    stacked = jax.tree.map(lambda *v: np.stack(v), *problems)
    together = jax.jit(jax.vmap(run.__wrapped__))(*stacked)
    for k, problem in enumerate(problems):
        for a, b in zip(together, run(*problem), strict=True):
            assert np.asarray(a[k]).tobytes() == np.asarray(b).tobytes()
    arguments, _, _ = problems[0]
    more = np.stack([arguments[0], 2 * arguments[0]])
    y = jax.jit(
        jax.vmap(jax.vmap(lambda x, dt: run_outputs([x, dt, *arguments[2:]]), (0, None)), (None, 0))
    )(more, np.stack([arguments[1]] * 4))
    assert y.shape == (4, 2, 6, 18, 20)
    np.testing.assert_allclose(y[3, 1], 2 * y[0, 0], rtol=1e-5)


def test_leading_axes():
    arguments, _, _ = make_problem(0, 6, 5, 20, 5)
    folded = [v.reshape(2, 3, *v.shape[1:]) if v.ndim == 3 else v for v in arguments]
    np.testing.assert_array_equal(run_outputs(folded).reshape(6, 5, 20), run_outputs(arguments))
    one = [v[0] if v.ndim == 3 else v for v in arguments]
    np.testing.assert_array_equal(run_outputs(one), run_outputs(arguments)[0])


@functools.partial(jax.jit, static_argnames=("implementation", "reverse"))
def run_gated(arguments, masks, gradients, *, reverse=False, implementation="native"):
    """Both outputs, and the gradients of all arguments."""

    def scan(*arguments):
        *xs, h = arguments
        alive, reset = masks
        how = {"reverse": reverse, "implementation": implementation}
        return gated_scan(*xs, alive=alive, initial_state=h, reset=reset, **how)

    outputs, pull_back = jax.vjp(scan, *arguments)
    return outputs, pull_back(gradients)


def make_gated_problem(seed, m, n, d, s, rank):
    (x, _, A, B, C, D, h), reset, gradients = make_problem(seed, m, n, d, s)
    rng = np.random.default_rng(seed)
    features, gate = (rng.normal(size=(m, n, size)).astype(np.float32) for size in (rank, d))
    weight, bias = (rng.normal(size=size).astype(np.float32) / rank**0.5 for size in ((rank, d), d))
    masks = rng.random((m, n)) < 0.8, reset  # who is alive, and where the state is
    return (x, features, weight, bias, A, B, C, D, gate, h), masks, tuple(gradients)


@pytest.mark.parametrize("seed", range(10))
def test_gated_in_one_pass_and_in_several(seed):
    """30 random shapes, some with more features than the kernel takes."""
    rng = np.random.default_rng(seed)
    for _ in range(3):
        m, d, s, rank = (int(v) for v in rng.integers(1, [9, 70, 34, native_scan.MAX_RANK + 3]))
        n = int(rng.choice([1, 2, rng.integers(3, 16), 16, rng.integers(17, 70)]))
        run = functools.partial(
            run_gated, *make_gated_problem(seed, m, n, d, s, rank), reverse=bool(rng.integers(2))
        )
        actual, expected = run(), run(implementation="sequential")
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert np.max(np.abs(a - b)) <= 1e-5 * max(np.max(np.abs(b)), 1e-3), (
                f"with {m, n, d, s, rank}"
            )


def test_gated_with_weights_of_each_seed():
    problems = [make_gated_problem(k, 6, 18, 20, 5, 3) for k in range(3)]
    together = jax.jit(jax.vmap(run_gated.__wrapped__))(
        *jax.tree.map(lambda *v: jnp.stack(v), *problems)
    )
    for k, problem in enumerate(problems):
        for a, b in zip(
            jax.tree.leaves(together), jax.tree.leaves(run_gated(*problem)), strict=True
        ):
            np.testing.assert_allclose(a[k], b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [native_scan.MAX_RANK, native_scan.MAX_RANK + 1])
def test_gated_in_one_pass_where_the_features_are_few(rank):
    (*arguments, _), _, _ = make_gated_problem(0, 2, 5, 20, 5, rank)
    text = jax.jit(lambda *a: gated_scan(*a)[0]).lower(*arguments).compile().as_text()
    assert text.count('custom_call_target="mam_native_scan"') == 1
    assert ("log-plus-one" in text) == (rank > native_scan.MAX_RANK)  # XLA's softplus


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield str(equation.params.get("target_name", equation.primitive.name))
        for sub in jax.extend.core.jaxprs_in_params(equation.params):
            yield from primitives(sub)


def test_it_is_chosen_where_it_can_be():
    arguments, _, _ = make_problem(0, 2, 5, 20, 5)

    def targets(arguments):
        return set(primitives(jax.make_jaxpr(lambda a: run_outputs(a, None))(arguments).jaxpr))

    assert "mam_native_scan" in targets(arguments)
    with native.without_native():
        assert "mam_native_scan" not in targets(arguments)
    with jax.enable_x64(True):
        assert "mam_native_scan" not in targets([v.astype(np.float64) for v in arguments])


def test_exported_programs_do_without():
    arguments, _, _ = make_problem(0, 2, 5, 20, 5)
    scan = jax.jit(lambda *arguments: run_outputs(arguments, None))
    expected = scan(*arguments)
    with native.without_native():
        exported = export.export(scan)(*arguments)
    assert "mam_native" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(*arguments), expected, rtol=1e-5, atol=1e-5)


def test_the_final_state_is_computed_where_it_is_read_only():
    arguments, _, _ = make_problem(0, 2, 5, 20, 5)
    text = jax.jit(lambda *a: run_outputs(a, None)).lower(*arguments).compile().as_text()
    assert text.count('custom_call_target="mam_native_scan"') == 1


def test_what_it_does_not_take(monkeypatch):
    arguments, _, _ = make_problem(0, 2, 5, 20, 5)
    with jax.enable_x64(True), pytest.raises(ValueError, match="float32"):
        run_outputs([v.astype(np.float64) for v in arguments])
    # The library checks for itself what it is given.
    inputs = native_scan.ScanInputs(*(jnp.asarray(v) for v in arguments[:-1]), None, None)
    with pytest.raises(Exception, match=r"dt must have shape \[2, 5, 20\], got \[2, 5, 19\]"):
        jax.block_until_ready(
            native_scan.native_outputs(inputs._replace(dt=inputs.dt[..., :19]), reverse=False)
        )
    monkeypatch.setattr(native, "is_installed", lambda: False)
    native.library.cache_clear()
    with pytest.raises(UserError, match="make native"):
        run_outputs(arguments)
