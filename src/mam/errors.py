"""Usage errors, and the names by which their advice installs packages."""

import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module, metadata
from typing import Any

DISTRIBUTION = "multi-agent-mamba"  # the distribution called mam is another project's
NATIVE = "multi-agent-mamba-native"
_FORMER = {DISTRIBUTION: "mam", NATIVE: "mam-native"}  # what older checkouts are installed as


class UserError(Exception):
    """A usage error, in one line: what is wrong, and what would be right.

    Where a user's own code failed, the last lines of its traceback follow.
    """

    exit_code = 2


class RunError(UserError):
    """A run of valid arguments could not go on; what it had saved is as it was."""

    exit_code = 1


def shown(value: Any) -> str:
    """Return the text of any value, in part of a line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


def printable(text: object) -> str:
    r"""Escape text of unknown origin for a terminal, a page or a file.

    Control characters, marks that turn the direction of writing, and the bytes of names that are
    not UTF-8 become escapes such as `\x1b`; what is different stays different.
    """
    letters = (
        c if c.isprintable() or c == "\N{NO-BREAK SPACE}" else c.encode("unicode_escape").decode()
        for c in str(text)
    )
    return "".join(letters)


def unknown_name(kind: str, name: str, valid: Iterable[str], *, see: str) -> UserError:
    """Return the error for a name that does not exist.

    Args:
        kind: of what it is a name.
        name: as it was given.
        valid: the names that exist, of which the nearest are suggested.
        see: the command that lists them.
    """
    names = list(valid)
    near = [v for v in names if v.startswith(name)][:3] or difflib.get_close_matches(
        name, names, n=3, cutoff=0.6
    )
    hint = f": did you mean {' or '.join(near)}?" if near else ""
    return UserError(f"unknown {kind} {shown(name)}{hint} (see `{see}`)")


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, maybe under its former name, or None."""
    for candidate in filter(None, (name, _FORMER.get(name))):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(candidate)
    return None


def load_entry_point(kind: str, point: metadata.EntryPoint) -> Any:
    """Return what an installed package adds under an entry point.

    Args:
        kind: of thing it is to be.
        point: the entry point.

    Raises:
        UserError: if it cannot be imported.
    """
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"the {kind} {point.name} cannot be imported: {error}") from error


def import_function(kind: str, name: str) -> Callable[..., Any]:
    """Import a function or class of a user's own, written package.module:function.

    Args:
        kind: of thing it is, such as a controller.
        name: as it was given.

    Raises:
        UserError: if there is none, or it is Python's own.
    """
    module, _, attribute = name.partition(":")
    if (top := module.partition(".")[0]) in sys.stdlib_module_names:
        raise UserError(f"{name}: {top} is part of Python, where there is no {kind}")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"no {kind} {name}, expected package.module:function: {error}") from error
    if not callable(found):
        raise UserError(f"{name} is a {type(found).__name__}: expected a function")
    return found


def check_call(name: str, hint: str, function: Callable[..., Any], /, *args: Any, **options: Any):
    """Refuse a function of a user's own that does not take the arguments it would get.

    Args:
        name: as it was given.
        hint: what would be right.
        function: the one of that name.
        *args: it would get.
        **options: it would get.

    Raises:
        UserError: if it does not take them.
    """
    try:
        inspect.signature(function).bind(*args, **options)
    except TypeError as error:
        raise UserError(f"{name}: {error}; {hint}") from None
    except ValueError:
        pass  # built in: its signature cannot be read


@contextmanager
def needs_extra(who: str, needs: str, extra: str) -> Iterator[None]:
    """Say what installs the package that an import inside does not find.

    Args:
        who: does not work without it, such as a command.
        needs: the package's name, for people.
        extra: which installs it.

    Raises:
        UserError: if it cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        raise missing_extra(who, needs, extra) from error


def missing_extra(who: str, needs: str, extra: str) -> UserError:
    """Return the error that `who` needs a package `needs`, which the `extra` installs."""
    return UserError(f'{who} needs {needs}: pip install "{DISTRIBUTION}[{extra}]"')
