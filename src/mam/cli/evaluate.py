"""`mam evaluate RUN`: fresh episodes with the best weights."""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from mam.cli.output import display
from mam.cli.start import load
from mam.errors import UserError


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
    import jax
    from rich.table import Table

    from mam.learning.evaluate import UNFINISHED
    from mam.runs import process as runtime
    from mam.runs.sinks import RETURN, mean_and_spread, to_json

    runtime.configure()
    if args.episodes < 1:
        raise UserError(f"--episodes must be positive, got {args.episodes}")
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():  # notes are no JSON
        config, trainer, policies, _, seeds = load(args.run, args.env, trust=args.trust, greedy=args.greedy)
        keys = jax.random.split(jax.random.key(args.seed), len(seeds))
        try:
            metrics = jax.device_get(trainer.evaluate(policies, keys, args.episodes, args.greedy))
        finally:
            trainer.close()
    metrics = {name: value for name, value in metrics.items() if name != UNFINISHED or value.any()}
    if args.json:
        facts = {"run": str(args.run), "env": config.env, "algorithm": config.algorithm, "seeds": seeds}
        asked = {"greedy": args.greedy, "seed": args.seed}
        print(json.dumps(facts | asked | {"metrics": {name: to_json(value) for name, value in metrics.items()}}))
        return
    mode = "greedy" if args.greedy else "sampled"
    table = Table(title=f"{config.algorithm} on {config.env}: {args.episodes} episodes, {mode} actions")
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
