"""Signals: asked once, a run stops between two steps; asked twice, or when a step takes too long, at once."""

import os
import signal
import threading
import time

import pytest

from mam import stop as stops
from mam.stop import INTERRUPTED, PREEMPTED, stop_on_signals


class Ended(BaseException):
    """What `os._exit` is in a test."""


@pytest.fixture
def lines():
    return []


@pytest.mark.parametrize(
    ("number", "preempted"), [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGUSR1, True)]
)
def test_a_signal_is_a_question(lines, number, preempted):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with stop_on_signals(lines.append, lambda: "") as stop:
        assert stop.signal is None
        signal.raise_signal(number)
        assert (stop.signal, stop.preempted) == (number, preempted)
        _wait(lambda: lines)
    assert "stopping after this step" in lines[0]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(
    ("signals", "grace", "code", "why"),
    [
        ((signal.SIGTERM,), 0.05, 0, "takes longer than"),
        ((signal.SIGUSR1,), 0.05, PREEMPTED, "takes longer than"),
        ((signal.SIGINT, signal.SIGINT), 60, INTERRUPTED, "interrupted"),
    ],
)
def test_a_step_that_does_not_end_is_ended(lines, monkeypatch, signals, grace, code, why):
    codes = []

    def leave(code):
        codes.append(code)
        raise Ended

    monkeypatch.setattr(stops, "GRACE", grace)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with stop_on_signals(lines.append, lambda: "saved up to update 7"):
        for number in signals:
            signal.raise_signal(number)
            time.sleep(0.01)
        _wait(lambda: codes)
    assert codes == [code]
    assert why in lines[-1]
    assert lines[-1].endswith("saved up to update 7")


def test_more_signals_do_not_hurry(lines, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("ended"))
    with stop_on_signals(lines.append, lambda: "") as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
        assert stop.signal == signal.SIGTERM
        _wait(lambda: lines)
    assert len(lines) == 1


def test_outside_the_main_thread_there_are_no_signals(lines):
    def run():
        with stop_on_signals(lines.append, lambda: "") as stop:
            lines.append(stop.signal)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert lines == [None]


def _wait(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
