import jax
import numpy as np
import pytest

from mam.networks.heads import Head, PlainHead


@pytest.mark.parametrize("kind", [Head, PlainHead])
def test_head_starts_near_zero(kind):
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    y = jax.jit(lambda key, x: kind(6, 3, key=key)(x))(jax.random.key(0), x)
    assert y.shape == (2, 5, 3)
    assert 0.0 < np.max(np.abs(y)) < 0.1
