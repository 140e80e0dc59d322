"""The one kind of error that is the user's to mend, and the names its advice installs packages by."""

import difflib
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from typing import Any

DISTRIBUTION = "multi-agent-mamba"  # the distribution called mam is another project's
NATIVE = "multi-agent-mamba-native"
_FORMER = {DISTRIBUTION: "mam", NATIVE: "mam-native"}  # what older checkouts are installed as


class UserError(Exception):
    """Something asked for cannot be had. The message is one line: what is wrong, and what would be right.

    Where a user's own code failed, the last lines of its traceback follow.
    """

    exit_code = 2


class RunError(UserError):
    """A run that was well asked for could not go on; what it had saved is as it was."""

    exit_code = 1


def shown(value: Any) -> str:
    """Write a value that may be anything, in part of a line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


def printable(text: object) -> str:
    r"""Write text of unknown origin so that a terminal, a page or a file shows it and nothing else happens.

    Control characters, marks that turn the direction of writing, and the bytes of names that are
    not UTF-8 become escapes such as `\x1b`; what is different stays different.
    """
    letters = (
        c if c.isprintable() or c == "\N{NO-BREAK SPACE}" else c.encode("unicode_escape").decode()
        for c in str(text)
    )
    return "".join(letters)


def unknown_name(kind: str, name: str, valid: Iterable[str], *, see: str) -> UserError:
    """The error for a name that does not exist, with the nearest ones that do and the command that lists all."""
    names = list(valid)
    near = [v for v in names if v.startswith(name)][:3] or difflib.get_close_matches(
        name, names, n=3, cutoff=0.6
    )
    hint = f": did you mean {' or '.join(near)}?" if near else ""
    return UserError(f"unknown {kind} {shown(name)}{hint} (see `{see}`)")


def installed_version(name: str) -> str | None:
    """Return the version of a distribution that is installed, under its former name if need be; None if it is not."""
    for candidate in filter(None, (name, _FORMER.get(name))):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(candidate)
    return None


def missing_extra(who: str, needs: str, extra: str) -> UserError:
    """Return the error for a package that one of the library's extras installs."""
    return UserError(f'{who} needs {needs}: pip install "{DISTRIBUTION}[{extra}]"')
