"""How the encoder's state-space mixer puts its two passes together, against its equations one pass at a time."""

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
    mixer = MIXERS[family].roles.encoder(sizes, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 7, 8))

    def one_pass(u):
        return mixer.ssm.out_proj(mixer.ssm.extend(None, mixer.ssm.project(u), None, None)[1])

    u = mixer.pre_norm(x)
    forward = one_pass(u)
    read = u if combine == "sum" else forward
    backward = jnp.flip(one_pass(jnp.flip(read, axis=1)), axis=1)
    both = forward + backward if combine == "sum" else forward * backward
    np.testing.assert_allclose(mixer(x), mixer.post_norm(x + both), rtol=1e-4, atol=1e-5)
