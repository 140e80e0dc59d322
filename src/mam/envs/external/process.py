"""The pool's end of a worker process: starting it, talking to it, ending it."""

import multiprocessing
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.reduction import send_handle
from types import ModuleType
from typing import Any

from mam.envs.external import worker as child
from mam.envs.external.shared import Layout, SharedMemory
from mam.errors import RunError, UserError

_EXIT_TIMEOUT = 5.0  # seconds that workers may take to close their environments
# When made; metrics of episodes that ended; done.
Answer = Layout | dict[int, dict[str, float]] | None
_PATIENCE = 1.0  # seconds; see `wait_for_answers`


class WorkerProcess:
    """One worker; the process may be another one after a failure."""

    def __init__(self, index: int, share: child.Share):
        self.share = share
        self.rows = slice(share.first, share.stop)
        self.generation = 0  # how often it was lost since the last seed was given
        self.failures = 0  # how often in a row it was lost before an episode ended
        self.steps = 0  # since it was started
        self._index = index
        self._started = False

    def __str__(self) -> str:
        first, last = self.share.first, self.share.stop - 1
        places = f"environment {first}" if first == last else f"environments {first} to {last}"
        return f"worker {self._index} ({places})"

    def start(self) -> None:
        """Start the process, which sends a `Layout` when its environments are made."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=child.main,
            args=(theirs, self.share),
            name=f"mam-worker-{self._index}",
            daemon=True,
        )
        # What a user's own script defines is only found by running that script.
        with nullcontext() if b"__main__" in self.share.factory else _without_main():
            self.process.start()
        self._started = True
        theirs.close()  # else the pipe would not break when the worker dies

    def give(self, memory: SharedMemory, num_envs: int, id_dim: int) -> None:
        """Answer the layout with the memory to work in."""
        self.send(b"%b %d %d" % (child.SHARE, num_envs, id_dim))
        with suppress(OSError):
            send_handle(self.connection, memory.fd, self.process.pid)

    def send(self, command: bytes) -> None:
        """Give a command; that the worker is gone shows when its answer is read."""
        with suppress(OSError):
            self.connection.send_bytes(command)

    def receive(self) -> Answer:
        """Read the answer.

        Raises:
            UserError: an environment will not do; a `RunError` if it raised something while it was
                used.
            EOFError: the worker is gone.
        """
        try:
            answer = self.connection.recv_bytes()
        except OSError as error:
            raise EOFError from error
        if answer == child.DONE:
            return None
        result = pickle.loads(answer)
        if isinstance(result, UserError):
            raise result
        return result

    def hang_up(self) -> None:
        """Let the worker know that there are no more commands."""
        if self._started:
            self.connection.close()

    def end(self, timeout: float) -> str:
        """End the process, by force after `timeout` seconds; return how it ended."""
        if not self._started:
            return "was not started"
        self.hang_up()
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        self.process.close()
        self._started = False
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


@dataclass(frozen=True)
class Deadline:
    """The time that a worker's present task may take, and that task.

    Time starts anew when it changes.
    """

    seconds: float
    doing: bytes = b""


def wait_for_answers(
    workers: list[WorkerProcess], deadline: Callable[[WorkerProcess], Deadline]
) -> tuple[dict[WorkerProcess, Answer], dict[WorkerProcess, str | RunError]]:
    """Wait for all workers' answers; end those that do not answer in time.

    Time is counted in pieces in which no worker answered, so that it stands still while the program
    does (Ctrl-Z).

    Returns:
        The answers, and what happened to the lost workers: an environment's error, or words.

    Raises:
        UserError: an environment will not do.
    """
    waiting: dict[Any, WorkerProcess] = {worker.connection: worker for worker in workers}
    answers, lost = {}, {}
    silent = {worker: (deadline(worker), 0.0) for worker in workers}
    while waiting:
        patience = min(silent[worker][0].seconds - silent[worker][1] for worker in waiting.values())
        ready = wait(list(waiting), max(0.0, min(patience, _PATIENCE)))
        for connection in ready:
            worker = waiting.pop(connection)
            try:
                answers[worker] = worker.receive()
            except EOFError:
                lost[worker] = worker.end(_PATIENCE)
            except RunError as error:
                worker.end(_PATIENCE)
                lost[worker] = error
        if ready:
            continue
        for connection, worker in list(waiting.items()):
            (before, seconds), now = silent[worker], deadline(worker)
            silent[worker] = now, seconds + _PATIENCE if now == before else 0.0
            if silent[worker][1] >= now.seconds:
                del waiting[connection]
                worker.end(0.0)
                lost[worker] = f"did not answer within {now.seconds:g} s"
    return answers, lost


def end_all(workers: list[WorkerProcess], memory: SharedMemory) -> None:
    """End all workers at once, and let go of the memory."""
    for worker in workers:
        worker.hang_up()
    deadline = time.monotonic() + _EXIT_TIMEOUT
    for worker in workers:
        worker.end(max(0.0, deadline - time.monotonic()))
    memory.close()


def pickle_factory(name: str, factory: Callable[..., Any]) -> bytes:
    """Return the factory as it travels to the workers.

    Raises:
        UserError: they could not import it.
    """
    try:
        return pickle.dumps(factory)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"{name}: worker processes cannot import what makes the environment, "
            f"which must be a function or class at the top level of a module ({error})"
        ) from error


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the main script for as long as a process is started.

    A spawned process imports what the main script imports, if it finds one: for our own command,
    all of JAX.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
