"""`mam plan`: what a run would need, before it runs."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from mam.cli.evaluate import read_sweep
from mam.cli.output import display
from mam.config import Config
from mam.errors import UserError


@dataclass(frozen=True)
class Plan:
    """Say what memory a run would need, and what to change if that is too much.

    Takes the settings of `mam train`, compiles its train step and one joint action, and runs
    nothing.
    """

    preset: str | None = None
    """Settings to start from, in place of the task's own preset."""
    start: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """Settings to start from: the folder of a run or of an exported policy, zoo:NAME, or a JSON
    file such as a run's config.json."""
    sweep: str | None = None
    """Values of an option of the task that are planned one after another, such as
    agents=32,1000,10000."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def plan(args: Plan) -> None:
    """Print what train steps and joint actions need, with settings that fit if these do not."""
    from rich.table import Table

    from mam.envs.external.factories import with_options
    from mam.runs import process as runtime
    from mam.runs.footprint import MEMORY_FRACTION, device_memory, gigabytes
    from mam.runs.footprint import plan as candidates

    runtime.configure(keep_programs=False)  # how long compiling takes is one of the results
    configs = {"": args.config}
    if args.sweep is not None:
        option, values = read_sweep(args.sweep, numbers=False)
        named = {f"{option}={value}: ": value for value in values}
        configs = {
            name: replace(args.config, env=with_options(args.config.env, f"{option}={value}"))
            for name, value in named.items()
        }
    room, fitting = device_memory(), dict.fromkeys(configs)
    table = Table(
        "settings", "agents", "state", "temporary", "in all", "one joint action", "compile s"
    )
    for name, config in configs.items():
        for found in candidates(config):
            need = found.footprint
            sizes = (need.state, need.temporary, need.total, found.acting.total)
            table.add_row(
                name + found.changes,
                str(found.num_agents),
                *(gigabytes(size) for size in sizes),
                f"{found.compile_seconds:.1f}",
            )
            if fitting[name] is None and need.total <= MEMORY_FRACTION * room:
                fitting[name] = found.changes
    display(table)
    print(
        f"the device has {gigabytes(room)}, "
        f"of which a train step should need no more than {MEMORY_FRACTION:.0%}"
    )
    for name, changes in fitting.items():
        if changes is None:
            raise UserError(
                f"{name}nothing tried fits: take fewer --ppo.num-envs or --num-seeds, "
                "or a shorter --ppo.rollout-length"
            )
        print(f"{name}fits {'' if changes == 'as asked for' else 'with '}{changes}")
