import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import NetworkConfig
from mam.networks.layers import MLP, Dense, LayerNorm, RMSNorm
from mam.networks.mixers.mamba import DT_LIMIT, SelectiveSSM

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # less time compiling
X = np.random.default_rng(0).normal(1.0, 2.0, (2, 3, 6)).astype(np.float32)
SCALE, OFFSET = np.linspace(0.5, 2.0, 6, dtype=np.float32), np.linspace(-1.0, 1.0, 6, dtype=np.float32)


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


def test_layer_norm_is_its_formula():
    norm = eqx.tree_at(lambda n: (n.scale, n.offset), LayerNorm(6), (jnp.asarray(SCALE), jnp.asarray(OFFSET)))
    expected = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + 1e-6) * SCALE + OFFSET
    np.testing.assert_allclose(norm(jnp.asarray(X)), expected, rtol=1e-5, atol=1e-5)


def test_rms_norm_is_its_formula():
    norm = eqx.tree_at(lambda n: n.scale, RMSNorm(6), jnp.asarray(SCALE))
    expected = X / np.sqrt(np.mean(X**2, axis=-1, keepdims=True) + 1e-6) * SCALE
    np.testing.assert_allclose(norm(jnp.asarray(X)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_norms_of_zero_are_finite(norm):
    value, gradient = jax.jit(jax.value_and_grad(lambda x: norm(6)(x).sum()))(jnp.zeros(6))
    assert value == 0.0
    assert np.all(np.isfinite(gradient))


def test_mlp_starts_near_zero():
    y = jax.jit(lambda key, x: MLP(6, key=key)(x), compiler_options=QUICK)(jax.random.key(0), X)
    assert 0.0 < np.max(np.abs(y)) < 0.2


@pytest.fixture(scope="module")
def fresh_ssm():
    sizes = NetworkConfig(d_model=6, d_state=5, expand=2, dt_rank=3)
    return jax.jit(lambda key: SelectiveSSM(sizes, key=key), compiler_options=QUICK)(jax.random.key(0))


def test_mamba_starts_as_published(fresh_ssm):
    dt = jax.nn.softplus(fresh_ssm.step_size.proj.bias)
    assert np.all((dt >= 0.999e-3) & (dt <= 0.1001))
    assert np.max(dt) > 5 * np.min(dt)  # spread over the range
    assert 0.3 < np.max(np.abs(fresh_ssm.step_size.proj.weight)) <= 3**-0.5
    np.testing.assert_allclose(-np.exp(fresh_ssm.A_log), np.tile(-np.arange(1.0, 6.0), (12, 1)), rtol=1e-6)
    np.testing.assert_array_equal(fresh_ssm.skip, 1.0)


def test_step_size_is_a_bounded_softplus(fresh_ssm):
    step_size = fresh_ssm.step_size
    delta = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    expected = np.logaddexp(0.0, delta @ step_size.proj.weight + step_size.proj.bias)
    np.testing.assert_allclose(step_size(jnp.asarray(delta)), expected, rtol=1e-5, atol=1e-6)
    drifted = step_size(jnp.asarray(1e4 * delta))
    assert np.all((drifted >= 0.0) & (drifted <= DT_LIMIT))
    assert np.max(drifted) == DT_LIMIT
