"""Mixers by family: which class plays which role. A new mixer is a new module here and a line in `MIXERS`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mam.networks.mixers.attention import Attention, CausalAttention
from mam.networks.mixers.base import AbstractCausalMixer, AbstractMixer
from mam.networks.mixers.mamba import SelectiveSSM
from mam.networks.mixers.mamba2 import DualSSM
from mam.networks.mixers.roles import BidirectionalSSM, CausalSSM, MakeSSM

__all__ = ["LETTERS", "MIXERS", "AbstractCausalMixer", "AbstractMixer", "MixerFamily"]


@dataclass(frozen=True)
class MixerFamily:
    """One kind of mixing in the three roles of an encoder–decoder policy.

    Each role is built as `role(sizes, key=key)` with a `mam.config.NetworkConfig`.
    """

    letter: str  # its name in a layout, such as "MA"
    encoder: Callable[..., AbstractMixer]
    decoder: Callable[..., AbstractCausalMixer]
    cross: Callable[..., AbstractCausalMixer]


def _state_space(letter: str, make: MakeSSM) -> MixerFamily:
    return MixerFamily(
        letter=letter,
        encoder=partial(BidirectionalSSM, make),
        decoder=partial(CausalSSM, make),
        cross=partial(CausalSSM, make, cross=True),
    )


MIXERS = {
    "attention": MixerFamily(
        "A", encoder=Attention, decoder=CausalAttention, cross=partial(CausalAttention, cross=True)
    ),
    "mamba": _state_space("M", SelectiveSSM),
    "mamba2": _state_space("2", DualSSM),
}
LETTERS = {family.letter: family for family in MIXERS.values()}
