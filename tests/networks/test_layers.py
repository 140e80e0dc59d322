import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import NetworkConfig
from mam.kernels.selective_scan import DT_LIMIT, step_size
from mam.networks.layers import MLP, Dense, LayerNorm, RMSNorm, lookup
from mam.networks.mixers.mamba import SelectiveSSM
from mam.networks.mixers.mamba2 import DualSSM
from mam.networks.mixers.roles import CausalConv

X = np.random.default_rng(0).normal(1.0, 2.0, (2, 3, 6)).astype(np.float32)
SCALE, OFFSET = (
    np.linspace(0.5, 2.0, 6, dtype=np.float32),
    np.linspace(-1.0, 1.0, 6, dtype=np.float32),
)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_dense_maps_the_last_axis(batch, bias):
    layer = Dense(6, 4, key=jax.random.key(0), bias=bias)
    x = X.reshape(-1, 6)[: int(np.prod(batch))].reshape(*batch, 6)
    expected = np.einsum("...i,io->...o", x, layer.weight)
    if bias:
        layer = eqx.tree_at(lambda layer: layer.bias, layer, jnp.arange(4.0))
        expected = expected + np.arange(4.0)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("in_dim", "out_dim"), [(6, 4), (4, 6)])
def test_dense_starts_orthogonal(in_dim, out_dim):
    layer = Dense(in_dim, out_dim, key=jax.random.key(0), gain=3.0)
    w = np.asarray(layer.weight)
    np.testing.assert_allclose(w.T @ w if in_dim > out_dim else w @ w.T, 9.0 * np.eye(4), atol=1e-5)
    np.testing.assert_array_equal(layer.bias, 0.0)


def layer_norm(x, scale, offset):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-6) * scale + offset


def rms_norm(x, scale, offset):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def run_layer_norm(x, scale, offset):
    return eqx.tree_at(lambda norm: (norm.scale, norm.offset), LayerNorm(6), (scale, offset))(x)


def run_rms_norm(x, scale, offset):
    return eqx.tree_at(lambda norm: norm.scale, RMSNorm(6), scale)(x)


@pytest.mark.parametrize(
    ("norm", "formula"), [(run_layer_norm, layer_norm), (run_rms_norm, rms_norm)]
)
def test_norms_are_their_formulas_and_their_gradients_too(norm, formula):
    """The gradients are written by hand."""

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(f, *arguments):
        y, pull_back = jax.vjp(f, *arguments)
        return y, pull_back(jnp.cos(y))

    with jax.enable_x64(True):
        arguments = [jnp.asarray(v, jnp.float64) for v in (X, SCALE, OFFSET)]
        actual, expected = (
            value_and_gradients(norm, *arguments),
            value_and_gradients(formula, *arguments),
        )
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), actual, expected
        )
    single = value_and_gradients(norm, X, SCALE, OFFSET)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), single, expected
    )


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_norms_compute_in_single_precision_whatever_they_are_given(norm):
    """In half precision a mean of about 100 would be off by as much as these inputs vary."""
    x = jnp.asarray(100.0 + X, jnp.bfloat16)
    y, pull_back = jax.vjp(norm(6), x)
    assert (y.dtype, pull_back(y)[0].dtype) == (jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(y.astype(jnp.float32), norm(6)(x.astype(jnp.float32)), rtol=2**-8)


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_norms_of_zero_are_finite(norm):
    value, gradient = jax.jit(jax.value_and_grad(lambda x: norm(6)(x).sum()))(jnp.zeros(6))
    assert value == 0.0
    assert np.all(np.isfinite(gradient))


def test_mlp_starts_near_zero():
    y = jax.jit(lambda key, x: MLP(6, key=key)(x))(jax.random.key(0), X)
    assert 0.0 < np.max(np.abs(y)) < 0.2


@jax.jit
def looked_up(table, index, weights):
    """Rows by `lookup` and by plain indexing, and the gradient of a weighted sum of them."""

    def total(find, table):
        rows = find(table, index)
        return sum(
            jnp.sum(w * r) for w, r in zip(weights, jax.tree.leaves(rows), strict=True)
        ), rows

    def plain(table, index):
        return jax.tree.map(lambda v: v[index], table)

    return [
        jax.value_and_grad(functools.partial(total, find), has_aux=True)(table)
        for find in (lookup, plain)
    ]


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_lookup_is_indexing_and_so_is_its_gradient(batch):
    """Rows may be read often, or never: gradients add up, or are zero."""
    rng = np.random.default_rng(0)
    table = {
        "a": rng.normal(size=(4, 3)).astype(np.float32),
        "b": [rng.normal(size=(4, 2, 2)).astype(np.float32)],
    }
    index = rng.integers(3, size=batch).astype(np.int32)
    weights = [
        rng.normal(size=(*batch, *v.shape[1:])).astype(np.float32) for v in jax.tree.leaves(table)
    ]
    actual, expected = looked_up(table, index, weights)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), actual, expected
    )
    assert np.all(actual[1]["a"][3] == 0.0)


def silu_of_sum(x, weight, bias):
    """Over the agents one by one: the last d_conv of them, as far as there are any."""
    taps = weight.shape[0]
    padded = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
    return jax.nn.silu(sum(padded[:, k : k + x.shape[1]] * weight[k] for k in range(taps)) + bias)


def make_conv(weight, bias):
    empty = jax.eval_shape(
        lambda key: CausalConv(bias.shape[0], weight.shape[0], key=key), jax.random.key(0)
    )
    return eqx.tree_at(lambda conv: (conv.weight, conv.bias), empty, (weight, bias))


def in_pieces(cuts, x, weight, bias):
    """Outputs and the last inputs of the convolution of x cut into pieces."""
    state, outputs, conv = None, [], make_conv(weight, bias)
    for piece in jnp.split(x, cuts, axis=1):
        state, y = conv.unroll(state, piece)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), state


def from_the_end(cuts, x, weight, bias):
    """The same of x flipped, read in reverse."""
    state, outputs, conv = None, [], make_conv(weight, bias)
    for piece in jnp.split(x, cuts, axis=1):
        state, y = conv.unroll(state, jnp.flip(piece, axis=1), reverse=True)
        outputs.append(jnp.flip(y, axis=1))
    return jnp.concatenate(outputs, axis=1), state


def agent_by_agent(x, weight, bias):
    state, outputs, conv = (
        (jnp.zeros((x.shape[0], x.shape[2])),) * (weight.shape[0] - 1),
        [],
        make_conv(weight, bias),
    )
    for i in range(x.shape[1]):
        state, y = conv.step(state, x[:, i])
        outputs.append(y)
    return jnp.stack(outputs, axis=1), state


@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_the_convolution_is_its_sum_and_its_gradient_too(d_conv):
    """In one piece, in several (some shorter than what it remembers), and agent by agent."""
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.normal(size=shape) for shape in ((2, 7, 3), (d_conv, 3), (3,)))
    last = np.concatenate([np.zeros((2, d_conv - 1, 3)), x], axis=1)[:, 7:]

    @functools.partial(jax.jit, static_argnums=0)
    def output_state_and_gradients(f, *arguments):
        y, pull_back, state = jax.vjp(f, *arguments, has_aux=True)
        return y, pull_back(jnp.cos(y)), state

    with jax.enable_x64(True):
        y, gradients, _ = output_state_and_gradients(
            lambda *a: (silu_of_sum(*a), ()), x, weight, bias
        )
        pieces = [
            functools.partial(f, cuts)
            for f in (in_pieces, from_the_end)
            for cuts in ([], [5], [1, 3])
        ]
        for f in (*pieces, agent_by_agent):
            actual = output_state_and_gradients(f, x, weight, bias)
            np.testing.assert_allclose(actual[0], y, rtol=1e-12, atol=1e-12)
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12),
                actual[1],
                gradients,
            )
            assert len(actual[2]) == d_conv - 1
            for k, remembered in enumerate(actual[2]):
                np.testing.assert_array_equal(remembered, last[:, k])


def test_a_convolution_wider_than_the_sequence():
    """It remembers zeros of the agents before the first."""
    x = np.random.default_rng(0).normal(size=(2, 2, 3)).astype(np.float32)
    weight, bias = np.ones((4, 3), np.float32), np.zeros(3, np.float32)
    y, state = in_pieces([], jnp.asarray(x), jnp.asarray(weight), jnp.asarray(bias))
    np.testing.assert_allclose(y, silu_of_sum(x, weight, bias), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(np.stack(state), [np.zeros((2, 3)), x[:, 0], x[:, 1]])


SIZES = NetworkConfig(d_model=6, d_state=5, expand=2, dt_rank=3, head_dim=1)


@pytest.fixture(scope="module")
def fresh():
    """A block of each kind, as it starts."""
    build = jax.jit(lambda key: (SelectiveSSM(SIZES, key=key), DualSSM(SIZES, key=key)))
    return build(jax.random.key(0))


def test_mamba_starts_as_published(fresh):
    ssm, _ = fresh
    assert_published_step_sizes(ssm.dt_proj.bias)
    assert 0.3 < np.max(np.abs(ssm.dt_proj.weight)) <= 3**-0.5
    np.testing.assert_allclose(
        -np.exp(ssm.A_log), np.tile(-np.arange(1.0, 6.0), (12, 1)), rtol=1e-6
    )
    np.testing.assert_array_equal(ssm.skip, 1.0)


def test_mamba2_starts_as_published(fresh):
    """Decays of twelve heads uniform in [1, 16]."""
    _, ssm = fresh
    assert_published_step_sizes(ssm.dt_proj.bias)
    decay = np.exp(ssm.A_log)
    assert np.all((decay >= 0.999) & (decay <= 16.001))
    assert np.ptp(decay) > 7
    for ones in (ssm.skip, ssm.norm.scale):
        np.testing.assert_array_equal(ones, 1.0)


def assert_published_step_sizes(bias):
    dt = jax.nn.softplus(bias)
    assert dt.shape == (12,)
    assert np.all((dt >= 0.999e-3) & (dt <= 0.1001))
    assert np.max(dt) > 5 * np.min(dt)  # spread over the range


def test_step_size_is_a_bounded_softplus():
    x = 4 * np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    np.testing.assert_allclose(
        step_size(jnp.asarray(x)), np.logaddexp(0.0, x), rtol=1e-5, atol=1e-6
    )
    drifted = step_size(jnp.asarray(1e4 * x))
    assert np.all((drifted >= 0.0) & (drifted <= DT_LIMIT))
    assert np.max(drifted) == DT_LIMIT
    assert step_size(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32
