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
from mam.experiment.jobs import Job, python_command

KILLED = -signal.SIGTERM.value  # the exit code of a process that ended without one of its own


@dataclass(frozen=True)
class End:
    """A run's process has ended."""

    job: Job
    code: int  # its exit code, negative for a signal
    why: str = ""  # what went wrong, if it never began


@runtime_checkable
class Pool(Protocol):
    """A place for runs, entered and left as a context."""

    def room(self) -> bool:
        """Whether another run can start now."""
        ...

    def start(self, job: Job, command: Sequence[str]) -> None: ...

    def ended(self) -> list[End]:
        """Runs that ended since the last call."""
        ...

    def stop(self, job: Job) -> None:
        """Tells a run to save itself and end; returns at once."""
        ...

    def __enter__(self) -> "Pool": ...

    def __exit__(self, *_: object) -> None: ...


def launch(command: Sequence[str], log: Path, cwd: str | None = None) -> subprocess.Popen[bytes]:
    """Starts `mam` in a process of its own, which appends what it prints to a file.

    The file stays locked as long as the process lives, whoever dies in between: a run is never started twice.

    Raises:
        UserError: if it is running already.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        _lock(file.fileno(), log)
        return subprocess.Popen(
            python_command(list(command)),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C is for the experiment, which passes it on
        )


def _lock(descriptor: int, log: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{log.parent} is being run by another process") from error


class LocalPool:
    """Processes of this machine.

    Args:
        size: how many at the same time.
    """

    def __init__(self, size: int):
        self._size = size
        self._running: dict[Job, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "LocalPool":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def room(self) -> bool:
        return len(self._running) < self._size

    def start(self, job: Job, command: Sequence[str]) -> None:
        self._running[job] = launch(command, job.log)

    def ended(self) -> list[End]:
        ends = [End(job, code) for job, process in self._running.items() if (code := process.poll()) is not None]
        for end in ends:
            del self._running[end.job]
        return ends

    def stop(self, job: Job) -> None:
        self._running[job].terminate()
