"""Asking a run to stop: signals become a question between two updates, with a deadline.

SIGINT and SIGTERM ask for an end; SIGUSR1 says that the machine is needed for something else and the run should be
queued again (Slurm: `--signal=USR1@60`), which the exit code reports.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PREEMPTED = 75  # the exit code that asks for the run to be queued again: EX_TEMPFAIL of <sysexits.h>
INTERRUPTED = 130  # the shell's code for a process ended by Ctrl-C
GRACE = 25.0  # seconds between a signal and the end, whatever the run is doing
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """Whether a run is to stop, and how."""

    def __init__(self, log: Callable[[str], None], last_words: Callable[[], str]):
        self.signal: int | None = None
        self._log, self._last_words = log, last_words

    @property
    def preempted(self) -> bool:
        """Whether the run should be queued again."""
        return self.signal == signal.SIGUSR1

    def receive(self, number: int) -> None:
        """Remembers the first signal. Called between two instructions of the main thread, which may be busy."""
        self.signal = self.signal or number

    def watch(self, pipe: int) -> None:
        """Answers signals at once, in a thread of its own: the main one may be inside a long computation."""
        deadline = None
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            readable, _, _ = select.select([pipe], [], [], left)
            if not readable:
                self._end(f"this step takes longer than {GRACE:.0f} s", PREEMPTED if self.preempted else 0)
            number = os.read(pipe, 1)[0]
            if number == 0:
                return
            if number not in _SIGNALS:
                continue
            self.receive(number)
            if deadline is None:
                deadline = time.monotonic() + GRACE
                self._log("stopping after this step; press Ctrl-C again to stop at once and lose what is not saved")
            elif number == signal.SIGINT:
                self._end("interrupted", INTERRUPTED)

    def _end(self, why: str, code: int) -> None:
        self._log(f"{why}: stopped at once; {self._last_words()}")
        os._exit(code)


@contextmanager
def stop_on_signals(log: Callable[[str], None], last_words: Callable[[], str]) -> Iterator[Stop]:
    """Listens to signals; in any thread but the main one, where Python has none, to nothing.

    Args:
        log: prints a line.
        last_words: called before the process is ended in the middle of a step; says what is saved.
    """
    stop = Stop(log, last_words)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    watcher = threading.Thread(target=stop.watch, args=(reading,), daemon=True, name="signals")
    watcher.start()
    handlers = {number: signal.signal(number, lambda number, _: stop.receive(number)) for number in _SIGNALS}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.write(writing, b"\0")
        watcher.join()
        os.close(reading)
        os.close(writing)
