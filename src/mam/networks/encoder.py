"""The encoder: embedded observations to representations and values, all agents at once."""

from collections.abc import Sequence

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Key

from mam.config import NetworkConfig
from mam.networks.blocks import EncoderBlock
from mam.networks.heads import Head
from mam.networks.mixers.registry import MixerFamily


class Encoder(eqx.Module):
    """The blocks; a value head reads the result (MAT, §3)."""

    blocks: tuple[EncoderBlock, ...]
    value_head: Head
    remat: bool = eqx.field(static=True)

    def __init__(
        self, layout: Sequence[MixerFamily], config: NetworkConfig, *, key: Key[Array, ""]
    ):
        value_key, *block_keys = jax.random.split(key, 1 + len(layout))
        self.blocks = tuple(
            EncoderBlock(mixers, config, key=k)
            for mixers, k in zip(layout, block_keys, strict=True)
        )
        self.value_head = Head(config.d_model, 1, key=value_key)
        self.remat = config.remat

    def __call__(self, x: Float[Array, "*batch N E"], alive: Bool[Array, "*batch N"]) -> "Encoded":
        """Encode agents given in the order of deciding, the dead last.

        Args:
            x: the embedded observations.
            alive: False for the dead, which change nothing for the others.
        """
        for block in self.blocks:
            x = (
                jax.checkpoint(EncoderBlock.__call__)(block, x, alive)
                if self.remat
                else block(x, alive)
            )
        return Encoded(obs_rep=x, value=self.value_head(x)[..., 0])


class Encoded(eqx.Module):
    """The encoder's outputs."""

    obs_rep: Float[Array, "*batch N E"]
    value: Float[Array, "*batch N"]
