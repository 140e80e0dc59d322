"""`mam show RUN`: what was run, with what, and what came of it, without loading a checkpoint."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

from mam.cli.output import display
from mam.config import flat, to_json
from mam.presets import preset_for


@dataclass(frozen=True)
class Show:
    """Print what a run was run with and what came of it: command, settings, provenance, scores."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""


def show(args: Show) -> None:
    """Print a run's command, settings, provenance and scores.

    Raises:
        UserError: if the folder holds no run.
    """
    from mam.runs.folder import RunFolder, seeds_of
    from mam.runs.summary import deployment, summary_table
    from mam.runs.times import read_times, shares
    from mam.study.experiment.grid import flags
    from mam.study.report.collect import read_versions

    folder = RunFolder(args.run)
    config = folder.load_config()
    start, name = preset_for(config.env)
    command = ["mam", "train", "--env", config.env, *flags(config, start)]
    print(f"command (from the settings of {name}): {shlex.join(command)}")
    print("\nsettings")
    for key, value in flat(to_json(config)).items():
        print(f"  {key:<28}{value}")
    print("\nprovenance")
    for key, value in flat(read_versions(args.run)).items():
        print(f"  {key.removeprefix('packages.'):<28}{'-' if value is None else value}")
    print()
    records = folder.records() if folder.metrics.exists() else []
    title = f"{config.algorithm} on {config.env}"
    display(summary_table(records, seeds=seeds_of(config), title=title))
    if line := deployment(records, config):
        print(line)
    if line := shares(read_times(folder.times)):
        print(f"time: {line}")
