"""The one kind of error that is the user's to mend."""

import difflib
from collections.abc import Iterable
from typing import Any


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

    Control characters, marks that turn the direction of writing, and the bytes of names that are not UTF-8 become
    escapes such as `\x1b`; what is different stays different.
    """
    letters = (
        c if c.isprintable() or c == "\N{NO-BREAK SPACE}" else c.encode("unicode_escape").decode() for c in str(text)
    )
    return "".join(letters)


def unknown_name(kind: str, name: str, valid: Iterable[str], *, see: str) -> UserError:
    """The error for a name that does not exist, with the nearest ones that do and the command that lists all."""
    names = list(valid)
    near = [v for v in names if v.startswith(name)][:3] or difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f": did you mean {' or '.join(near)}?" if near else ""
    return UserError(f"unknown {kind} {shown(name)}{hint} (see `{see}`)")
