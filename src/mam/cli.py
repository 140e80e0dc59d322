"""The command: `mam train | evaluate | play | list`."""

import contextlib
import dataclasses
import inspect
import io
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import tyro

from mam.config import Config
from mam.errors import UserError, unknown_name
from mam.presets import PRESETS, preset, preset_for


@dataclass(frozen=True)
class Train:
    """Train a policy on a task.

    Starts from the preset of the task (see `mam list`); every setting below overrides it.
    Ctrl-C saves the run; `--resume` goes on with it.
    """

    preset: str | None = None
    """Settings to start from, in place of the task's own preset."""
    out: Path | None = None
    """Folder of the run; runs/<task>/<policy>/<time> if None."""
    resume: Path | None = None
    """Folder of a run to go on with; only --total-timesteps may be given besides."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class Evaluate:
    """Play fresh episodes with the best weights of a run and report the returns."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    episodes: int = 320
    """Episodes per seed."""
    greedy: bool = False
    """Take the most likely actions instead of sampling them."""
    seed: int = 0
    """Decides the episodes."""


@dataclass(frozen=True)
class Play:
    """Write a GIF of one episode played by the best weights of a run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path | None = None
    """The GIF; RUN/episode.gif if None."""
    seed: int = 0
    """Decides the episode."""
    policy_seed: int | None = None
    """Which of the run's seeds plays; the one with the best evaluation if None."""
    greedy: bool = False
    """Take the most likely actions instead of sampling them."""


@dataclass(frozen=True)
class List:
    """List policies, tasks and presets."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 2 for a mistake in what was asked for."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if not args or args[0] in ("-h", "--help"):
            _print_overview()
            return 0
        if args[0] == "--version":
            print(f"mam {metadata.version('mam')}")
            return 0
        if args[0] not in COMMANDS:
            raise unknown_name("command", args[0], COMMANDS, see="mam --help")
        kind, command = COMMANDS[args[0]]
        default = _train_default(args[1:]) if kind is Train else None
        command(_parse(args[0], kind, args[1:], default))
    except UserError as error:
        print(f"mam: {error}", file=sys.stderr)
        return 2
    return 0


def _print_overview() -> None:
    print("usage: mam COMMAND [OPTIONS]\n\nMulti-Agent Mamba: cooperative agents as a sequence.\n")
    for name, (kind, _) in COMMANDS.items():
        print(f"  {name:<10}{(kind.__doc__ or '').splitlines()[0]}")
    print("\n`mam COMMAND --help` explains its options; `mam --version` says which version this is.")


def _train(args: Train) -> None:
    from mam import run as runs
    from mam import runtime

    runtime.configure()
    config = args.config
    if args.resume:
        if args.out or args.preset:
            raise UserError("--resume goes on in the run's own folder with its own settings: drop --out and --preset")
        folder, trainer = runs.resume(args.resume, config)
    else:
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        folder, trainer = runs.start(config, args.out or Path("runs") / config.env / config.policy / stamp)
    print(_plan(config, trainer, folder.path))
    finished = runs.run(config, folder, trainer)
    _print_results(config, folder)
    if not finished:
        print(f"saved; go on with: mam train --resume {folder.path}")


def _plan(config: Config, trainer: Any, path: Path) -> str:
    """One line: what is about to happen, and where its results go."""
    import jax
    import jax.numpy as jnp

    policy = jax.eval_shape(trainer.init, jnp.zeros(1, jnp.int32)).policy
    parameters = sum(leaf.size for leaf in jax.tree.leaves(policy))
    device = jax.devices()[0]
    seeds = f"{config.num_seeds} seeds × " if config.num_seeds > 1 else ""
    return (
        f"{config.policy} on {config.env} · {trainer.spec.num_agents} agents · {parameters:,} parameters · "
        f"{device.platform} ({device.device_kind}) · {seeds}{config.total_timesteps:,} steps "
        f"in {config.num_updates} updates · results in {path}"
    )


def _print_results(config: Config, folder: Any) -> None:
    from rich.console import Console

    from mam.report import summary_table
    from mam.run import seeds_of

    title = f"{config.policy} on {config.env}"
    Console(highlight=False).print(summary_table(folder.records(), seeds=seeds_of(config), title=title))
    names = ("metrics.jsonl", "learning_curve.png", "marl_eval.json", "tensorboard", "checkpoint")
    print(f"in {folder.path}: {', '.join(name for name in names if (folder.path / name).exists())}")


def _evaluate(args: Evaluate) -> None:
    import jax
    from rich.console import Console
    from rich.table import Table

    from mam import runtime
    from mam.evaluate import evaluate
    from mam.logging import RETURN, mean_and_spread

    runtime.configure()
    if args.episodes < 1:
        raise UserError(f"--episodes must be positive, got {args.episodes}")
    config, trainer, state, seeds = _load(args.run)
    keys = jax.random.split(jax.random.key(args.seed), len(seeds))

    def play(policy, key):
        return evaluate(trainer.env, policy, key, args.episodes, greedy=args.greedy)

    metrics = jax.device_get(jax.jit(jax.vmap(play))(state.best_policy, keys))
    mode = "greedy" if args.greedy else "sampled"
    table = Table(title=f"{config.policy} on {config.env}: {args.episodes} episodes, {mode} actions")
    for name in ("seed", *metrics):
        table.add_column(name, justify="right")
    for index, seed in enumerate(seeds):
        table.add_row(
            str(seed), *(f"{value[index].mean():.3f} ± {value[index].std():.3f}" for value in metrics.values())
        )
    if len(seeds) > 1:
        table.add_section()
        table.add_row("mean ± std", *(mean_and_spread(value) for value in metrics.values()))
    Console(highlight=False).print(table)
    print(f"± is the standard deviation over episodes; {RETURN} is the team's, averaged over agents")


def _play(args: Play) -> None:
    import jax
    import numpy as np

    from mam import runtime
    from mam.play import play

    runtime.configure()
    _, trainer, state, seeds = _load(args.run)
    if args.policy_seed is None:
        index = int(np.argmax(state.best_return))
    elif args.policy_seed in seeds:
        index = seeds.index(args.policy_seed)
    else:
        raise UserError(f"--policy-seed must be one of the run's seeds {seeds[0]}…{seeds[-1]}, got {args.policy_seed}")
    path = args.out or args.run / "episode.gif"
    print(f"playing seed {seeds[index]} into {path}…")
    policy = jax.tree.map(lambda x: x[index], state.best_policy)
    try:
        episode_return = play(trainer.env, policy, args.seed, path, greedy=args.greedy)
    except NotImplementedError as error:
        raise UserError(str(error)) from error
    print(f"return {episode_return:.3f}")


def _load(path: Path) -> tuple[Config, Any, Any, list[int]]:
    """Everything of a run that playing needs."""
    from mam.run import RunFolder, seeds_of
    from mam.train import make_train

    folder = RunFolder(path)
    config = folder.load_config()
    trainer = make_train(config)
    return config, trainer, folder.load_state(config, trainer), seeds_of(config)


def _list(args: List) -> None:
    from mam.envs.registry import suites, task_names
    from mam.networks.policy import POLICIES

    print("policies (--policy)")
    for name, mixer in POLICIES.items():
        print(f"  {name:<6}{mixer} in every block")
    print("\ntasks (--env)")
    for suite in suites():
        print(f"  {suite}/")
        print(*(f"    {name}" for name in task_names() if name.startswith(f"{suite}/")), sep="\n")
    print("\npresets (--preset; chosen by the task unless given)")
    for name, make in PRESETS.items():
        print(f"  {name:<24}{(make.__doc__ or '').splitlines()[0]}")


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "train": (Train, _train),
    "evaluate": (Evaluate, _evaluate),
    "play": (Play, _play),
    "list": (List, _list),
}


# Reading the command line ------------------------------------------------------------------------------------------


def _train_default(args: Sequence[str]) -> Train:
    """The settings to start from: those of the run to resume, of the preset asked for, or of the task's preset."""
    resume, name, env = (_value_of(args, flag) for flag in ("--resume", "--preset", "--env"))
    if resume:
        from mam.run import RunFolder

        return Train(config=RunFolder(Path(resume)).load_config())
    if name:
        return Train(config=preset(name))
    return Train(config=preset_for(env or Config.env)[0])


def _value_of(args: Sequence[str], flag: str) -> str | None:
    """The last value given to a flag, written `--flag value` or `--flag=value`."""
    found = None
    for index, arg in enumerate(args):
        if arg == flag and index + 1 < len(args):
            found = args[index + 1]
        elif arg.startswith(flag + "="):
            found = arg.partition("=")[2]
    return found


def _parse(command: str, kind: type, args: Sequence[str], default: Any) -> Any:
    """Lets tyro read the arguments; every mistake becomes one line."""
    _check_flags(kind, args, see=f"mam {command} --help")
    extra = {} if default is None else {"default": default}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, prog=f"mam {command}", description=inspect.getdoc(kind), args=args, **extra)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        text = re.sub(r"([\s\u2500-\u257f]|-{3,})+", " ", errors.getvalue()).strip()
        if text.startswith("Required options"):
            text = f"{command} needs the folder of a run: mam {command} RUN"
        raise UserError(text) from None


def _check_flags(kind: type, args: Sequence[str], *, see: str) -> None:
    """Refuses unknown flags with the nearest known ones, and values that do not have the flag's type."""
    flags = _flags(kind)
    for index, arg in enumerate(args):
        if not re.match(r"--?[a-zA-Z]", arg) or arg in ("-h", "--help"):
            continue
        name, equals, value = arg.partition("=")
        key = name.replace("_", "-")
        if key not in flags:
            raise unknown_name("option", name, flags, see=see)
        expected = flags[key]
        if expected is bool:
            continue
        if not equals:
            if index + 1 == len(args) or args[index + 1].startswith("--"):
                raise UserError(f"{name} needs a value (see `{see}`)")
            value = args[index + 1]
        _check_value(name, value, expected)


def _check_value(name: str, value: str, expected: Any) -> None:
    union = isinstance(expected, types.UnionType) or typing.get_origin(expected) is typing.Union
    options: tuple[Any, ...] = typing.get_args(expected) if union else (expected,)
    if str in options or Path in options or (type(None) in options and value == "None"):
        return
    for option in options:
        with contextlib.suppress(ValueError, TypeError):
            option(value)
            return
    names = {int: "a whole number", float: "a number", type(None): "None"}
    raise UserError(f"{name} takes {' or '.join(names[option] for option in options)}, got '{value}'")


def _flags(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Every `--flag` of a dataclass, nested ones included, with the type of its value."""
    flags: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        expected, name = hints[item.name], item.name.replace("_", "-")
        if dataclasses.is_dataclass(expected):
            # A configuration's fields stand on their own; its groups put their name in front.
            flags |= _flags(expected, prefix if expected is Config else f"{prefix}{name}.")
        else:
            flags[f"--{prefix}{name}"] = expected
            if expected is bool:
                head, _, last = f"{prefix}{name}".rpartition(".")
                flags[f"--{head}.no-{last}" if head else f"--no-{last}"] = bool
    return flags


if __name__ == "__main__":
    sys.exit(main())
