"""`mam evaluate RUN`: fresh episodes with the best weights."""

import contextlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mam.cli.output import display
from mam.config import Config
from mam.errors import UserError

_MOST_AGENTS = 64  # rows of a table


@dataclass(frozen=True)
class Evaluate:
    """Play fresh episodes with the best weights of a run and report the returns."""

    run: tyro.conf.Positional[Path]
    """Folder of the run or of an exported policy, or zoo:NAME (see `mam zoo`)."""
    env: str | None = None
    """Task to play in place of the run's own: with another number of agents, say."""
    episodes: int = 320
    """Episodes per seed."""
    greedy: bool = False
    """Take the most likely actions instead of sampling them, as of runs with --eval.greedy."""
    seed: int = 0
    """Decides the episodes."""
    sweep: str | None = None
    """Values of an option of the task that are played one after another, such as
    agents=8,32,128."""
    out: Path | None = None
    """PNG of the return against the swept option."""
    json: bool = False
    """Print one JSON object with every episode instead of a table."""
    trust: bool = False
    """Import the environment that the folder names, where that is code, without naming
    it as --env."""


def evaluate(args: Evaluate) -> None:
    """Play the episodes and print their returns."""
    if args.sweep is not None:
        _evaluate_sweep(args, args.sweep)
        return
    if args.out is not None:
        raise UserError("--out draws a sweep: give --sweep, such as agents=8,32,128")
    from rich.table import Table

    from mam.learning.evaluate import AGENT_RETURN
    from mam.runs import api, process
    from mam.runs.folder import seeds_of
    from mam.runs.load import saved_config
    from mam.runs.sinks import RETURN, mean_and_spread, to_json

    process.configure()
    config = saved_config(args.run)
    greedy = args.greedy or config.eval.greedy
    asked: dict[str, Any] = {"greedy": greedy, "seed": args.seed}
    # Notes do not belong in the JSON.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        spec, metrics = api.play_episodes(
            args.run, episodes=args.episodes, env=args.env, trust=args.trust, **asked
        )
    env, seeds = args.env or config.env, seeds_of(config)
    if args.json:
        facts = {"run": str(args.run), "env": env, "algorithm": config.algorithm, "seeds": seeds}
        if AGENT_RETURN in metrics:
            asked |= {"agents": spec.agent_names}
        print(
            json.dumps(
                facts
                | asked
                | {"metrics": {name: to_json(value) for name, value in metrics.items()}}
            )
        )
        return
    of_agents, mode = metrics.pop(AGENT_RETURN, None), "greedy" if greedy else "sampled"
    table = Table(title=f"{config.algorithm} on {env}: {args.episodes} episodes, {mode} actions")
    for name in ("seed", *metrics):
        table.add_column(name, justify="right", overflow="fold")
    for index, seed in enumerate(seeds):
        table.add_row(
            str(seed),
            *(_over_episodes(value[index], name) for name, value in metrics.items()),
        )
    if len(seeds) > 1:
        table.add_section()
        table.add_row(
            "mean ± std", *(mean_and_spread(value, name) for name, value in metrics.items())
        )
    display(table)
    if of_agents is not None:
        display(_agent_table(of_agents, spec))
    print(
        f"± is the standard deviation over episodes; {RETURN} is the team's, averaged over agents"
    )


def _over_episodes(values: Any, name: str) -> str:
    """Return mean ± deviation; of a metric made of infos, over the episodes that say it."""
    import numpy as np

    from mam.runs.sinks import is_of_infos

    said = values[np.isfinite(values)] if is_of_infos(name) else values
    return f"{said.mean():.3f} ± {said.std():.3f}" if said.size else "–"


def _evaluate_sweep(args: Evaluate, asked: str) -> None:
    """Play a task with several values of an option; report and draw the returns."""
    import numpy as np

    from mam.envs.external.factories import agreed_task, with_options
    from mam.envs.registry import is_external, make
    from mam.learning.evaluate import AGENT_RETURN
    from mam.runs import api, process
    from mam.runs.load import saved_config
    from mam.runs.sinks import RETURN, seed_means
    from mam.runs.summary import plot_sweep

    process.configure()
    option, values = read_sweep(asked, numbers=args.out is not None)
    config = agreed_task(saved_config(args.run), args.env, trust=args.trust)
    greedy = args.greedy or config.eval.greedy
    how: dict[str, Any] = {"episodes": args.episodes, "greedy": greedy, "seed": args.seed}
    base, played = config.env, {}
    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise UserError(f"--out: there is no folder {args.out.parent}")
    envs = {value: with_options(base, f"{option}={value}") for value in values}
    for env in envs.values():
        if not is_external(env):  # either refuses what there is not, before anything is played
            make(env, config.agent_id)
    with contextlib.redirect_stdout(sys.stderr):  # progress is no part of the result
        for value, env in envs.items():
            print(f"playing {env}…")
            spec, metrics = api.play_episodes(args.run, env=env, trust=args.trust, **how)
            metrics.pop(AGENT_RETURN, None)
            played[value] = (env, spec.num_agents, metrics)
    mode = "greedy" if greedy else "sampled"
    title = f"{config.algorithm} on {base}: {args.episodes} episodes, {mode} actions"
    _print_sweep(args, config, option, title, how, played)
    if args.out is not None:
        returns = np.stack([seed_means(metrics[RETURN]) for *_, metrics in played.values()])
        numbers = [float(value) for value in values]
        plot_sweep(args.out, numbers, returns, option=option, title=title)


def _print_sweep(
    args: Evaluate, config: Config, option: str, title: str, how: dict[str, Any], played: dict
) -> None:
    """Print a table of what was played, by value: task, agents and metrics; or JSON."""
    from rich.table import Table

    from mam.runs.folder import seeds_of
    from mam.runs.sinks import RETURN, mean_and_spread, to_json

    if args.json:
        facts = {"run": str(args.run), "algorithm": config.algorithm, "seeds": seeds_of(config)}
        results = [
            {"env": env, "agents": n, "metrics": {k: to_json(v) for k, v in metrics.items()}}
            for env, n, metrics in played.values()
        ]
        print(json.dumps(facts | how | {"sweep": option, "results": results}))
        return
    names = list(dict.fromkeys(name for *_, metrics in played.values() for name in metrics))
    table = Table(option, title=title)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for value, (*_, metrics) in played.items():
        table.add_row(
            value, *(mean_and_spread(metrics[n], n) if n in metrics else "–" for n in names)
        )
    display(table)
    print(f"± is the standard deviation over seeds; {RETURN} is averaged over agents")


def read_sweep(text: str, *, numbers: bool) -> tuple[str, list[str]]:
    """Read `agents=8,32,128`: an option and its values.

    Args:
        text: as it was given.
        numbers: whether values must be positive numbers, to be drawn against.

    Raises:
        UserError: for anything else.
    """
    option, _, rest = text.partition("=")
    values = rest.split(",")
    if not option.isidentifier() or not all(values) or len(set(values)) < len(values):
        raise UserError(f"--sweep is an option and its values, such as agents=8,32, got {text}")
    if numbers and not all(re.fullmatch(r"\d*\.?\d+", value) for value in values):
        raise UserError(f"--out draws returns against positive numbers, got --sweep {text}")
    return option, values


def _agent_table(returns: Any, spec: Any) -> Any:
    """Tabulate each agent's return, [seeds, episodes, N], over all seeds' episodes."""
    from rich.table import Table

    names = spec.agent_names or range(spec.num_agents)
    left = spec.num_agents - _MOST_AGENTS
    table = Table("agent", caption=f"and {left} more agents, all in --json" if left > 0 else None)
    table.add_column("return", justify="right")
    agents = zip(names, returns.mean((0, 1)), returns.std((0, 1)), strict=True)
    for name, mean, deviation in list(agents)[:_MOST_AGENTS]:
        table.add_row(str(name), f"{mean:.3f} ± {deviation:.3f}")
    return table
