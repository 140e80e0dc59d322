"""The bidirectional Mamba block of MAM's encoder (arXiv 2410.19382, §4)."""

import jax.numpy as jnp
from jaxtyping import Array, Key

from mam.config import NetworkConfig
from mam.networks.layers import LayerNorm, RMSNorm
from mam.networks.mixers.base import AbstractMixer
from mam.networks.mixers.mamba import SelectiveSSM


class BiMamba(AbstractMixer):
    """One set of weights, two passes, cascaded and multiplied.

        f = SSM(x);  r = flip(SSM(flip(f)));  out = LayerNorm(x + f ⊙ r),  with x after RMSNorm inside

    The reverse pass reads the forward pass's output, so agent 1 sees every agent through it.
    """

    pre_norm: RMSNorm
    ssm: SelectiveSSM
    post_norm: LayerNorm

    def __init__(self, sizes: NetworkConfig, *, key: Key[Array, ""]):
        self.pre_norm = RMSNorm(sizes.d_model)
        self.ssm = SelectiveSSM(sizes, key=key)
        self.post_norm = LayerNorm(sizes.d_model)

    def __call__(self, x, context=None, *, alive=None):
        forward = self.ssm(self.pre_norm(x), alive=alive)
        flipped_alive = None if alive is None else jnp.flip(alive, axis=-1)
        backward = jnp.flip(self.ssm(jnp.flip(forward, axis=-2), alive=flipped_alive), axis=-2)
        return self.post_norm(x + forward * backward)
