"""Learning curves on the probes that take memory or mixing, beside what can be earned without.

    python benchmarks/memory_probes.py --tasks tmaze-10 tmaze-50 --policies mam rec_mam sable
    python benchmarks/memory_probes.py --tasks recall-8 recall-16 --policies mam mat mam:MA mam2:2A
    python benchmarks/memory_probes.py --tasks convention --policies mam+gru --set ppo.lr=0.001

A policy is `name[:encoder layout][+memory]`. A cell is a policy on a task, all seeds side by side,
and a run in OUT/probe/<task>/<algorithm>: the same command goes on after a kill, skips what is
finished, and draws it anew. A seed solves a task by 95 % of the best return, with its best weights
in fresh episodes. OUT/cells.json has every number, OUT/curves.png the curves, of all cells so far.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

import mam
from mam.config import Config
from mam.envs.memory_probes import Convention
from mam.envs.probe_base import Probe
from mam.envs.probes import PROBES
from mam.errors import UserError
from mam.presets import preset_for
from mam.runs.files import read_config
from mam.runs.process import configure
from mam.runs.sinks import Record, read_records, training_speed, write_atomically
from mam.runs.summary import absolute_returns, evaluation_returns
from mam.study.experiment.grid import changed
from mam.study.report.figures import styles_of

SOLVED = 0.95


@dataclass(frozen=True)
class Args:
    """What to try."""

    tasks: tuple[str, ...] = ("tmaze-10", "tmaze-50", "tmaze-100", "convention", "recall-8")
    policies: tuple[str, ...] = ("mam", "rec_mam", "rec_mat", "sable", "rec_mappo")
    seeds: int = 5
    first_seed: int = 0
    steps: int = 500_000
    """Environment steps per seed."""
    set: tuple[str, ...] = ()
    """Further settings of all runs, such as ppo.lr=0.001."""
    out: Path = Path("runs/memory_probes")


def config_for(task: str, policy: str, args: Args) -> Config:
    """Return the settings of a cell, which start from the task's preset."""
    policy, _, memory = policy.partition("+")
    policy, _, layout = policy.partition(":")
    chosen: dict[str, Any] = {
        "policy": policy,
        "network.memory": memory or None,
        "network.encoder.layout": layout or None,
        "seed": args.first_seed,
        "num_seeds": args.seeds,
        "total_timesteps": args.steps,
    }
    for setting in args.set:
        key, _, value = setting.partition("=")
        try:
            chosen[key] = json.loads(value)
        except ValueError:
            chosen[key] = value
    return changed(preset_for(f"probe/{task}")[0], chosen)


def train(config: Config, folder: Path) -> list[Record]:
    """Return the records of a cell's run, which is begun, gone on with, or finished already."""
    started = (folder / "config.json").exists()
    records = read_records(folder / "metrics.jsonl") if started else []
    if absolute_returns(records) is None or read_config(folder / "config.json") != config:
        place = {"resume" if started else "out": folder}
        records = mam.train(config, **place, signals=True).records
    return records


def cell_of(task: str, policy: str, records: list[Record]) -> dict[str, Any] | None:
    """Return the numbers of a finished cell; None if its run was stopped."""
    absolute, greedy = (
        absolute_returns(records, f"{mode}episode_return") for mode in ("", "greedy_")
    )
    if absolute is None:
        return None
    probe = PROBES[task]()
    steps, returns = evaluation_returns(records)
    cell = {
        "task": task,
        "policy": policy,
        **bounds(probe),
        "steps": steps.tolist(),
        "returns": returns.T.tolist(),
        "absolute": absolute.tolist(),
        "greedy": None if greedy is None else greedy.tolist(),
        "steps_per_second": training_speed(records),
    }
    if isinstance(probe, Convention):
        rounds = [absolute_returns(records, f"round_{r + 1}") for r in range(probe.num_rounds)]
        cell["rounds"] = np.transpose(rounds).tolist()
    return cell


def bounds(probe: Probe) -> dict[str, float]:
    """Return what can be earned, by name."""
    names = ("optimal_return", "memoryless_return", "random_return")
    return {name: getattr(probe, name) for name in names if hasattr(probe, name)}


def row(cell: dict[str, Any]) -> str:
    """Return a line of the table."""
    best, without = cell["optimal_return"], cell.get("memoryless_return", cell["random_return"])
    absolute = np.array(cell["absolute"])
    solved = (absolute >= SOLVED * best).sum()
    greedy = "-" if cell["greedy"] is None else f"{np.mean(cell['greedy']):.3f}"
    return (
        f"{cell['task']:11} {cell['policy']:14} {without:7.3f} {best:7.3f}   "
        f"{absolute.mean():7.3f} {absolute.min():7.3f} {greedy:>7}   {solved}/{len(absolute)}"
        f"   {cell['steps_per_second']:8,.0f}"
    )


def round_table(cells: list[dict[str, Any]]) -> list[str]:
    """Return lines of what each round of the convention earned, beside the oracle."""
    probe = Convention()
    rounds = {"oracle": [probe.oracle_round_return(r + 1) for r in range(probe.num_rounds)]}
    rounds["memoryless"] = [probe.memoryless_return / probe.num_rounds] * probe.num_rounds
    found = {cell["policy"]: np.mean(cell["rounds"], axis=0) for cell in cells if "rounds" in cell}
    lines = [
        f"{name:14} {' '.join(f'{x:6.3f}' for x in earned)}"
        for name, earned in (rounds | found).items()
    ]
    return ["", "convention: mean reward of each round", *lines] if found else []


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """Draw the mean and range over seeds of the returns: a panel for each task."""
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    styles = styles_of({cell["policy"] for cell in cells})
    figure = Figure(figsize=(5 * len(tasks), 4), dpi=150, layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        mine = [cell for cell in cells if cell["task"] == task]
        for cell in mine:
            colour, dashes, _ = styles[cell["policy"]]
            returns = np.array(cell["returns"])
            axes.plot(
                cell["steps"], returns.mean(axis=0), dashes, color=colour, label=cell["policy"]
            )
            band = returns.min(axis=0), returns.max(axis=0)
            axes.fill_between(cell["steps"], *band, color=colour, alpha=0.15, linewidth=0)
        for name, value in bounds(PROBES[task]()).items():
            axes.axhline(value, color="grey", linewidth=0.8, linestyle=":")
            axes.annotate(name.removesuffix("_return"), (0, value), fontsize=7, color="grey")
        axes.set(title=f"probe/{task}", xlabel="environment steps (per seed)")
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("mean episode return")
    figure.savefig(path)


def main(args: Args) -> None:
    configure()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "cells.json"
    done = json.loads(path.read_text()) if path.exists() else []
    cells = {(cell["task"], cell["policy"]): cell for cell in done}
    for task, policy in itertools.product(args.tasks, args.policies):
        config = config_for(task, policy, args)
        try:
            records = train(config, args.out / config.env / config.algorithm)
        except UserError as error:
            raise SystemExit(str(error)) from None
        cell = cell_of(task, policy, records)
        if cell is None:
            raise SystemExit("stopped: the same command goes on")
        cells[task, policy] = cell
        write_atomically(path, json.dumps(list(cells.values()), indent=1))
        draw(list(cells.values()), args.out / "curves.png")
    print(
        f"{'task':11} {'policy':14} {'without':>7} {'best':>7}   "
        f"{'mean':>7} {'worst':>7} {'greedy':>7}   solved   steps/s"
    )
    print("\n".join([*map(row, cells.values()), *round_table(list(cells.values()))]))


if __name__ == "__main__":
    main(tyro.cli(Args))
