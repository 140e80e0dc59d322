"""The attention mixers against `jax.nn.dot_product_attention`, on the mixers' own projections."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import NetworkConfig
from mam.networks.mixers.attention import (
    FEW_AGENTS,
    Attended,
    Attention,
    CausalAttention,
    attend,
)

N, E = 6, 8
ALIVE = np.array([[True] * 6, [True] * 4 + [False] * 2])


@jax.jit
def both(mixer, x, context, alive):
    """The mixer's output and the reference's."""
    p = mixer.projections
    causal = not isinstance(mixer, Attention)
    source = context if causal and mixer.cross else x
    query, key, value = p.split(p.query(source)), p.split(p.key(x)), p.split(p.value(x))
    mask = None if alive is None else alive[:, None, None, :]
    expected = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)
    return mixer(x, context, alive=alive), p.merge(expected)


@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize(
    "make", [Attention, CausalAttention, functools.partial(CausalAttention, cross=True)]
)
def test_attention_equals_the_reference(make, num_heads):
    rng = np.random.default_rng(0)
    empty = jax.eval_shape(
        lambda k: make(NetworkConfig(d_model=E, num_heads=num_heads), key=k), jax.random.key(0)
    )
    mixer = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.0, 0.6, leaf.shape), leaf.dtype), empty
    )
    x, context = (rng.normal(size=(2, N, E)).astype(np.float32) for _ in range(2))
    for alive in (None, ALIVE):
        living = ALIVE if alive is not None else np.ones_like(ALIVE)
        actual, expected = both(mixer, x, context, alive)
        np.testing.assert_allclose(actual[living], expected[living], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_agents", [1, FEW_AGENTS, FEW_AGENTS + 1])
def test_gradients_equal_the_reference(num_agents):
    rng = np.random.default_rng(0)
    visible = np.tri(num_agents, dtype=bool)
    inputs = [rng.normal(size=(3, 2, num_agents, E)).astype(np.float32) for _ in range(4)]

    def ours(query, keys, values):
        return attend(query, Attended(keys, values, jnp.asarray(visible)))

    def reference(*inputs):
        agents_first = (jnp.swapaxes(x, -2, -3) for x in inputs)
        return jnp.swapaxes(jax.nn.dot_product_attention(*agents_first, mask=visible), -2, -3)

    found, expected = (
        jax.jit(lambda *x, f=f: (f(*x[:3]), jax.vjp(f, *x[:3])[1](x[3])))(*inputs)
        for f in (ours, reference)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )


def test_heads_are_contiguous_slices():
    mixer = jax.eval_shape(
        lambda k: Attention(NetworkConfig(d_model=E, num_heads=2), key=k), jax.random.key(0)
    )
    np.testing.assert_array_equal(
        mixer.projections.split(jnp.arange(8.0)), [[0, 1, 2, 3], [4, 5, 6, 7]]
    )
