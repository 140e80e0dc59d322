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


def unknown_name(kind: str, name: str, valid: Iterable[str], *, see: str) -> UserError:
    """The error for a name that does not exist, with the nearest ones that do and the command that lists all."""
    names = list(valid)
    near = [v for v in names if v.startswith(name)][:3] or difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f": did you mean {' or '.join(near)}?" if near else ""
    return UserError(f"unknown {kind} {shown(name)}{hint} (see `{see}`)")
