"""Configurations side by side."""

import itertools
from typing import Any

from mam.config import Config, flat, from_json, to_json
from mam.presets import preset_for


def grid(base: Config | None = None, **settings: Any) -> list[tuple[str, Config]]:
    """Combine settings in every way, each with a name that stays the same when values are added.

    A list or tuple is an axis; any other value holds for all. Grouped settings are written
    `**{"ppo.lr": [1e-4, 5e-4]}`. The name is `<task>/<algorithm>`, then all other axes:
    `lbf/small/mam,ppo.lr=0.0005`.

    Args:
        base: what the settings are changed in; the preset of each task if None.
        settings: fields of `Config` or, dotted, of its groups.

    Raises:
        UserError: for a setting that does not exist or has the wrong type, or a combination that no
            run could have.
    """
    axes = {key: value for key, value in settings.items() if isinstance(value, list | tuple)}
    fixed = {key: value for key, value in settings.items() if key not in axes}
    runs = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        env = (fixed | chosen).get("env", Config.env if base is None else base.env)
        config = changed(base or preset_for(env)[0], fixed | chosen)
        labels = [f"{key}={value}" for key, value in chosen.items() if key not in ("env", "policy")]
        runs.append((",".join([f"{config.env}/{config.algorithm}", *labels]), config))
    return runs


def changed(config: Config, settings: dict[str, Any]) -> Config:
    """Change some values of a configuration, `ppo.lr` reaching into a group, and check the whole.

    Raises:
        UserError: for a setting that does not exist or has the wrong type, or values that no run
            could have.
    """
    data = to_json(config)
    for key, value in settings.items():
        *groups, last = key.split(".")
        inner = data
        for group in groups:
            inner = inner.get(group) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner[last] = value
        else:
            data[key] = value  # no such group: `from_json` says so
    return from_json(Config, data)


def flags(config: Config, base: Config) -> list[str]:
    """List the options of `mam train` that make `config` out of `base`."""
    before = flat(to_json(base))
    found = []
    for key, value in flat(to_json(config)).items():
        if value == before[key]:
            continue
        head, dot, last = key.replace("_", "-").rpartition(".")
        if isinstance(value, bool):
            found.append(f"--{head}{dot}{'' if value else 'no-'}{last}")
        elif isinstance(value, tuple):
            found += [f"--{head}{dot}{last}", *map(str, value)]
        else:
            found += [f"--{head}{dot}{last}", str(value)]
    return found
