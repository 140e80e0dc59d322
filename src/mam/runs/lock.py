"""Advisory locks on files: one process at a time, until it closes the lock or ends.

They are `flock`'s. On NFS Linux keeps such a lock at the server (version 4, or 3 with lockd), for
all machines that see the folder. Where a file system has none, and on Windows, nothing is locked.
"""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from mam.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

PATIENCE = 1.0  # seconds; `is_held` has the lock itself for an instant


@dataclass(frozen=True)
class Lock:
    """A lock that this process holds."""

    descriptor: int

    def close(self) -> None:
        """Release the lock."""
        os.close(self.descriptor)


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as far as it is known."""

    pid: int
    machine: str

    @property
    def here(self) -> bool:
        """Say whether it is a process of this machine."""
        return self.machine == socket.gethostname()


def acquire(path: Path) -> Lock:
    """Lock a file, which is made if it is missing and never deleted.

    Raises:
        UserError: if another process holds it, or it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.strerror}") from error
    deadline = time.monotonic() + PATIENCE
    while not try_lock(descriptor):
        if time.monotonic() > deadline:
            os.close(descriptor)
            holder = holder_of(path)
            who = f"process {holder.pid} on {holder.machine}" if holder else "another process"
            raise UserError(f"{path.parent} is in use by {who}: wait for it, or end it first")
        time.sleep(0.05)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
    except OSError:  # the disk is full: locked it is
        pass
    return Lock(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock an open file unless it is locked already, be it by this process."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        return True
    return True


def is_held(path: Path) -> bool:
    """Say whether some process holds the lock."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)


def holder_of(path: Path) -> Holder | None:
    """Return the process that locked a file last, if it could say so."""
    try:
        pid, machine = path.read_text(encoding="utf-8").split()
        return Holder(int(pid), machine)
    except (OSError, ValueError):
        return None
