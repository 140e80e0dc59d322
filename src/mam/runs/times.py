"""Where a run's wall-clock time went: times.json, kept beside its metrics."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

from mam.errors import UserError
from mam.learning.stopwatch import Part
from mam.runs.files import read_object
from mam.runs.sinks import write_atomically


def write_times(path: Path, seconds: Mapping[Part, float]) -> None:
    """Write the seconds of each part to a run's file."""
    write_atomically(path, json.dumps(seconds, indent=2))


def read_times(path: Path) -> dict[Part, float]:
    """Read what `write_times` wrote; an empty dictionary if the file is missing or damaged."""
    try:
        times = read_object(path)
    except UserError:
        return {}
    return cast(dict[Part, float], times) if are_times(times) else {}


def are_times(times: Any) -> bool:
    """Say whether this is seconds by part."""
    return isinstance(times, dict) and all(
        name in get_args(Part) and isinstance(seconds, float) and math.isfinite(seconds)
        for name, seconds in times.items()
    )


def shares(seconds: Mapping[Part, float]) -> str:
    """Return each part's share, the largest first, such as `environment 61 %, update 39 %`."""
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(
        f"{name} {x / total:.0%}".replace("%", " %")
        for name, x in ordered
        if x >= 0.005 * total > 0
    )
