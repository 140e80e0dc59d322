"""The command: `mam train | plan | evaluate | show | play | experiment | sweep | report | dashboard | list | …`."""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from mam.cli.arguments import parse, value_of
from mam.cli.output import discard, display, lasting, make_printable
from mam.config import Config
from mam.envs.external.factories import names_code
from mam.envs.tasks import check_task
from mam.errors import DISTRIBUTION, RunError, UserError, installed_version, printable, shown, unknown_name
from mam.presets import PRESETS, origin, preset, preset_for
from mam.runs.files import read_config, writing
from mam.runs.process import Hosts
from mam.study.bench.command import Bench
from mam.study.dashboard.command import Dashboard, serve
from mam.study.experiment.command import Experiment, run_experiment
from mam.study.sweep.command import Sweep, run_sweep


@dataclass(frozen=True)
class Train:
    """Train a policy on a task.

    Starts from the preset of the task (see `mam list`); every setting below overrides it.
    Ctrl-C saves the run; `--resume` goes on with it, to the same numbers. Exit codes: 0 finished, or stopped by Ctrl-C,
    SIGTERM or SIGHUP; 75 stopped by SIGUSR1 or SIGUSR2, to be queued again; 1 failed, with what was saved intact; 2
    wrongly asked for; 130 interrupted at once.
    """

    preset: str | None = None
    """Settings to start from, in place of the task's own preset."""
    start: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """Settings to start from: the folder of a run, or a JSON file such as its config.json or a sweep's best.json."""
    out: Path | None = None
    """Folder of the run; runs/<task>/<policy>/<time> if None."""
    resume: Path | None = None
    """Folder of a run to go on with. --total-timesteps, --checkpoint and --num-devices may be given besides."""
    trust: bool = False
    """Import the environment that the resumed folder names, where that is code of yours, without naming it here."""
    hosts: Hosts = field(default_factory=Hosts)
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class PlanRun:
    """Say what memory a run would need, and what to change if that is too much.

    Takes the settings of `mam train`, compiles its train step, and runs nothing.
    """

    preset: str | None = None
    """Settings to start from, in place of the task's own preset."""
    start: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """Settings to start from: the folder of a run, or a JSON file such as its config.json."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


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


@dataclass(frozen=True)
class Show:
    """Print what a run was run with and what came of it: command, settings, provenance, scores."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""


@dataclass(frozen=True)
class Play:
    """Write a GIF of one episode played by the best weights of a run, and what every agent decided, as JSON."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    env: str | None = None
    """Task to play in place of the run's own."""
    out: Path | None = None
    """The GIF; RUN/episode.gif if None. What was decided goes to the same name with .json."""
    seed: int = 0
    """Decides the episode."""
    policy_seed: int | None = None
    """Which of the run's seeds plays; the one with the best evaluation if None."""
    greedy: bool = False
    """Take the most likely actions instead of sampling them."""
    trust: bool = False
    """Import the environment that the folder names, where that is code, without naming it as --env."""


@dataclass(frozen=True)
class List:
    """List policies, tasks and presets."""

    envs: bool = False
    """A table of all tasks with their agents, observations, actions and limits; loads every suite, in a minute."""


@dataclass(frozen=True)
class Report:
    """Compare runs: curves, statistics with intervals and tables, as a page that needs nothing else.

    Writes report.html, report.md, tables.tex, figures/*.png and data/*.csv.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or folders that contain them."""
    out: Path = Path("report")
    """Folder of the report, which is written over."""
    by: tuple[str, ...] = ()
    """Settings, such as ppo.lr, that make algorithms of their own out of runs of one."""


@dataclass(frozen=True)
class CheckEnv:
    """Play an environment for half a minute and say what is wrong with it."""

    env: tyro.conf.Positional[str]
    """Task as suite/task, pettingzoo/module:env, or your own as package.module:factory."""
    seed: int = 0
    """Decides the episodes."""
    seconds: float = 25.0
    """How long to play it; more for a slow simulator."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 if `check-env` found errors, 2 for a mistake in what was asked.

    141 if whatever read the output went away; what takes long goes on without.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    make_printable()
    try:
        with lasting() if args[:1] and args[0] in _LASTING else contextlib.nullcontext():
            code = _run(args)
            sys.stdout.flush()
    except UserError as error:
        print(f"mam: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # who reads this has seen enough: `mam list | head`
        discard(sys.stdout)
        return 141  # 128 + SIGPIPE, which not every system has
    except OSError as error:
        discard(sys.stdout)
        print(f"mam: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        return RunError.exit_code
    return code


def _run(args: list[str]) -> int:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where package.module:factory is looked for
    if not args or args[0] in ("-h", "--help"):
        _print_overview()
        return 0
    if args[0] == "--version":
        from mam.kernels.native import library as native

        print(f"mam {installed_version(DISTRIBUTION) or '(not installed)'}, {native.description()}")
        return 0
    if args[0] not in COMMANDS:
        raise unknown_name("command", args[0], COMMANDS, see="mam --help")
    kind, command = COMMANDS[args[0]]
    default = _default(kind, args[1:]) if kind in (Train, PlanRun, Sweep) else None
    options = parse(args[0], kind, args[1:], default)
    if isinstance(options, Train):
        _agreed(options.config.env, typed=value_of(args, "--env"), trust=options.trust)
    for asked in (options, getattr(options, "config", None)):
        if env := getattr(asked, "env", None):
            check_task(env)  # at once: what commands import takes seconds
    return command(options) or 0


def _agreed(env: str, *, typed: str | None, trust: bool) -> None:
    """Refuse a task that is code if a folder named it, which may be a stranger's, and not the user.

    Raises:
        UserError: with the name, and what would agree to it.
    """
    if names_code(env) and env != typed and not trust:
        raise UserError(
            f"the folder names the environment {shown(env)}, which is code to import and run: "
            f"if you trust it, add --env {shlex.quote(printable(env))} or --trust"
        )


def _default(kind: type, args: Sequence[str]) -> Any:
    """The settings to start from: those of a run or a file, of the preset asked for, or of the task's preset."""
    starts = {flag: value for flag in ("--resume", "--config", "--preset") if (value := value_of(args, flag))}
    if len(starts) > 1:
        raise UserError(f"settings start from one place: {' and '.join(starts)} name several")
    match next(iter(starts.items()), ("", "")):
        case "--resume", run:
            return kind(config=read_config(Path(run) / "config.json"))
        case "--config", path:
            return kind(config=read_config(Path(path) / "config.json" if Path(path).is_dir() else Path(path)))
        case "--preset", name:
            return kind(config=preset(name))
    return kind(config=preset_for(value_of(args, "--env") or Config.env)[0])


def _print_overview() -> None:
    print("usage: mam COMMAND [OPTIONS]\n\nMulti-Agent Mamba: cooperative agents as a sequence.\n")
    for name, (kind, _) in COMMANDS.items():
        print(f"  {name:<12}{(kind.__doc__ or '').splitlines()[0]}")
    print("\n`mam COMMAND --help` explains its options; `mam --version` says which version this is.")


def _train(args: Train) -> int:
    import jax

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
    elif jax.process_count() > 1 and args.out is None:
        raise UserError("several processes write one run: give them the same --out")
    else:
        folder, trainer = runs.start(config, args.out)
    print(_headline(config, trainer, folder.path))
    if not (args.resume or args.start):
        ids = {"sinusoid": "ids for any number of agents", "none": "no agent ids"}
        bound = f"one-hot ids, which bind the policy to {trainer.spec.num_agents} agents"
        print(f"{origin(args.preset or preset_for(config.env)[1])}; {ids.get(config.agent_id, bound)}")
    print(_price(config, trainer.spec.time_limit))
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
    """One line: what is about to happen, and where its results go."""
    import jax
    import numpy as np

    from mam.learning.normalise import as_normalised

    policy = as_normalised(trainer.shapes(np.zeros(1, np.int32)).policy)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(policy.network))
    device, count = jax.devices()[0], trainer.devices.num_devices
    devices = f"{count} × {device.platform}" if count > 1 else device.platform
    seeds = f"{config.num_seeds} seeds × " if config.num_seeds > 1 else ""
    steps = config.num_updates * config.steps_per_update
    rounded = "" if steps == config.total_timesteps else f" (asked for: {config.total_timesteps:,})"
    return (
        f"{config.algorithm} on {config.env} · {trainer.spec.num_agents} agents · {parameters:,} parameters · "
        f"{devices} ({device.device_kind}) · {seeds}{steps:,} steps{rounded} "
        f"in {config.num_updates} updates of {config.steps_per_update:,} · results in {path}"
    )


def _price(config: Config, time_limit: int | None) -> str:
    """One line: what evaluations cost beside training, where every episode takes as long as it may."""
    episodes = config.num_evaluation_episodes
    modes = " in both modes" if config.eval.both_modes else ""
    line = f"evaluations: 1 + {config.num_evaluations} and the absolute metric, {episodes:,} episodes per seed{modes}"
    if not time_limit:
        return line
    steps, trained = episodes * time_limit, config.num_updates * config.steps_per_update
    return f"{line}, up to {steps:,} steps: {steps / trained:.0%} of those in training"


def _plan(args: PlanRun) -> None:
    from rich.table import Table

    from mam.runs import process as runtime
    from mam.runs.footprint import ROOM, device_memory, gigabytes, plan

    runtime.configure(keep_programs=False)  # how long compiling takes is one of the results
    room = device_memory()
    table = Table("settings", "state", "temporary", "in all", "compile s")
    fitting = None
    for found in plan(args.config):
        need = found.footprint
        sizes = (gigabytes(size) for size in (need.state, need.temporary, need.total))
        table.add_row(found.changes, *sizes, f"{found.compile_seconds:.1f}")
        if fitting is None and need.total <= ROOM * room:
            fitting = found
    display(table)
    print(f"the device has {gigabytes(room)}, of which a train step should need no more than {ROOM:.0%}")
    if fitting is None:
        raise UserError(
            "nothing tried fits: take fewer --ppo.num-envs or --num-seeds, or a shorter --ppo.rollout-length"
        )
    print("fits as asked for" if fitting.changes == "as asked for" else f"fits with {fitting.changes}")


def _print_results(config: Config, folder: Any) -> None:
    from mam.runs.loop import seeds_of
    from mam.runs.summary import deployment, summary_table
    from mam.runs.times import read_times, shares

    title = f"{config.algorithm} on {config.env}"
    records = folder.records()
    display(summary_table(records, seeds=seeds_of(config), title=title))
    if line := deployment(records, greedy=config.eval.greedy):
        print(line)
    if line := shares(read_times(folder.times)):
        print(f"time: {line}")
    names = ("metrics.jsonl", "learning_curve.png", "marl_eval.json", "tensorboard", "checkpoint")
    print(f"in {folder.path}: {', '.join(name for name in names if (folder.path / name).exists())}")


def _evaluate(args: Evaluate) -> None:
    import jax
    from rich.table import Table

    from mam.learning.evaluate import AGENT_RETURN, UNFINISHED
    from mam.runs import process as runtime
    from mam.runs.sinks import RETURN, mean_and_spread, to_json

    runtime.configure()
    if args.episodes < 1:
        raise UserError(f"--episodes must be positive, got {args.episodes}")
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():  # notes are no JSON
        config, trainer, policies, _, seeds = _load(args.run, args.env, trust=args.trust, greedy=args.greedy)
        keys = jax.random.split(jax.random.key(args.seed), len(seeds))
        try:
            metrics = jax.device_get(trainer.evaluate(policies, keys, args.episodes, args.greedy))
        finally:
            trainer.close()
    metrics = {name: value for name, value in metrics.items() if name != UNFINISHED or value.any()}
    if args.json:
        facts = {"run": str(args.run), "env": config.env, "algorithm": config.algorithm, "seeds": seeds}
        asked = {"greedy": args.greedy, "seed": args.seed}
        if AGENT_RETURN in metrics:
            asked |= {"agents": trainer.spec.agent_names}
        print(json.dumps(facts | asked | {"metrics": {name: to_json(value) for name, value in metrics.items()}}))
        return
    of_agents, mode = metrics.pop(AGENT_RETURN, None), "greedy" if args.greedy else "sampled"
    table = Table(title=f"{config.algorithm} on {config.env}: {args.episodes} episodes, {mode} actions")
    for name in ("seed", *metrics):
        table.add_column(name, justify="right", overflow="fold")
    for index, seed in enumerate(seeds):
        table.add_row(
            str(seed), *(f"{value[index].mean():.3f} ± {value[index].std():.3f}" for value in metrics.values())
        )
    if len(seeds) > 1:
        table.add_section()
        table.add_row("mean ± std", *(mean_and_spread(value) for value in metrics.values()))
    display(table)
    if of_agents is not None:
        display(_agent_table(of_agents, trainer.spec))
    print(f"± is the standard deviation over episodes; {RETURN} is the team's, averaged over agents")


def _agent_table(returns: Any, spec: Any) -> Any:
    """Each agent's return, [seeds, episodes, N], over all seeds' episodes."""
    from rich.table import Table

    names = spec.agent_names or range(spec.num_agents)
    left = spec.num_agents - _MOST_AGENTS
    table = Table("agent", caption=f"and {left} more agents, all in --json" if left > 0 else None)
    table.add_column("return", justify="right")
    agents = zip(names, returns.mean((0, 1)), returns.std((0, 1)), strict=True)
    for name, mean, deviation in list(agents)[:_MOST_AGENTS]:
        table.add_row(str(name), f"{mean:.3f} ± {deviation:.3f}")
    return table


def _show(args: Show) -> None:
    from mam.cli.show import show

    show(args.run)


def _play(args: Play) -> None:
    import jax
    import numpy as np

    from mam.runs import process as runtime
    from mam.runs.play import play, play_on_host, trace_path
    from mam.types import HostEnvironments

    runtime.configure()
    path = args.out or args.run / "episode.gif"
    if path.suffix.lower() != ".gif":
        raise UserError(f"--out is a GIF, such as {path.with_suffix('.gif')}: got {path}")
    config, trainer, policies, best_return, seeds = _load(args.run, args.env, trust=args.trust, greedy=args.greedy)
    if args.policy_seed is None:
        index = int(np.argmax(best_return))
    elif args.policy_seed in seeds:
        index = seeds.index(args.policy_seed)
    else:
        raise UserError(f"--policy-seed must be one of the run's seeds {seeds[0]}…{seeds[-1]}, got {args.policy_seed}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {path.parent} cannot be made: {error.strerror}") from None
    print(f"playing seed {seeds[index]} into {path}…")
    policy = jax.tree.map(lambda x: x[index], policies)
    how: dict[str, Any] = {"greedy": args.greedy, "algorithm": config.algorithm, "policy_seed": seeds[index]}
    how |= {"max_steps": config.eval.max_episode_steps}
    try:
        if isinstance(trainer.env, HostEnvironments):
            trainer.close()
            episode = play_on_host(config.env, config.agent_id, policy, args.seed, path, **how)
        else:
            episode = play(trainer.env, policy, args.seed, path, **how)
    finally:
        trainer.close()
    if episode.undrawn:
        print(f"{episode.undrawn}: no picture, only {trace_path(path)}")
    print(f"return {episode.episode_return:.3f}")


def _load(path: Path, env: str | None, *, trust: bool, greedy: bool) -> tuple[Config, Any, Any, Any, list[int]]:
    """What playing needs of a run: configuration, trainer, policies that played best so and their returns, seeds."""
    from mam.learning.normalise import transfer_policy
    from mam.learning.train import make_train
    from mam.runs.loop import RunFolder, seeds_of

    folder = RunFolder(path)
    config = folder.load_config()
    _agreed(config.env, typed=env, trust=trust)
    trainer = make_train(config)
    state = folder.load_state(config, trainer)
    best = state.best(beside=greedy != config.eval.greedy)
    policies = best.policy
    if env is not None and env != config.env:
        trainer.close()
        config, spec = replace(config, env=env), trainer.spec
        trainer = make_train(config)
        policies = transfer_policy(policies, config.policy, spec, trainer.spec, config.network)
    return config, trainer, policies, best.mean_return, seeds_of(config)


def _list(args: List) -> None:
    from mam.envs.registry import auto_options
    from mam.envs.tasks import SUITES
    from mam.networks.memory import MEMORIES
    from mam.networks.policy import policies

    if args.envs:
        _print_specs()
        return
    print("policies (--policy)")
    for name, kind in policies().items():
        print(f"  {name:<11}{kind.description}")
    print("\nmemory of any policy (--network.memory)")
    for name, kind in MEMORIES.items():
        print(f"  {name:<11}{kind.description}")
    print("\ntasks (--env; `mam list --envs` shows their sizes)")
    options = auto_options()
    for name, suite in SUITES.items():
        print(f"  {name + '/':<13}{suite.description}{f' (extra {suite.extra})' if suite.extra else ''}")
        print(*(f"    {name}/{task}" for task in suite.tasks), sep="\n")
        if defaults := options.get(f"{name}/auto"):
            print(f"    {name}/auto:{','.join(f'{key}={_shown(value)}' for key, value in defaults.items())}")
    print("  any PettingZoo environment        pettingzoo/mpe2:simple_spread_v3")
    print("  your own                          package.module:factory")
    print("\npresets (--preset; chosen by the task unless given)")
    for name, make in PRESETS.items():
        print(f"  {name:<24}{(make.__doc__ or '').splitlines()[0]}")


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _print_specs() -> None:
    """Every task with its sizes; a suite that is not installed with how to get it."""
    from rich.table import Column, Table

    from mam.envs.registry import auto_options, make
    from mam.envs.tasks import task_names

    names = ("task", "agents", "observation", "state", "actions", "limit")
    table = Table(*(Column(name, no_wrap=True) for name in names), box=None, padding=(0, 2, 0, 0))
    missing = {}
    for name in (*task_names(), *auto_options()):
        suite = name.partition("/")[0]
        try:
            spec = None if suite in missing else make(name, "none").spec
        except UserError as error:
            missing[suite] = str(error)
            spec = None
        if spec is None:
            table.add_row(name, *["-"] * 5)
            continue
        picture = "" if spec.grid_shape is None else "×".join(map(str, spec.grid_shape))
        observation = " + ".join(part for part in (str(spec.obs_dim) if spec.obs_dim else "", picture) if part)
        actions = f"{spec.num_actions} real" if spec.continuous else str(spec.num_actions)
        if spec.action_components is not None:
            actions = " + ".join(map(str, spec.action_components))
        sizes = (spec.num_agents, observation, spec.state_dim or "-", actions, spec.time_limit or "-")
        table.add_row(name, *map(str, sizes))
    display(table)
    print("observation: features of one agent, without its id, and the image it sees (rows × columns × channels)")
    print("actions: how many there are to choose from, in each component where there are several, or real numbers")
    for suite, message in missing.items():
        print(f"{suite}: {message}")


def _report(args: Report) -> None:
    from mam.study.report.checks import load
    from mam.study.report.page import write_report

    results, warnings = load(args.runs, args.by)
    with writing(args.out):
        write_report(args.out, results, warnings)
    for warning in warnings:
        print(f"warning: {printable(warning)}")
    print(f"in {args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")


def _check_env(args: CheckEnv) -> int:
    from mam.envs.check.check import check_environment
    from mam.envs.check.parallel import check_parallel
    from mam.envs.external.factories import find_factory
    from mam.envs.registry import lives_on_host, make_plain
    from mam.runs import process as runtime

    runtime.configure()
    if lives_on_host(args.env):
        report = check_parallel(args.env, find_factory(args.env), seed=args.seed, time_budget=args.seconds)
    else:
        report = check_environment(make_plain(args.env), seed=args.seed, time_budget=args.seconds)
    print(*report.lines(), sep="\n")
    return 0 if report.passed else 1


def _bench(args: Bench) -> None:
    from mam.runs import process as runtime
    from mam.study.bench.command import run_bench

    runtime.configure(keep_programs=False)  # how long compiling takes is one of the results
    run_bench(args)


COMMANDS: dict[str, tuple[type, Callable[[Any], int | None]]] = {
    "train": (Train, _train),
    "plan": (PlanRun, _plan),
    "evaluate": (Evaluate, _evaluate),
    "show": (Show, _show),
    "play": (Play, _play),
    "list": (List, _list),
    "experiment": (Experiment, run_experiment),
    "sweep": (Sweep, run_sweep),
    "report": (Report, _report),
    "dashboard": (Dashboard, serve),
    "check-env": (CheckEnv, _check_env),
    "bench": (Bench, _bench),
}
_MOST_AGENTS = 64  # rows of a table
_LASTING = ("train", "experiment", "sweep", "dashboard")  # nobody has to watch these to their end


if __name__ == "__main__":
    sys.exit(main())
