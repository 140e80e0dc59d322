import jax
import numpy as np

from mam.networks.heads import Head


def test_head_starts_near_zero():
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    y = jax.jit(lambda key, x: Head(6, 3, key=key)(x))(jax.random.key(0), x)
    assert y.shape == (2, 5, 3)
    assert 0.0 < np.max(np.abs(y)) < 0.1
