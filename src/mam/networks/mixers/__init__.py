"""Mixers by family: which class plays which role. A new mixer is a new module here and a line in `MIXERS`."""

from collections.abc import Callable
from dataclasses import dataclass

from mam.networks.mixers.attention import Attention, CausalAttention, CrossAttention
from mam.networks.mixers.base import AbstractCausalMixer, AbstractMixer
from mam.networks.mixers.bimamba import BiMamba
from mam.networks.mixers.cross_mamba import CrossMamba
from mam.networks.mixers.mamba import Mamba

__all__ = ["MIXERS", "AbstractCausalMixer", "AbstractMixer", "MixerFamily"]


@dataclass(frozen=True)
class MixerFamily:
    """One kind of mixing in the three roles of an encoder–decoder policy.

    Each class is built as `mixer(sizes, key=key)` with a `mam.config.NetworkConfig`.
    """

    encoder: Callable[..., AbstractMixer]
    decoder: Callable[..., AbstractCausalMixer]
    cross: Callable[..., AbstractCausalMixer]


MIXERS = {
    "attention": MixerFamily(encoder=Attention, decoder=CausalAttention, cross=CrossAttention),
    "mamba": MixerFamily(encoder=BiMamba, decoder=Mamba, cross=CrossMamba),
}
