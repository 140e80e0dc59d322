"""`mam evaluate RUN`: fresh episodes with the best weights."""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from mam.cli.output import display


@dataclass(frozen=True)
class Evaluate:
    """Play fresh episodes with the best weights of a run and report the returns."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    env: str | None = None
    """Task to play in place of the run's own: with another number of agents, say."""
    episodes: int = 320
    """Episodes per seed."""
    greedy: bool = False
    """Take the most likely actions instead of sampling them."""
    seed: int = 0
    """Decides the episodes."""
    json: bool = False
    """Print one JSON object with every episode instead of a table."""
    trust: bool = False
    """Import the environment that the folder names, where that is code, without naming it as --env."""


def evaluate(args: Evaluate) -> None:
    """Play the episodes and print their returns."""
    from rich.table import Table

    from mam.runs import api, process
    from mam.runs.files import read_config
    from mam.runs.loop import seeds_of
    from mam.runs.sinks import RETURN, mean_and_spread, to_json

    process.configure()
    asked = {"greedy": args.greedy, "seed": args.seed}
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():  # notes are no JSON
        metrics = api.evaluate(args.run, episodes=args.episodes, env=args.env, trust=args.trust, **asked)
    config = read_config(args.run / "config.json")
    env, seeds = args.env or config.env, seeds_of(config)
    if args.json:
        facts = {"run": str(args.run), "env": env, "algorithm": config.algorithm, "seeds": seeds}
        print(json.dumps(facts | asked | {"metrics": {name: to_json(value) for name, value in metrics.items()}}))
        return
    mode = "greedy" if args.greedy else "sampled"
    table = Table(title=f"{config.algorithm} on {env}: {args.episodes} episodes, {mode} actions")
    for name in ("seed", *metrics):
        table.add_column(name, justify="right")
    for index, seed in enumerate(seeds):
        table.add_row(
            str(seed), *(f"{value[index].mean():.3f} ± {value[index].std():.3f}" for value in metrics.values())
        )
    if len(seeds) > 1:
        table.add_section()
        table.add_row("mean ± std", *(mean_and_spread(value) for value in metrics.values()))
    display(table)
    print(f"± is the standard deviation over episodes; {RETURN} is the team's, averaged over agents")
