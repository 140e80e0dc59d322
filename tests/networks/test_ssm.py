"""State-space blocks: the encoder's two passes against its equations, and resets in sequences."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import EncoderConfig, NetworkConfig
from mam.networks.mixers.registry import MIXERS

SIZES = NetworkConfig(d_model=8, d_state=4, head_dim=8)


@pytest.mark.parametrize("combine", ["sum", "product"])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_the_encoder_is_two_passes(family, combine):
    sizes = replace(SIZES, encoder=EncoderConfig(combine=combine))
    mixer = MIXERS[family].build("encoder", sizes, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 7, 8))

    def one_pass(u):
        return mixer.ssm.out_proj(mixer.ssm.unroll(None, mixer.ssm.project(u), None, None)[1])

    u = mixer.pre_norm(x)
    forward = one_pass(u)
    read = u if combine == "sum" else forward
    backward = jnp.flip(one_pass(jnp.flip(read, axis=1)), axis=1)
    both = forward + backward if combine == "sum" else forward * backward
    np.testing.assert_allclose(mixer(x), mixer.post_norm(x + both), rtol=1e-4, atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(read, ssm, x, state, reset):
    """What `read` gives, outputs and last state, and the gradients of their sum of cosines."""

    def loss(ssm, x, state):
        state, y = read(ssm, state, ssm.project(x), reset)
        return sum(jnp.sum(jnp.cos(v)) for v in jax.tree.leaves((y, state))), (y, state)

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(ssm, x, state)


def at_once(ssm, state, inputs, reset):
    return ssm.unroll(state, inputs, None, None, reset=reset)


def step_by_step(ssm, state, inputs, reset):
    def step(state, agent):
        return ssm.step(state, agent[0], None, reset=agent[1])

    state, y = jax.lax.scan(
        step, state, (jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), inputs), reset.T)
    )
    return state, jnp.swapaxes(y, 0, 1)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_resets_at_once_and_step_by_step(family):
    """As a memory along time is read in learning and in acting; a reset clears NaN, too."""
    ssm = MIXERS[family].build("decoder", SIZES, key=jax.random.key(0)).ssm
    x = jax.random.normal(jax.random.key(1), (3, 9, 8))
    reset = jax.random.uniform(jax.random.key(2), (3, 9)) < jnp.array([[0.3], [0.0], [1.0]])
    reset = reset.at[0, 0].set(True)
    state = ssm.init_state((3,), None)
    state = jax.tree.map(lambda v: jnp.ones_like(v).at[0].set(jnp.nan), state)
    actual, expected = (
        values_and_gradients(read, ssm, x, state, reset) for read in (at_once, step_by_step)
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.all(np.isfinite(b))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
