"""`mam import WEIGHTS`: weights by name as a policy that plays."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from mam.errors import UserError


@dataclass(frozen=True)
class Import:
    """Make a policy of a safetensors file, with the names and shapes that `mam export` writes.

    What it makes is a folder for `mam evaluate`, `play`, `record`, `export`, `train --init` and
    `mam.load`.
    """

    weights: tyro.conf.Positional[Path]
    """The file."""
    like: Path | None = None
    """Whose settings and sizes they are of: the folder of a run, or of an exported policy."""
    out: Path | None = None
    """Folder to make."""
    trust: bool = False
    """Import the policy that the folder names, where that is code."""


def import_weights(args: Import) -> None:
    """Write the policy, and say what it is."""
    from mam.deploy.export import import_weights as write
    from mam.runs.load import load

    if args.like is None or args.out is None:
        raise UserError(
            "import needs --like, the folder whose sizes the weights have, and --out, one to make"
        )
    policy = load(args.like, trust=args.trust)
    found = write(args.weights, policy, args.out)
    print(f"{policy.config.algorithm} for {policy.config.env} is in {args.out}: {found}")
