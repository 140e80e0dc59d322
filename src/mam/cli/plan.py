"""`mam plan`: what a run would need, before it runs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mam.cli.output import display
from mam.config import Config
from mam.errors import UserError


@dataclass(frozen=True)
class Plan:
    """Say what memory a run would need, and what to change if that is too much.

    Takes the settings of `mam train`, compiles its train step, and runs nothing.
    """

    preset: str | None = None
    """Settings to start from, in place of the task's own preset."""
    start: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """Settings to start from: the folder of a run, or a JSON file such as its config.json."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def plan(args: Plan) -> None:
    """Print what the train step needs, with settings that fit if these do not."""
    from rich.table import Table

    from mam.runs import process as runtime
    from mam.runs.footprint import MEMORY_FRACTION, device_memory, gigabytes
    from mam.runs.footprint import plan as candidates

    runtime.configure(keep_programs=False)  # how long compiling takes is one of the results
    room = device_memory()
    table = Table("settings", "state", "temporary", "in all", "compile s")
    fitting = None
    for found in candidates(args.config):
        need = found.footprint
        sizes = (gigabytes(size) for size in (need.state, need.temporary, need.total))
        table.add_row(found.changes, *sizes, f"{found.compile_seconds:.1f}")
        if fitting is None and need.total <= MEMORY_FRACTION * room:
            fitting = found
    display(table)
    print(
        f"the device has {gigabytes(room)}, "
        f"of which a train step should need no more than {MEMORY_FRACTION:.0%}"
    )
    if fitting is None:
        raise UserError(
            "nothing tried fits: take fewer --ppo.num-envs or --num-seeds, "
            "or a shorter --ppo.rollout-length"
        )
    print(
        "fits as asked for" if fitting.changes == "as asked for" else f"fits with {fitting.changes}"
    )
