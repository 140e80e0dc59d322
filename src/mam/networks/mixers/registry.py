"""Mixers by family: all that the library says of each.

A new mixer is a new module here and a row of `MIXERS`. Nothing here imports JAX, so that help and
sweeps read it too; what computes is loaded where it is built.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from mam.errors import UserError, shown


@dataclass(frozen=True)
class MixerFamily:
    """One kind of mixing, in the three roles of an encoder–decoder policy."""

    letter: str  # its name in a layout, such as "MA"
    policy: str  # the name of the sequence policy whose blocks are all of this kind
    description: str  # of that policy, in a line
    load: Callable[[], Any]  # imports what it needs and returns `mam.networks.mixers.base.Roles`
    # Settings of the network that it reads, and the values that a sweep tries; none for those it
    # leaves alone.
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    remembers: bool = False  # earlier environment steps

    @property
    def roles(self) -> Any:
        """How a mixer of this family is built in each role."""
        return self.load()


def _in(module: str) -> Callable[[], Any]:
    return lambda: import_module(f"mam.networks.mixers.{module}").ROLES


_STATE_SPACE = {"d_state": (1, 2, 4, 8, 16, 32), "d_conv": (), "expand": (), "encoder.combine": ()}

MIXERS = {
    "mamba": MixerFamily(
        letter="M",
        policy="mam",
        description="Multi-Agent Mamba: state-space blocks along the agents",
        load=_in("mamba"),
        options=_STATE_SPACE | {"dt_rank": (1, 2, 4, 8, 16, 32, 64, 128), "scan": ()},
    ),
    "mamba2": MixerFamily(
        letter="2",
        policy="mam2",
        description="the same with Mamba-2 blocks: matrix products instead of a scan",
        load=_in("mamba2"),
        options=_STATE_SPACE | {"head_dim": ()},
    ),
    "attention": MixerFamily(
        letter="A",
        policy="mat",
        description="Multi-Agent Transformer: attention along the agents",
        load=_in("attention"),
        options={"num_heads": (1, 2, 4)},
    ),
    "retention": MixerFamily(
        letter="R",
        policy="ff_sable",
        description="Sable without memory: retention along the agents",
        load=_in("retention"),
        options={"num_heads": (1, 2, 4)},
    ),
    "sable": MixerFamily(
        letter="S",
        policy="sable",
        description="Sable: retention along agents and time, remembers",
        load=_in("sable"),
        options={"num_heads": (1, 2, 4), "retention_decay": (0.3, 0.5, 0.8, 1.0)},
        remembers=True,
    ),
}


def sequence_policies() -> str:
    """Return the names of the policies whose blocks are of one family, as a list in a line."""
    return ", ".join(family.policy for family in MIXERS.values())


def families_of(layout: str, setting: str) -> tuple[MixerFamily, ...]:
    """Return the families of a layout's letters, one per block.

    Args:
        layout: such as "MA".
        setting: where it was given, for the message.

    Raises:
        UserError: for a letter that no family has.
    """
    by_letter = {family.letter: family for family in MIXERS.values()}
    if not layout or set(layout) - by_letter.keys():
        known = ", ".join(f"{family.letter} ({name})" for name, family in MIXERS.items())
        raise UserError(f"{setting} must be letters of {known}, one per block, got {shown(layout)}")
    return tuple(by_letter[letter] for letter in layout)
