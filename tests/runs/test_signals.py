"""Signals: asked once, a run stops between two steps; asked twice, or in a long step, at once."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mam.runs import signals as stops
from mam.runs.signals import INTERRUPTED, PREEMPTED, SIGNALS, listen, stop_on_signals


class Ended(BaseException):
    """What `os._exit` is in a test."""


@pytest.fixture
def lines():
    return []


@pytest.fixture
def codes(monkeypatch):
    """The exit codes of a process that ends at once, again and again."""
    codes = []

    def leave(code):
        codes.append(code)
        raise Ended

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    return codes


PREEMPTING = (signal.SIGUSR1, signal.SIGUSR2)


@pytest.mark.parametrize(
    ("number", "preempted"), [(number, number in PREEMPTING) for number in SIGNALS]
)
def test_a_signal_is_a_question(lines, number, preempted):
    handlers = [signal.getsignal(n) for n in SIGNALS]
    with stop_on_signals(lines.append, lambda: "") as stop:
        assert stop.signal is None
        signal.raise_signal(number)
        assert (stop.signal, stop.preempted) == (number, preempted)
        _wait(lambda: lines)
    assert "stopping after this step" in lines[0]
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(
    ("signals", "grace", "code", "why"),
    [
        ((signal.SIGTERM,), 0.05, 0, "takes longer than"),
        ((signal.SIGUSR1,), 0.05, PREEMPTED, "takes longer than"),
        ((signal.SIGINT, signal.SIGINT), 60, INTERRUPTED, "interrupted"),
    ],
)
def test_a_step_that_does_not_end_is_ended(lines, codes, monkeypatch, signals, grace, code, why):
    monkeypatch.setattr(stops, "GRACE", grace)
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


@pytest.mark.parametrize("number", SIGNALS)
def test_before_there_is_a_run_a_signal_ends_the_process(codes, number, capfd):
    _, end = listen()
    try:
        signal.raise_signal(number)
        _wait(lambda: codes)
    finally:
        end()
    assert codes == [
        PREEMPTED if number in PREEMPTING else INTERRUPTED if number == signal.SIGINT else 0
    ]
    assert (
        capfd.readouterr().err
        == "asked to stop before the first update: stopped at once; nothing was changed\n"
    )


def test_after_a_run_a_signal_waits_for_the_end(lines, codes, capfd):
    _, end = listen()
    try:
        with stop_on_signals(lines.append, lambda: "saved"):
            pass
        signal.raise_signal(signal.SIGUSR1)
        time.sleep(0.05)
    finally:
        end()
    assert not codes
    assert "stopping" in capfd.readouterr().err
    assert not lines


def test_what_libraries_take_over_is_taken_back(lines):
    _, end = listen()
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with stop_on_signals(lines.append, lambda: "") as stop:
            signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    finally:
        end()


def test_nohup_is_respected(lines):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals(lines.append, lambda: "") as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, old)


def test_systems_without_these_signals(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")
    monkeypatch.delattr(signal, "SIGHUP")
    assert stops._existing("SIGINT", "SIGHUP", "SIGUSR1") == (signal.SIGINT,)


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


COMMAND = """
import atexit, sys, time, types

def main():
    assert not {"jax", "numpy", "tyro", "equinox"} & set(sys.modules)
    if %r == "at the end":
        from mam.runs.signals import stop_on_signals
        with stop_on_signals(print, lambda: "saved"):
            pass
        atexit.register(wait)
        return 0
    wait()

def wait():
    print("ready", flush=True)
    for _ in range(40):
        time.sleep(0.05)

sys.argv = ["mam", "train"]
sys.modules["mam.cli"] = cli = types.ModuleType("mam.cli")
cli.main = types.SimpleNamespace(main=main)
from mam.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("when", "number", "code"),
    [
        ("at the start", signal.SIGINT, INTERRUPTED),
        ("at the start", signal.SIGTERM, 0),
        ("at the start", signal.SIGHUP, 0),
        ("at the start", signal.SIGUSR1, PREEMPTED),
        ("at the start", signal.SIGUSR2, PREEMPTED),
        ("at the end", signal.SIGUSR1, 0),
        ("at the end", signal.SIGINT, 0),
    ],
)
def test_the_command_listens_before_it_imports_anything_and_to_its_last_moment(when, number, code):
    command = [sys.executable, "-c", COMMAND % when]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.count("\n") == 1
    assert "stop" in errors
