import functools

import jax
import jax.numpy as jnp
import numpy as np

from mam.config import NetworkConfig
from mam.networks.decoder import Decoder
from mam.networks.mixers import MIXERS

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # less time compiling
B, N, A, E = 2, 4, 3, 8


def test_blocks_of_several_kinds_decode_as_they_were_taught():
    """Each block's state goes to that block: a mix-up would not even have the right shape, or another answer."""
    rng = np.random.default_rng(0)
    sizes = NetworkConfig(d_model=E, d_state=4, num_heads=2)
    layout = [MIXERS["attention"], MIXERS["mamba"], MIXERS["attention"]]
    empty = jax.eval_shape(lambda key: Decoder(A, layout, sizes, key=key), jax.random.key(0))
    decoder = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.4, leaf.shape), leaf.dtype), empty)
    action = jnp.asarray(rng.integers(A, size=(B, N)), jnp.int32)
    obs_rep = jnp.asarray(rng.normal(size=(B, N, E)), jnp.float32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def teacher_forced(decoder):
        return decoder(action, obs_rep)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def autoregressive(decoder):
        def step(state, inputs):
            return decoder.step(state, *inputs)

        start = jnp.full((B, 1), decoder.start_token, jnp.int32)
        previous = jnp.concatenate([start, action[:, :-1]], axis=1)
        xs = (jnp.swapaxes(previous, 0, 1), jnp.swapaxes(obs_rep, 0, 1))
        _, logits = jax.lax.scan(step, decoder.init_state(N, (B,)), xs)
        return jnp.swapaxes(logits, 0, 1)

    expected = teacher_forced(decoder)
    np.testing.assert_allclose(autoregressive(decoder), expected, rtol=1e-5, atol=1e-5)
    assert np.std(expected) > 0.1
