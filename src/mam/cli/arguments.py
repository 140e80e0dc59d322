"""Reading a command line into a dataclass; a mistake is one line that says what would be right."""

import contextlib
import dataclasses
import inspect
import io
import itertools
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from mam.config import MAX_INT, MAX_SEED, Config
from mam.errors import UserError, unknown_name
from mam.networks.mixers.registry import mixer_families


def value_of(args: Sequence[str], flag: str) -> str | None:
    """Return the last value given to a flag, written `--flag value` or `--flag=value`."""
    found = None
    for index, arg in enumerate(args):
        if arg == flag and index + 1 < len(args):
            found = args[index + 1]
        elif arg.startswith(flag + "="):
            found = arg.partition("=")[2]
    return found


def parse(command: str, kind: type, args: Sequence[str], default: Any) -> Any:
    """Parse the arguments with tyro; every mistake becomes one line.

    Args:
        command: its name.
        kind: dataclass of its options.
        args: as they were typed, without the command.
        default: options that the arguments override; those of the dataclass if None.

    Raises:
        UserError: for a mistake.
    """
    args = _checked_args(kind, args, see=f"mam {command} --help")
    extra = {} if default is None else {"default": default}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                kind, prog=f"mam {command}", description=_description(kind), args=args, **extra
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        text = re.sub(r"([\s\u2500-\u257f]|-{3,})+", " ", errors.getvalue()).strip()
        if text.startswith("Required options"):
            name = dataclasses.fields(kind)[0].name
            what = {
                "run": "the folder of a run",
                "env": "the name of an environment",
                "weights": "a file of weights",
                "what": "what to time" if command == "bench" else "what to do, and a folder",
            }
            what = (what | {"file": "a file that lists runs", "runs": "a folder with runs"})[name]
            text = f"{command} needs {what}: mam {command} {name.upper()}"
        if unknown := re.match(r".*Unrecognized options: (.*?) For full helptext", text):
            text = f"{command} does not take {unknown[1]} here: see `mam {command} --help`"
        raise UserError(text) from None


def _description(kind: type) -> str:
    """Describe the command and, where it chooses a network, the mixers and what each reads."""
    text = inspect.getdoc(kind) or ""
    if not any(flag.startswith("--network.") for flag in known_flags(kind)):
        return text
    mixers = (
        f"{family.policy} ({family.letter} in layouts): "
        f"{', '.join([*family.options, *family.own_defaults])}"
        for family in mixer_families().values()
    )
    return f"{text}\n\nPolicies of one mixer, and what it reads of --network: {'; '.join(mixers)}."


def _checked_args(kind: type, args: Sequence[str], *, see: str) -> list[str]:
    """Refuse unknown flags, with the nearest known ones, and values that lack the flag's type.

    Returns:
        The arguments, with whole numbers such as 1e6 written out.
    """
    flags, checked = known_flags(kind), list(args)
    for index, arg in enumerate(args):
        if not _is_flag(arg) or arg in ("-h", "--help"):
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
        if typing.get_origin(expected) is tuple:
            values = (
                [value]
                if equals
                else itertools.takewhile(lambda arg: not _is_flag(arg), args[index + 1 :])
            )
            for item in values:
                _check_value(name, item, typing.get_args(expected)[0])
            continue
        value = _written_out(value) if int in (expected, *typing.get_args(expected)) else value
        _check_value(name, value, expected)
        checked[index if equals else index + 1] = f"{name}={value}" if equals else value
    return checked


def _is_flag(arg: str) -> bool:
    return re.match(r"--?[a-zA-Z]", arg) is not None


def _written_out(value: str) -> str:
    """Write out a whole number such as 1e6 or 2.5e5 in digits; return anything else as it is."""
    with contextlib.suppress(ValueError):
        if (number := float(value)).is_integer() and "e" in value.lower():
            return str(int(number))
    return value


def _check_value(name: str, value: str, expected: Any) -> None:
    options: tuple[Any, ...] = typing.get_args(expected) or (expected,)
    if str in options or Path in options or (type(None) in options and value == "None"):
        return
    if typing.get_origin(expected) is typing.Literal:
        if value not in options:
            raise UserError(
                f"{name} takes {', '.join(options[:-1])} or {options[-1]}, got '{value}'"
            )
        return
    for option in options:
        with contextlib.suppress(ValueError, TypeError):
            number = option(value)
            if name == "--seed" and not 0 <= number <= MAX_SEED:
                raise UserError(f"--seed must lie in 0 … {MAX_SEED:,}, got {value}")
            if option is int and abs(number) > MAX_INT:
                raise UserError(f"{name} must lie within ±{MAX_INT:,}, got {value}")
            return
    names = {int: "a whole number", float: "a number", type(None): "None"}
    raise UserError(
        f"{name} takes {' or '.join(names[option] for option in options)}, got '{value}'"
    )


def known_flags(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Return every `--flag` of a dataclass, nested ones included, with the type of its value."""
    flags: dict[str, Any] = {}
    hints = typing.get_type_hints(kind, include_extras=True)
    for item in dataclasses.fields(kind):
        expected, name = hints[item.name], item.name
        if typing.get_origin(expected) is typing.Annotated:
            expected, *extras = typing.get_args(expected)
            name = next((extra.name for extra in extras if getattr(extra, "name", None)), name)
        name = name.replace("_", "-")
        if dataclasses.is_dataclass(expected):
            # A configuration's fields stand on their own; its groups put their name in front.
            flags |= known_flags(expected, prefix if expected is Config else f"{prefix}{name}.")
        else:
            flags[f"--{prefix}{name}"] = expected
            if expected is bool:
                head, _, last = f"{prefix}{name}".rpartition(".")
                flags[f"--{head}.no-{last}" if head else f"--no-{last}"] = bool
    return flags
