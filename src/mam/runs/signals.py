"""Graceful shutdown: handlers set a flag polled between updates, a watchdog enforces a deadline.

SIGINT, SIGTERM and SIGHUP (the terminal is gone) ask for an end; SIGUSR1 and SIGUSR2 (submitit's)
say that the machine is needed for something else and the run should be queued again (Slurm:
`--signal=USR1@60`), which the exit code reports. Before the first update there is nothing to save:
the process ends at once. Imports nothing heavy: `mam train` listens before it loads anything else.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

# The exit code that asks for the run to be queued again: EX_TEMPFAIL of <sysexits.h>.
PREEMPTED = 75
INTERRUPTED = 130  # the shell's code for a process ended by Ctrl-C
GRACE = 25.0  # seconds between a signal and the end, whatever the run is doing


def _existing(*names: str) -> tuple[int, ...]:
    """Return the numbers of signals, those that this system has."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


_REQUEUE = _existing("SIGUSR1", "SIGUSR2")
SIGNALS = _existing("SIGINT", "SIGTERM", "SIGHUP") + _REQUEUE


class Stop:
    """Whether a run is to stop, and how."""

    def __init__(self):
        self.signal: int | None = None
        self._log: Callable[[str], None] = _say
        self._last_words: Callable[[], str] | None = None  # None before there is a run

    @property
    def preempted(self) -> bool:
        """Whether the run should be queued again."""
        return self.signal in _REQUEUE

    def receive(self, number: int) -> None:
        """Remember the first signal; called between two instructions of the main thread."""
        self.signal = self.signal or number

    def ask(self) -> None:
        """End the run as a signal would, without a deadline."""
        self.receive(signal.SIGTERM)

    def watch(self, wakeup: socket.socket) -> None:
        """React to signals at once, in a thread apart: the main one may be inside a long call."""
        deadline = None
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            readable, _, _ = select.select([wakeup], [], [], left)
            if not readable:
                self._end(f"this step takes longer than {GRACE:.0f} s", self._code(self.signal))
            number = int.from_bytes(wakeup.recv(1))
            if number == 0:  # the other end was closed, or said so
                return
            if number not in SIGNALS:
                continue
            self.receive(number)
            if self._last_words is None:
                self._end("asked to stop before the first update", self._code(number, at_once=True))
            elif deadline is None:
                deadline = time.monotonic() + GRACE
                self._log(
                    "stopping after this step; "
                    "press Ctrl-C again to stop at once and lose what is not saved"
                )
            elif number == signal.SIGINT:
                self._end("interrupted", INTERRUPTED)

    @contextmanager
    def during(self, log: Callable[[str], None], last_words: Callable[[], str]) -> Iterator[None]:
        """Let a run poll between its steps, and say what is saved when it ends.

        Args:
            log: prints a line.
            last_words: called before the process is ended; says what is saved.
        """
        self._log, self._last_words = log, last_words
        try:
            yield
        finally:
            self._log = _say

    def _code(self, number: int | None, *, at_once: bool = False) -> int:
        if number in _REQUEUE:
            return PREEMPTED
        return INTERRUPTED if at_once and number == signal.SIGINT else 0

    def _end(self, why: str, code: int) -> None:
        words = self._last_words() if self._last_words else "nothing was changed"
        with suppress(Exception):  # the terminal may be gone
            self._log(f"{why}: stopped at once; {words}")
            sys.stdout.flush()
        os._exit(code)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_listening: Stop | None = None  # to the signals of this process
# The socket that it reads, and the one that handlers write to.
_ends: tuple[socket.socket, socket.socket] | None = None


def listen() -> tuple[Stop, Callable[[], None]]:
    """Take the signals of this process over, if that has not happened yet.

    In any thread but the main one, where Python has no signals, it listens to nothing.

    Returns:
        What is asked of the process, and what gives the signals back to their old handlers.
    """
    global _listening, _ends
    if threading.current_thread() is not threading.main_thread():
        return Stop(), _nothing
    if _listening is not None:
        # Libraries loaded since, such as a cluster's client, may have taken some over.
        _handle(_listening)
        return _listening, _nothing
    stop = _listening = Stop()
    reading, writing = _ends = socket.socketpair()
    writing.setblocking(False)
    watcher = threading.Thread(target=stop.watch, args=(reading,), daemon=True, name="signals")
    watcher.start()
    wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    handlers = _handle(stop)

    def end() -> None:
        global _listening, _ends
        _listening = _ends = None
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        writing.send(b"\0")
        watcher.join()
        reading.close()
        writing.close()

    return stop, end


def _nothing() -> None:
    pass


def _handle(stop: Stop) -> dict[int, Any]:
    """Take over all signals not ignored from the start (nohup), and return the old handlers.

    Ctrl-C is never ignored: shells that start a command in the background do that for it.
    """
    heard = [n for n in SIGNALS if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
    return {
        number: signal.signal(number, lambda number, _: stop.receive(number)) for number in heard
    }


@contextmanager
def stop_on_signals(log: Callable[[str], None], last_words: Callable[[], str]) -> Iterator[Stop]:
    """Listen to signals while a run goes on.

    Args:
        log: prints a line.
        last_words: called before the process is ended in the middle of a step; says what is saved.
    """
    stop, end = listen()
    try:
        with stop.during(log, last_words):
            yield stop
    finally:
        end()
