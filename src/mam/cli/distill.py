"""`mam distill RUN`: another policy that does what a run's does."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mam.cli.train import Train, train
from mam.config import Config
from mam.runs.process import Hosts


@dataclass(frozen=True)
class Distill:
    """Train a policy to do what the best weights of a run do, such as --policy mam2.

    Is `mam train --learn distill --teacher RUN` with the settings of that run; every setting below
    overrides one. What comes of it is a run like any other: `mam train --resume` goes on with it.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run or of the exported policy that teaches, or zoo:NAME (see `mam zoo`)."""
    out: Path | None = None
    """Folder of the new run; runs/<task>/<policy>-distill/<time> if None."""
    trust: bool = False
    """Import the environment that the folder names, where that is code, without naming
    it as --env."""
    hosts: Hosts = field(default_factory=Hosts)
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def distill(args: Distill) -> int:
    """Train the student; return the exit code."""
    return train(Train(start=args.run, out=args.out, hosts=args.hosts, config=args.config))
