"""One process at a time, until it ends, however it ends."""

import os
import signal
import subprocess
import sys

import pytest

from mam.errors import UserError
from mam.runs import lock as locks
from mam.runs.lock import acquire, holder_of, is_held

HOLD = """
import sys
from pathlib import Path
from mam.runs.lock import acquire
acquire(Path(sys.argv[1]))
print("held", flush=True)
input()
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    return tmp_path / "run.lock"


@pytest.fixture
def other(path):
    """Another process that holds the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_only_one_has_it(path):
    assert not is_held(path)
    lock = acquire(path)
    with pytest.raises(
        UserError, match=rf"{path.parent} is in use by process {os.getpid()} on \S+: wait for it"
    ):
        acquire(path)
    lock.close()


def test_it_can_be_released(path):
    lock = acquire(path)
    assert is_held(path)
    lock.close()
    assert not is_held(path)
    acquire(path).close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_its_process(path, other, number):
    holder = holder_of(path)
    assert holder is not None
    assert (holder.pid, holder.here) == (other.pid, True)
    with pytest.raises(UserError, match=f"in use by process {other.pid} on"):
        acquire(path)
    other.send_signal(number)
    other.wait()
    assert not is_held(path)
    acquire(path).close()


@pytest.mark.parametrize(
    "text", [b"", b"no number", b"99999999 elsewhere\n", b"\xff\xfe", b"1 2 3"]
)
def test_what_a_restarted_machine_left_in_the_file_locks_nothing(path, text):
    path.write_bytes(text)
    assert not is_held(path)
    acquire(path).close()
    assert holder_of(path) == locks.Holder(os.getpid(), locks.socket.gethostname())


def test_a_holder_that_does_not_say_who_it_is(path, other):
    path.write_text("")
    with pytest.raises(UserError, match="in use by another process"):
        acquire(path)


def test_where_there_are_no_locks_nothing_is_locked(path, monkeypatch):
    def unsupported(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    acquire(path).close()
    assert not is_held(path)


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot lock .*none/run.lock: No such file or directory"):
        acquire(tmp_path / "none" / "run.lock")
