"""`mam zoo`: the trained policies that come with the library."""

import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Zoo:
    """List the trained policies that come with the library, with their scores and commands.

    Play one with `mam play zoo:NAME`; evaluate, export and --init take such names as well.
    """


def zoo(args: Zoo) -> None:
    """Print the policies of the zoo: a line for each, and one to copy that trains it."""
    from mam.config import Config, from_json
    from mam.presets import preset_for
    from mam.runs.files import read_object
    from mam.runs.load import CARD
    from mam.runs.zoo import PREFIX, policy_folder, zoo_names
    from mam.study.experiment.grid import flags

    names = zoo_names()
    for name in names:
        card = read_object(policy_folder(f"{PREFIX}{name}") / CARD)
        config = from_json(Config, card["config"])
        command = ["mam", "train", "--env", config.env]
        command += flags(config, preset_for(config.env)[0])
        score = card["scores"].get("absolute_metric")
        metric = "" if score is None else f" · absolute metric {score:.3f}"
        print(f"{PREFIX}{name}{metric}\n  {shlex.join(command)}")
    if not names:
        print("the zoo is empty")
