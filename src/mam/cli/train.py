"""`mam train`: a run from its settings to its results."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from mam.cli.output import display
from mam.config import Config
from mam.errors import UserError
from mam.presets import origin, preset_for
from mam.runs.process import Hosts

_FEW_EVALUATIONS = 20
_MANY_AGENTS = 64


@dataclass(frozen=True)
class Train:
    """Train a policy on a task.

    Starts from the preset of the task (see `mam list`); every setting below overrides it.
    Ctrl-C saves the run; `--resume` goes on with it, to the same numbers. Exit codes: 0 finished,
    or stopped by Ctrl-C, SIGTERM or SIGHUP; 75 stopped by SIGUSR1 or SIGUSR2, to be queued again; 1
    failed, with what was saved intact; 2 wrongly asked for; 130 interrupted at once.
    """

    preset: str | None = None
    """Settings to start from, in place of the task's own preset."""
    start: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """Settings to start from: the folder of a run or of an exported policy, zoo:NAME, or a JSON
    file such as a run's config.json or a sweep's best.json."""
    out: Path | None = None
    """Folder of the run; runs/<task>/<policy>/<time> if None."""
    resume: Path | None = None
    """Folder of a run to go on with. --total-timesteps, --checkpoint and --num-devices may be
    given besides."""
    trust: bool = False
    """Import the environment that the resumed folder names, where that is code of yours, without
    naming it here."""
    hosts: Hosts = field(default_factory=Hosts)
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def train(args: Train) -> int:
    """Train a new run, or go on with one; return the exit code."""
    import jax

    from mam.kernels.native.library import is_installed
    from mam.runs import loop as runs
    from mam.runs import process as runtime
    from mam.runs.loop import resume_options
    from mam.runs.signals import PREEMPTED

    runtime.configure(hosts=args.hosts)
    config = args.config
    if args.resume:
        if args.out:
            raise UserError("--resume goes on in the run's own folder: drop --out")
        folder, trainer = runs.resume(args.resume, config)
    else:
        folder, trainer = runs.start(config, args.out)
    print(_headline(config, trainer, folder.path))
    if not (args.resume or args.start):
        ids = {"sinusoid": "ids for any number of agents", "none": "no agent ids"}
        bound = f"one-hot ids, which bind the policy to {trainer.spec.num_agents} agents"
        print(
            f"{origin(args.preset or preset_for(config.env)[1])}; {ids.get(config.agent_id, bound)}"
        )
    print(price(config, trainer.spec.time_limit))
    if config.curriculum:
        print(curriculum_plan(config))
    if line := advice(config, trainer.spec.num_agents):
        print(f"note: {line}")
    if jax.default_backend() == "cpu" and not is_installed():
        print("note: native kernels make CPUs up to four times as fast: pip install ./native")
    for note in getattr(trainer.env, "notes", ()):
        print(f"note: {note}")
    outcome = runs.run(config, folder, trainer)
    if jax.process_index() > 0:
        return 0
    _print_results(config, folder)
    if outcome != "finished":
        print(f"saved; go on with: mam train {shlex.join(resume_options(config, folder.path))}")
    return PREEMPTED if outcome == "preempted" else 0


def _headline(config: Config, trainer: Any, path: Path) -> str:
    """Say in one line what is about to happen, and where its results go."""
    import jax
    import numpy as np

    from mam.kernels.native.library import description
    from mam.learning.normalise import as_normalised

    policy = as_normalised(trainer.shapes(np.zeros(1, np.int32)).policy)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(policy.network))
    device, count = jax.devices()[0], trainer.devices.num_devices
    kind = description() if device.platform == "cpu" else device.device_kind
    devices = f"{count} × {device.platform}" if count > 1 else device.platform
    seeds = f"{config.num_seeds} seeds × " if config.num_seeds > 1 else ""
    steps = config.num_updates * config.steps_per_update
    rounded = "" if steps == config.total_timesteps else f" (asked for: {config.total_timesteps:,})"
    return (
        f"{config.algorithm} on {config.env} · {trainer.spec.num_agents} agents · "
        f"{parameters:,} parameters · {devices}, {kind} · "
        f"{seeds}{steps:,} steps{rounded} "
        f"in {config.num_updates} updates of {config.steps_per_update:,} · results in {path}"
    )


def price(config: Config, time_limit: int | None) -> str:
    """Say in one line what evaluations cost beside training, with episodes as long as may be."""
    episodes = config.num_evaluation_episodes
    modes = " in both modes" if config.eval.both_modes else ""
    line = (
        f"evaluations: 1 + {config.num_evaluations} and the absolute metric, "
        f"{episodes:,} episodes per seed{modes}"
    )
    if not time_limit:
        return line
    steps, trained = episodes * time_limit, config.num_updates * config.steps_per_update
    line += f", up to {steps:,} steps: {steps / trained:.0%} of those in training"
    many = config.num_evaluations > _FEW_EVALUATIONS and 2 * steps > trained
    return f"{line}; --eval.num-evaluations asks for fewer" if many else line


def advice(config: Config, num_agents: int) -> str:
    """Return what to try for this task or a team so large, nothing if there is nothing to try."""
    from mam.networks.policy import critic_of

    network = config.network
    unasked = network.critic == "auto" and critic_of(config.policy, network) == "shared"
    if config.env.startswith("smax/") and unasked:
        return (
            "in battles sequence policies have learned faster where values do not share the "
            "encoder: --network.critic pooled"
        )
    if num_agents < _MANY_AGENTS or config.curriculum or "agents=" not in config.env:
        return ""
    return (
        f"where the task is the same to each of the {num_agents} agents, a team of few may teach "
        "more in the same time: --curriculum agents=8, and all play in evaluations"
    )


def curriculum_plan(config: Config) -> str:
    """Say in one line what is trained on, stage by stage, in whole updates."""
    ends = [first for first, _ in config.stages[1:]] + [config.num_updates]
    stages = [
        f"{options or config.env} to {end * config.steps_per_update:,} steps"
        for end, (_, options) in zip(ends, config.stages, strict=True)
    ]
    return f"trains on {', '.join(stages)}; evaluations play {config.env}"


def _print_results(config: Config, folder: Any) -> None:
    from mam.runs.folder import seeds_of
    from mam.runs.summary import deployment, summary_table
    from mam.runs.times import read_times, shares

    title = f"{config.algorithm} on {config.env}"
    records = folder.records()
    display(summary_table(records, seeds=seeds_of(config), title=title))
    if line := deployment(records, config):
        print(line)
    if line := shares(read_times(folder.times)):
        print(f"time: {line}")
    names = ("metrics.jsonl", "metrics.csv", "learning_curve.png", "marl_eval.json")
    names += ("tensorboard", "checkpoint")
    print(f"in {folder.path}: {', '.join(name for name in names if (folder.path / name).exists())}")
