"""The encoder: observations to representations and values, all agents at once."""

from collections.abc import Sequence

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Key

from mam.config import NetworkConfig
from mam.networks.blocks import EncoderBlock
from mam.networks.heads import Head
from mam.networks.layers import HIDDEN_GAIN, Dense, LayerNorm
from mam.networks.mixers import MixerFamily


class Encoder(eqx.Module):
    """x = LN(GELU(Dense(LN(obs)))), then the blocks; a value head reads the result (MAT, §3)."""

    obs_norm: LayerNorm
    embed: Dense
    norm: LayerNorm
    blocks: tuple[EncoderBlock, ...]
    value_head: Head

    def __init__(self, obs_dim: int, layout: Sequence[MixerFamily], sizes: NetworkConfig, *, key: Key[Array, ""]):
        embed_key, value_key, *block_keys = jax.random.split(key, 2 + len(layout))
        self.obs_norm = LayerNorm(obs_dim)
        self.embed = Dense(obs_dim, sizes.d_model, key=embed_key, gain=HIDDEN_GAIN)
        self.norm = LayerNorm(sizes.d_model)
        self.blocks = tuple(EncoderBlock(mixers, sizes, key=k) for mixers, k in zip(layout, block_keys, strict=True))
        self.value_head = Head(sizes.d_model, 1, key=value_key)

    def __call__(self, agents_view: Float[Array, "*batch N O"], alive: Bool[Array, "*batch N"]) -> "Encoded":
        """Encodes agents given in the order in which they decide, the dead last."""
        x = self.norm(jax.nn.gelu(self.embed(self.obs_norm(agents_view))))
        for block in self.blocks:
            x = block(x, alive)
        return Encoded(obs_rep=x, value=self.value_head(x)[..., 0])


class Encoded(eqx.Module):
    """What the encoder makes of the observations."""

    obs_rep: Float[Array, "*batch N E"]
    value: Float[Array, "*batch N"]
