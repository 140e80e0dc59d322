"""What is searched: the paper's ranges of what a policy reads, and those of its mixers."""

import json
from collections.abc import Sequence
from typing import Any

from mam.config import Config
from mam.errors import unknown_name
from mam.networks.mixers.registry import MixerFamily, families_of, mixer_families
from mam.study.experiment.grid import changed

RANGES: dict[str, tuple[Any, ...]] = {
    "ppo.lr": (1e-4, 2.5e-4, 5e-4, 1e-3),
    "ppo.num_epochs": (2, 5, 10, 15),
    "ppo.num_minibatches": (1, 2, 4, 8),
    "ppo.clip_eps": (0.05, 0.1, 0.2),
    "ppo.ent_coef": (0.0, 1e-5, 1e-3, 1e-2),
    "ppo.max_grad_norm": (0.5, 5.0, 10.0),
    "network.d_model": (32, 64, 128),
    "network.num_blocks": (1, 2, 3),
}


def space_of(config: Config, names: Sequence[str] = ()) -> dict[str, tuple[Any, ...]]:
    """Return the values of each setting to search.

    Args:
        config: its policy and layout decide what there is to search.
        names: of the settings, `ppo.lr`, or with values of one's own, `ppo.lr=1e-4,1e-3`; all that
            the policy reads if empty.

    Raises:
        UserError: for a setting without a range, or a value that it cannot have.
    """
    read = dict(RANGES)
    network = config.network
    layout = network.encoder.layout or network.decoder.layout
    if layout and network.critic in ("auto", "shared"):
        del read["network.num_blocks"]  # a layout says how many blocks there are
    for family in _families(config):
        read |= {f"network.{name}": values for name, values in family.options.items() if values}
    if not names:
        return read
    space = {}
    for asked in names:
        name, given, values = asked.partition("=")
        if given:
            space[name] = _own_values(config, name, values)
        elif name in read:
            space[name] = read[name]
        else:
            raise unknown_name(
                f"setting of {config.algorithm} to search", name, read, see="mam sweep --help"
            )
    return space


def _families(config: Config) -> list[MixerFamily]:
    """Return the mixers of its layouts and, where encoder or decoder has none, of its policy."""
    layouts = config.network.layouts
    used = [family for name, layout in layouts.items() for family in families_of(layout, name)]
    if not {"network.encoder.layout", "network.decoder.layout"} <= layouts.keys():
        mixed = config.policy.removeprefix("rec_")
        used += [family for family in mixer_families().values() if family.policy == mixed]
    return [family for family in mixer_families().values() if family in used]


def _own_values(config: Config, name: str, text: str) -> tuple[Any, ...]:
    """Read the values in `ppo.gamma=0.9,0.99`, each of which the setting must be able to have."""
    values = tuple(map(_value, text.split(",")))
    for value in values:
        changed(config, {name: value})
    return tuple(dict.fromkeys(values))


def _value(text: str) -> Any:
    try:
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
    except json.JSONDecodeError:
        return text
