"""The worker process: it steps its share of a pool's environments when the pool says so.

First it makes its environments, sends their `Layout`, and gets the memory that it shares with the
pool. From then on commands are bytes on a pipe, `step` or `reset`, answered by nothing, or by the
metrics of episodes that ended; actions and observations are in shared memory. Its last answer may
be a pickled error: a `RunError` if an environment raised something in the middle of a run, which
another worker may survive, a `UserError` if it will not do.

Free of JAX, whose start takes longer than everything else here.
"""

import os
import pickle
import signal
import sysconfig
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import current_process, parent_process
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mam.errors import RunError, UserError

if TYPE_CHECKING:
    from mam.envs.external.slice import EnvSlice

# Followed by the size of the pool and of what stands in front of a view, then by the memory.
SHARE = b"share"
STEP = b"step"
# Followed by the seed, and by how often this worker was lost since that seed was given.
RESET = b"reset"
DONE = b""

_ORPHAN_GRACE = 2.0  # seconds that environments have to close after the parent's death
PARENTS_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
_QUOTED_FRAMES = 3  # of the traceback of an environment
_ENVS, _MAM = Path(__file__).parents[1:3]
_OURS = {_ENVS / "external", _ENVS / "check", _MAM / "runs"}  # which call it


@dataclass(frozen=True)
class Share:
    """The environments that a worker runs, and its options."""

    name: str  # of the task
    factory: bytes  # pickled; makes one environment
    first: int  # its environments' places in the pool
    stop: int
    quiet: bool  # another worker shows the same warnings


def main(connection: Connection, share: Share) -> None:
    """Serve the pool until it closes its end of the pipe, or is gone."""
    for number in PARENTS_SIGNALS:
        # The pool decides what Ctrl-C, or a batch system's signal, means.
        signal.signal(number, signal.SIG_IGN)
    # A daemon's environments could have no children; the parent still ends us when it exits.
    current_process().daemon = False
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    # Read when NumPy is first imported, which is why that happens below: the workers are threads
    # enough.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    if share.quiet:
        warnings.simplefilter("ignore")
    try:
        from mam.envs.external.slice import EnvSlice
    except ModuleNotFoundError as error:
        missing = UserError(f"{share.name}: {error.name} is not installed: pip install pettingzoo")
        connection.send_bytes(pickle.dumps(missing))
        return
    envs, raised = EnvSlice(share.name, range(share.first, share.stop)), UserError
    try:
        envs.make(_unpickle(share))
        raised = RunError
        _serve(connection, envs)
    except BaseException as error:  # SystemExit, too: an environment has no business ending us
        with suppress(OSError):
            connection.send_bytes(pickle.dumps(_explain(error, envs, raised)))
    finally:
        envs.close()


def _serve(connection: Connection, envs: "EnvSlice") -> None:
    connection.send_bytes(pickle.dumps(envs.layout))
    while (message := _receive(connection)) is not None:
        command, *numbers = message.split()
        if command == SHARE:
            memory = recv_handle(connection)
            envs.share(memory, *map(int, numbers))
            os.close(memory)
            continue
        finished = {}
        if command == STEP:
            envs.step()
            finished = envs.finished
        else:
            envs.reset(*map(int, numbers))
        connection.send_bytes(pickle.dumps(finished) if finished else DONE)


def _receive(connection: Connection) -> bytes | None:
    """Return the next command, None if there will be no more."""
    try:
        return connection.recv_bytes()
    except (EOFError, OSError):
        return None


def _unpickle(share: Share) -> Callable[[], Any]:
    try:
        return pickle.loads(share.factory)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{share.name}: worker processes cannot import what makes it: {error}"
        ) from None


def _explain(error: BaseException, envs: "EnvSlice", kind: type[UserError]) -> UserError:
    """Return what went wrong in an environment, with the end of the traceback."""
    if isinstance(error, UserError):
        return error
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = traceback.format_tb(error.__traceback__)[-_QUOTED_FRAMES:]
    return kind(f"{envs.name}: {envs.doing} raised {what}\n{''.join(frames).rstrip()}")


def _leave_with_parent() -> None:
    """End this process after its parent's death, even if an environment is busy or stuck."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        time.sleep(_ORPHAN_GRACE)
        os._exit(1)


def describe(error: BaseException) -> str:
    """Return the traceback's last line, and its innermost place.

    That is in the user's own code if any of it is there, or else in what is installed.
    """
    lines = traceback.format_exception_only(error)[0].strip().splitlines()
    # A callback's own traceback is within the message.
    text = lines[-1] if "Traceback" in lines[0] else lines[0]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_file()
    ]
    theirs = [frame for frame in frames if not _OURS & set(Path(frame.filename).parents)]
    installed = {Path(path) for path in sysconfig.get_paths().values()}
    own = [frame for frame in theirs if not installed & set(Path(frame.filename).parents)] or theirs
    return (
        f"{text} ({Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})"
        if own
        else text
    )
