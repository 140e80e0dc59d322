"""Output that never ends the program: readers that go away, full disks, narrow encodings."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, cast


def make_printable() -> None:
    """Let standard output and error print any text: what they cannot encode becomes `?`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process (`>&-`)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def display(table: Any) -> None:
    """Print a table of Rich's in which names are neither markup nor emoji, whatever is in them."""
    from rich.console import Console

    Console(highlight=False, markup=False, emoji=False).print(table)


def discard(stream: Any) -> None:
    """Discard everything still to be written to a stream, buffered output included."""
    with suppress(OSError, ValueError):  # no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def lasting() -> Iterator[None]:
    """Let readers of standard output and error go away: only what is printed then is lost."""
    out, err = (cast(Any, _Lasting(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        yield


class _Lasting:
    """A text stream that loses what it cannot write."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            discard(self._stream)
            if self is sys.stdout:
                reason = error.strerror or error
                print(
                    f"mam: nobody reads the output any more ({reason}); going on without",
                    file=sys.stderr,
                )
