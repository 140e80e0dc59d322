"""The command line `mam COMMAND [OPTIONS]`: which commands there are, and how one is run."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mam.cli.arguments import parse, value_of
from mam.cli.check_env import CheckEnv, check_env
from mam.cli.data import Data, data
from mam.cli.distill import Distill, distill
from mam.cli.evaluate import Evaluate, evaluate
from mam.cli.export import Export, export
from mam.cli.import_weights import Import, import_weights
from mam.cli.inspect import Inspect, inspect
from mam.cli.list import List, list_names
from mam.cli.output import discard, lasting, make_printable
from mam.cli.plan import Plan, plan
from mam.cli.play import Play, play
from mam.cli.record import Record, record
from mam.cli.report import Report, report
from mam.cli.show import Show, show
from mam.cli.start import starting_options
from mam.cli.train import Train, train
from mam.cli.zoo import Zoo, zoo
from mam.envs.external.factories import MAY_BE_CODE, check_agreed
from mam.envs.tasks import check_task
from mam.errors import DISTRIBUTION, RunError, UserError, installed_version, unknown_name
from mam.study.bench.command import Bench, run_bench
from mam.study.dashboard.command import Dashboard, serve
from mam.study.experiment.command import Experiment, run_experiment
from mam.study.sweep.command import Sweep, run_sweep

COMMANDS: dict[str, tuple[type, Callable[[Any], int | None]]] = {
    "train": (Train, train),
    "distill": (Distill, distill),
    "plan": (Plan, plan),
    "evaluate": (Evaluate, evaluate),
    "show": (Show, show),
    "play": (Play, play),
    "inspect": (Inspect, inspect),
    "record": (Record, record),
    "data": (Data, data),
    "export": (Export, export),
    "import": (Import, import_weights),
    "zoo": (Zoo, zoo),
    "list": (List, list_names),
    "experiment": (Experiment, run_experiment),
    "sweep": (Sweep, run_sweep),
    "report": (Report, report),
    "dashboard": (Dashboard, serve),
    "check-env": (CheckEnv, check_env),
    "bench": (Bench, run_bench),
}
# Commands that go on when their output is no longer read.
_LASTING = ("train", "distill", "experiment", "sweep", "dashboard", "record")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code.

    0, 1 if `check-env` found errors, 2 for invalid arguments, 141 if the reader of the output went
    away; commands that take long go on without it.
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
    except BrokenPipeError:  # the reader has seen enough: `mam list | head`
        discard(sys.stdout)
        return 141  # 128 + SIGPIPE, which not every system has
    except OSError as error:
        discard(sys.stdout)
        where = f": {error.filename}" if error.filename else ""
        print(f"mam: {error.strerror or error}{where}", file=sys.stderr)
        return RunError.exit_code
    return code


def read_options(name: str, args: Sequence[str]) -> Any:
    """Read the options of a command, such as `["--seed", "1"]` of `train`.

    Raises:
        UserError: if there is no such command or option, a value is of the wrong type, there is no
            such task, or only a folder names the task or the policy and it is code.
    """
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS, see="mam --help")
    kind, _ = COMMANDS[name]
    configured = any(field.name == "config" for field in dataclasses.fields(kind))
    options = parse(name, kind, args, starting_options(kind, args) if configured else None)
    if configured:
        trust = getattr(options, "trust", None)
        named = {setting: value_of(args, f"--{setting}") for setting in MAY_BE_CODE}
        check_agreed(options.config, named=named, trust=trust)
    for asked in (options, getattr(options, "config", None)):
        if env := getattr(asked, "env", None):
            check_task(env)  # at once: what commands import takes seconds
    return options


def _run(args: list[str]) -> int:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where package.module:factory is looked for
    if not args or args[0] in ("-h", "--help"):
        _print_overview()
        return 0
    if args[0] == "--version":
        from mam.kernels.native import library as native

        version = installed_version(DISTRIBUTION) or "(not installed)"
        print(f"mam {version}, {native.description()}")
        return 0
    options = read_options(args[0], args[1:])
    _, command = COMMANDS[args[0]]
    return command(options) or 0


def _print_overview() -> None:
    print("usage: mam COMMAND [OPTIONS]\n\nMulti-Agent Mamba: cooperative agents as a sequence.\n")
    for name, (kind, _) in COMMANDS.items():
        print(f"  {name:<12}{(kind.__doc__ or '').splitlines()[0]}")
    print(
        "\n`mam COMMAND --help` explains its options; `mam --version` says which version this is."
    )


if __name__ == "__main__":
    sys.exit(main())
