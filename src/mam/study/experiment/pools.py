"""Where runs are processes: started, told to stop, and waited for."""

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from mam.errors import UserError
from mam.runs.folder import LOCK_FILE
from mam.runs.lock import holder_of, is_held, try_lock
from mam.runs.signals import PREEMPTED
from mam.study.experiment.jobs import Job, is_running, python_command

UNKNOWN = 256  # in place of the exit code of a process started elsewhere
KILLED = -signal.SIGTERM.value  # the exit code of a process that ended without one of its own


@dataclass(frozen=True)
class End:
    """A run's process has ended."""

    job: Job
    code: int  # its exit code, negative for a signal
    why: str = ""  # what went wrong, if it never began

    def to_be_resumed(self, starts: int, retries: int) -> bool:
        """Say whether the run did not end by itself, and has not been started too often."""
        return self.code == UNKNOWN or (
            (self.code < 0 or self.code == PREEMPTED) and starts <= retries
        )


@runtime_checkable
class Pool(Protocol):
    """A place for runs, entered and left as a context."""

    def has_capacity(self) -> bool:
        """Say whether another run can start now."""
        ...

    def start(self, job: Job, command: Sequence[str]) -> None: ...

    def ended(self) -> list[End]:
        """Return the runs that ended since the last call."""
        ...

    def stop(self, job: Job) -> None:
        """Tell a run to save itself and end; return at once."""
        ...

    def __enter__(self) -> "Pool": ...

    def __exit__(self, *_: object) -> None: ...


class Elsewhere:
    """A run in a process that was started elsewhere, waited for like one that was started here.

    It is what a killed experiment left behind, or a `mam train` by hand.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def poll(self) -> int | None:
        """Return None as long as it lives, then UNKNOWN: how it ended is not known."""
        return None if is_running(self._folder) else UNKNOWN

    def terminate(self) -> None:
        """Tell it to save itself and end, if it is on this machine."""
        holder = holder_of(self._folder / LOCK_FILE)
        if holder and holder.here and is_held(self._folder / LOCK_FILE):
            with suppress(OSError):
                os.kill(holder.pid, signal.SIGTERM)


def launch(
    command: Sequence[str], log: Path, cwd: str | None = None
) -> subprocess.Popen[bytes] | Elsewhere:
    """Start `mam` in a process of its own, which appends what it prints to a file.

    The file stays locked as long as the process lives, even without its parent: a run is never
    started twice.

    Returns:
        The process, or the one that runs it already.

    Raises:
        UserError: if the folder cannot be written.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("ab")
    except OSError as error:
        raise UserError(f"cannot write to {log.parent}: {error.strerror}") from error
    with file:
        if is_held(log.parent / LOCK_FILE) or not try_lock(file.fileno()):
            return Elsewhere(log.parent)
        return subprocess.Popen(
            python_command(list(command)),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C is for the experiment, which passes it on
        )


class LocalPool:
    """Processes of this machine.

    Args:
        size: how many at the same time.
    """

    def __init__(self, size: int):
        self._size = size
        self._running: dict[Job, subprocess.Popen[bytes] | Elsewhere] = {}

    def __enter__(self) -> "LocalPool":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            if isinstance(process, Elsewhere):
                continue
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def has_capacity(self) -> bool:
        return len(self._running) < self._size

    def start(self, job: Job, command: Sequence[str]) -> None:
        self._running[job] = launch(command, job.log)

    def ended(self) -> list[End]:
        ends = [
            End(job, code)
            for job, process in self._running.items()
            if (code := process.poll()) is not None
        ]
        for end in ends:
            del self._running[end.job]
        return ends

    def stop(self, job: Job) -> None:
        self._running[job].terminate()
