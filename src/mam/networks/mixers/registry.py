"""Mixers by family: all that the library says of each.

A new mixer is a new module here and a row of `MIXERS`. Another package adds one by an entry point
of the group `mam.mixers` that names a `MixerFamily`, so that every process knows it: trials of
sweeps and runs of experiments are processes of their own. Nothing here imports JAX, so that help
and sweeps read it too; what computes is loaded where it is built.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from mam.config import NetworkConfig
from mam.errors import UserError, load_entry_point, shown, unknown_name


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
    # Settings that no other mixer has, with their defaults; see `NetworkConfig.mixer_options`.
    own: Mapping[str, Any] = field(default_factory=dict)
    remembers: bool = False  # earlier environment steps

    def build(self, role: str, config: NetworkConfig, *, key: Any) -> Any:
        """Build a mixer of this family.

        Args:
            role: encoder, decoder or cross.
            config: of the networks.
            key: of the weights.
        """
        return getattr(self.load(), role)(config, key=key, **self.settings(config))

    def settings(self, config: NetworkConfig) -> dict[str, Any]:
        """Return the values of the settings that this family alone has.

        Raises:
            UserError: for one that it does not have, or a value of another type than the default.
        """
        values = dict(self.own)
        for option in config.mixer_options:
            name, _, text = option.partition("=")
            policy, _, setting = name.partition(".")
            if policy != self.policy:
                continue
            if setting not in values:
                known = [f"{policy}.{own}" for own in values]
                raise unknown_name("mixer option", name, known, see="mam list")
            values[setting] = _read(name, text, type(values[setting]))
        return values

    @property
    def own_defaults(self) -> list[str]:
        """Its own settings, as they are written."""
        return [f"{self.policy}.{name}={value}" for name, value in self.own.items()]


def _read(name: str, text: str, kind: type) -> Any:
    """Read the value of a mixer's own setting."""
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        names = {bool: "true or false", int: "a whole number", float: "a number"}
        raise UserError(f"{name} must be {names[kind]}, got {shown(text)}") from None


def _in(module: str) -> Callable[[], Any]:
    return lambda: import_module(f"mam.networks.mixers.{module}").ROLES


_STATE_SPACE = {
    "d_state": (1, 2, 4, 8, 16, 32),
    "d_conv": (),
    "expand": (),
    "encoder.combine": (),
    "agent_chunk": (),
}

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


GROUP = "mam.mixers"  # of entry points, by which other packages add theirs


def mixer_families() -> Mapping[str, MixerFamily]:
    """Return all families by name: the library's, those of installed packages, and registered ones.

    Raises:
        UserError: if one of an installed package cannot be imported or added.
    """
    _add_installed()
    return MIXERS


@cache
def _add_installed() -> None:
    for point in entry_points(group=GROUP):
        family = load_entry_point("mixer", point)
        if not isinstance(family, MixerFamily):
            raise UserError(f"the mixer {point.name} must be a MixerFamily, got {shown(family)}")
        add_family(point.name, family)


def add_family(name: str, family: MixerFamily) -> None:
    """Add a family, or replace the one of the same name.

    Args:
        name: such as mamba.
        family: with a letter and a policy's name of its own.

    Raises:
        UserError: the letter is no letter or digit, or it or the policy's name is taken.
    """
    letter, policy = family.letter, family.policy
    if not re.fullmatch("[A-Za-z0-9]", letter):
        raise UserError(f"the letter of {name} must be one of A-Z, a-z, 0-9, got {shown(letter)}")
    others = [family for other, family in MIXERS.items() if other != name]
    if letter in (other.letter for other in others):
        raise UserError(f"the letter {letter} of {name} is taken: choose another")
    if policy in (other.policy for other in others):
        raise UserError(f"the policy {shown(policy)} of {name} exists: choose another name")
    MIXERS[name] = family


def check_own_settings(config: NetworkConfig) -> None:
    """Refuse options of mixers that do not exist, or do not have them.

    Raises:
        UserError: naming the first one.
    """
    families = {family.policy: family for family in mixer_families().values()}
    for option in config.mixer_options:
        policy = option.partition(".")[0]
        if policy not in families:
            raise unknown_name("mixer of an option", policy, families, see="mam list")
        families[policy].settings(config)


def sequence_policies() -> str:
    """Return the names of the policies whose blocks are of one family, as a list in a line."""
    return ", ".join(family.policy for family in mixer_families().values())


def families_of(layout: str, setting: str) -> tuple[MixerFamily, ...]:
    """Return the families of a layout's letters, one per block.

    Args:
        layout: such as "MA".
        setting: where it was given, for the message.

    Raises:
        UserError: for a letter that no family has.
    """
    families = mixer_families()
    by_letter = {family.letter: family for family in families.values()}
    if not layout or set(layout) - by_letter.keys():
        known = ", ".join(f"{family.letter} ({name})" for name, family in families.items())
        raise UserError(f"{setting} must be letters of {known}, one per block, got {shown(layout)}")
    return tuple(by_letter[letter] for letter in layout)
