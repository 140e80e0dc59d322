"""The scan kernel against a plain loop, interpreted on the CPU; and its lowering for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from mam.kernels.cuda import scan as kernel_module
from mam.kernels.cuda.scan import CHUNK, SHORT, kernel_supports, scan_kernel

IGNORE_DEPRECATION = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated"
)  # JAX 0.11
GPU = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100", 132, "gpu"))
ARGUMENTS = ("x", "dt", "B", "C", "A", "h0")


def loop(x, dt, B, C, A, reset, h0, *, reverse):
    """The recurrence as it is written, one agent after another."""
    dtype = x.dtype
    x, dt, B, C = (jnp.moveaxis(v.astype(jnp.float32), 1, 0) for v in (x, dt, B, C))
    reset = jnp.zeros(x.shape[:2], bool) if reset is None else reset.T
    h0 = jnp.zeros((x.shape[1], *A.shape)) if h0 is None else h0

    def step(h, agent):
        x, dt, B, C, reset = agent
        h = (
            jnp.exp(dt[:, None] * A) * jnp.where(reset[:, None, None], 0.0, h)
            + (dt * x)[:, None] * B[:, :, None]
        )
        return h, jnp.sum(h * C[:, :, None], axis=1)

    h, y = jax.lax.scan(step, h0, (x, dt, B, C, reset), reverse=reverse)
    return jnp.moveaxis(y, 0, 1).astype(dtype), h


kernel = functools.partial(scan_kernel, interpret=True)


def make_arguments(seed, m, n, d, s, dtype=np.float32):
    """Differentiable arguments in the order of ARGUMENTS, and `reset`."""
    rng = np.random.default_rng(seed)
    shapes = ((m, n, d), (m, n, d), (m, n, s), (m, n, s), (s, d), (m, s, d))
    x, dt, B, C, A, h0 = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    dt, A = 0.5 * np.abs(dt), -np.exp(A - 1.0)  # some channels remember far more than a chunk
    reset = rng.random((m, n)) < 0.2
    return [jnp.asarray(v, dtype) for v in (x, dt, B, C)] + [
        jnp.asarray(A),
        jnp.asarray(h0),
    ], jnp.asarray(reset)


def value_and_gradients(scan, reverse, arguments, reset):
    """(y, final state), and gradients of all arguments through a weighted sum of both."""

    def run(x, dt, B, C, A, h0):
        return scan(x, dt, B, C, A, reset, h0, reverse=reverse)

    outputs, pull_back = jax.vjp(run, *arguments)
    weights = jax.tree.map(
        lambda v: jnp.cos(jnp.arange(v.size, dtype=jnp.float32)).reshape(v.shape), outputs
    )
    return outputs, pull_back(jax.tree.map(lambda w, v: w.astype(v.dtype), weights, outputs))


def compiled(scan, reverse, *arguments):
    return jax.jit(functools.partial(value_and_gradients, scan, reverse))(*arguments)


def assert_close(actual, expected, tolerance):
    """Largest error of each leaf, relative to its largest value."""
    actual, expected = jax.tree.leaves_with_path(actual), jax.tree.leaves(expected)
    for (path, a), b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        error = np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-3)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2e}"


@pytest.mark.parametrize(
    ("n", "d", "s", "reverse", "has_state", "has_reset"),
    [
        (1, 16, 4, False, True, True),
        (2, 16, 4, True, False, False),
        (3, 8, 16, False, True, False),
        (SHORT, 16, 4, True, True, True),
        (SHORT + 1, 16, 4, False, False, True),
        (2 * SHORT + 3, 16, 4, False, True, True),
        (2 * SHORT + 3, 16, 4, True, True, True),
        (CHUNK + 1, 24, 64, True, True, False),  # three tiles, and more than one chunk
    ],
)
def test_values_and_gradients_equal_the_loop(n, d, s, reverse, has_state, has_reset):
    arguments, reset = make_arguments(n, 2, n, d, s)
    arguments = arguments if has_state else [*arguments[:-1], None]
    reset = reset if has_reset else None
    assert_close(*(compiled(scan, reverse, arguments, reset) for scan in (kernel, loop)), 1e-5)


def test_several_sequences_per_program(monkeypatch):
    """Where sequences are short and many, a program runs a few, and sums their gradients of A."""
    monkeypatch.setattr(kernel_module, "MIN_PROGRAMS", 1)
    arguments, reset = make_arguments(0, 6, 3, 16, 4)
    assert kernel_module._Plan(6, 3, 16, 4, False, True, True).rows == 2
    assert_close(*(compiled(scan, False, arguments, reset) for scan in (kernel, loop)), 1e-5)


def test_bfloat16():
    """Arithmetic and states are in float32: only what is read and written is rounded."""
    arguments, reset = make_arguments(0, 2, SHORT + 2, 16, 4, jnp.bfloat16)
    actual, expected = (compiled(scan, False, arguments, reset) for scan in (kernel, loop))
    assert [g.dtype for g in actual[1][:4]] == [jnp.bfloat16] * 4
    assert_close(actual[0][1], expected[0][1], 1e-5)
    assert_close(actual, expected, 1e-2)


def test_gradient_through_the_final_state_only():
    arguments, _ = make_arguments(0, 2, SHORT + 1, 16, 4)

    def loss(scan, arguments):
        *xs, h0 = arguments
        return jnp.sum(jnp.sin(scan(*xs, None, h0, reverse=True)[1]))

    def gradients(scan):
        return jax.jit(jax.grad(functools.partial(loss, scan)))(arguments)

    assert_close(gradients(kernel), gradients(loop), 1e-5)


def test_the_final_state_may_be_left_out():
    (*xs, h0), _ = make_arguments(0, 2, 3, 16, 4)

    def loss(scan, arguments, **options):
        y, h = scan(*arguments, None, h0, reverse=False, **options)
        return jnp.sum(jnp.sin(y)), h

    def run(scan, **options):
        function = functools.partial(loss, scan, **options)
        return jax.jit(jax.value_and_grad(function, has_aux=True))(xs)

    (value, h), gradients = run(kernel, final_state=False)
    (expected_value, _), expected_gradients = run(loop)
    assert h is None
    assert_close((value, gradients), (expected_value, expected_gradients), 1e-5)


def test_mapped_over_seeds_inside_a_loop():
    """As in training: jitted, mapped over seeds with A and h0, in `lax.scan`, differentiated."""
    seeds = [make_arguments(seed, 2, 3, 16, 4) for seed in range(2)]
    stacked, reset = jax.tree.map(lambda *v: jnp.stack(v), *seeds)

    def loss(scan, arguments, reset):
        *xs, h0 = arguments

        def layer(carry, _):
            x, h = carry
            y, h = scan(x, *xs[1:], reset, h, reverse=False)
            return (jnp.tanh(y), h), None

        (y, h), _ = jax.lax.scan(layer, (xs[0], h0), None, length=2)
        return jnp.sum(y**2) + jnp.sum(h)

    def gradients(scan):
        return jax.jit(jax.vmap(jax.value_and_grad(functools.partial(loss, scan))))

    assert_close(gradients(kernel)(stacked, reset), gradients(loop)(stacked, reset), 1e-5)


@pytest.mark.parametrize(("n", "chunks"), [(SHORT, 0), (SHORT + 1, 2), (3 * CHUNK, 2)])
def test_one_state_is_kept_per_chunk(n, chunks):
    """The first chunk starts from h0, and a short sequence is no more than it."""
    arguments, reset = make_arguments(0, 2, n, 16, 4)

    def residuals(*arguments):
        return jax.vjp(
            lambda x, dt, B, C, A, h0: kernel(x, dt, B, C, A, reset, h0, reverse=False), *arguments
        )[1]

    kept = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(residuals, *arguments)))
    states = kept - reset.size - sum(v.size for v in arguments)
    assert states == chunks * arguments[-1].size


def lower_for_cuda(m, n, d, s, dtype=jnp.float32, seeds=None, has_reset=False, **options):
    """Text of the forward and backward kernels' program for a GPU."""
    shapes = ((m, n, d), (m, n, d), (m, n, s), (m, n, s), (s, d), (m, s, d))
    types = (dtype, dtype, dtype, dtype, jnp.float32, jnp.float32)
    lead = () if seeds is None else (seeds,)
    arguments = [
        jax.ShapeDtypeStruct(lead + shape, t) for shape, t in zip(shapes, types, strict=True)
    ]
    reset = jnp.arange(m * n).reshape(m, n) % 5 == 0 if has_reset else None

    def loss(x, dt, B, C, A, h0):
        y, h = scan_kernel(x, dt, B, C, A, reset, h0, reverse=False, **options)
        return jnp.sum(y**2) + (0.0 if h is None else jnp.sum(h**2))

    gradient = jax.grad(loss, argnums=range(6))
    with use_abstract_mesh(GPU):
        traced = jax.jit(gradient if seeds is None else jax.vmap(gradient)).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@IGNORE_DEPRECATION
@pytest.mark.parametrize(
    ("m", "n", "d", "s", "options"),
    [
        (64, 3, 64, 16, {}),
        (64, 33, 64, 16, {"has_reset": True}),
        (
            8192,
            4,
            128,
            16,
            {"dtype": jnp.bfloat16, "final_state": False},
        ),  # several sequences per program
        (64, 32, 128, 32, {}),
        (64, 33, 256, 16, {"dtype": jnp.bfloat16, "seeds": 4}),
        (131072, 128, 256, 32, {}),  # beyond a grid of 65535 and offsets of 32 bits
        (8, 1024, 64, 16, {}),
        (8, 5, 96, 8, {}),
    ],
)
def test_lowers_for_a_gpu(m, n, d, s, options):
    assert kernel_supports(n, d, s)
    text = lower_for_cuda(m, n, d, s, **options)
    assert text.count("xla.gpu.triton") == 2


def test_sizes_that_are_not_supported():
    supported = [(1, 8, 4), (3, 64, 16), (1024, 256, 32), (7, 96, 16), (5, 16, 64)]
    refused = [
        (0, 64, 16),
        (3, 64, 12),
        (3, 64, 2),
        (3, 64, 128),
        (3, 4, 16),
        (3, 12, 16),
        (3, 65, 16),
    ]
    assert all(kernel_supports(*sizes) for sizes in supported)
    assert not any(kernel_supports(*sizes) for sizes in refused)
    with pytest.raises(ValueError, match="3, 64, 12"):
        lower_for_cuda(8, 3, 64, 12)


@IGNORE_DEPRECATION
def test_lowering_refuses_what_is_not_a_power_of_two(monkeypatch):
    monkeypatch.setattr(kernel_module, "kernel_supports", lambda n, d, s: True)
    with pytest.raises(ValueError, match="power of 2"):
        lower_for_cuda(8, 3, 64, 12)
