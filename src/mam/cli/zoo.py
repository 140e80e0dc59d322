"""`mam zoo`: the trained policies that come with the library."""

import shlex
from dataclasses import dataclass

from mam.cli.output import display


@dataclass(frozen=True)
class Zoo:
    """List the trained policies that come with the library, with their scores and commands.

    Play one with `mam play zoo:NAME`; evaluate, export and --init take such names as well.
    """


def zoo(args: Zoo) -> None:
    """Print the policies of the zoo."""
    from rich.table import Column, Table

    from mam.config import Config, from_json
    from mam.presets import preset_for
    from mam.runs.files import read_object
    from mam.runs.load import CARD
    from mam.runs.zoo import PREFIX, policy_folder, zoo_names
    from mam.study.experiment.grid import flags

    names = zoo_names()
    whole = Column("name", min_width=max((len(f"{PREFIX}{name}") for name in names), default=0))
    table = Table(whole, Column("absolute metric", justify="right"), "trained by", box=None)
    for name in names:
        card = read_object(policy_folder(f"{PREFIX}{name}") / CARD)
        config = from_json(Config, card["config"])
        command = ["mam", "train", "--env", config.env]
        command += flags(config, preset_for(config.env)[0])
        score = card["scores"].get("absolute_metric")
        table.add_row(
            f"{PREFIX}{name}", "–" if score is None else f"{score:.3f}", shlex.join(command)
        )
    display(table if table.row_count else "the zoo is empty")
