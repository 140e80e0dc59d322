"""All runs of an experiment, from wherever each of them stands to its end."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from mam.errors import UserError
from mam.runs.signals import PREEMPTED
from mam.study.experiment.follow import Follower
from mam.study.experiment.jobs import Job
from mam.study.experiment.pools import UNKNOWN, End, Pool
from mam.study.experiment.screen import Screen

POLL_SECONDS = 0.2
Status = Literal["waiting", "running", "finished", "stopped", "pruned", "failed"]


@dataclass(eq=False)
class Row:
    """One run and where it stands."""

    job: Job
    status: Status = "waiting"
    starts: int = 0
    note: str = ""
    progress: Follower = field(init=False)

    def __post_init__(self):
        self.progress = self.job.follow()
        self.look()
        try:
            if self.progress.finished(self.job.budget) and self.job.saved():
                self.status = "finished"
        except UserError as error:
            self.status, self.note = "failed", str(error)

    def look(self) -> None:
        """Read what the run has reported."""
        self.progress.poll()


def run_matrix(jobs: Sequence[Job], pool: Pool, screen: Screen, *, retries: int) -> int:
    """Run what is not finished, and say at the end what failed.

    Args:
        jobs: the runs.
        pool: where they run.
        screen: where it is shown.
        retries: how often a run that was killed or preempted is resumed.

    Returns:
        The exit code: 1 if a run failed, else 0, also when stopped by a signal.
    """
    rows = {job: Row(job) for job in jobs}
    with stop_on_signals() as stopping:
        told = False
        while any(row.status in ("waiting", "running") for row in rows.values()):
            if stopping() and not told:
                told = True
                screen.log("stopping: every run is told to save itself; Ctrl-C again kills them")
                for row in rows.values():
                    if row.status == "running":
                        pool.stop(row.job)
                    elif row.status == "waiting":
                        row.status = "stopped"
            for row in rows.values():
                if row.status == "waiting" and pool.has_capacity():
                    _start(row, pool, screen)
            for end in pool.ended():
                _settle(rows[end.job], end, screen, retries=retries, stopping=told)
            for row in rows.values():
                if row.status == "running":
                    row.look()
            screen.show(list(rows.values()))
            time.sleep(POLL_SECONDS)
    return _conclude(list(rows.values()), screen)


def _start(row: Row, pool: Pool, screen: Screen) -> None:
    how = (
        "waits for the process that runs it"
        if row.job.running()
        else "resumed"
        if row.job.started()
        else "started"
    )
    try:
        pool.start(row.job, row.job.command())
    except UserError as error:
        row.status, row.note = "failed", str(error)
        screen.log(f"{row.job.name}: failed: {error}")
        return
    row.status, row.starts = "running", row.starts + 1
    screen.log(f"{row.job.name}: {how}")


def _settle(row: Row, end: End, screen: Screen, *, retries: int, stopping: bool) -> None:
    """Decide what a process that ended means."""
    row.look()
    code = end.code
    if row.progress.finished(row.job.budget):
        row.status = "finished"
        screen.log(f"{row.job.name}: finished, return {screen.returns(row)}")
    elif stopping:
        row.status = "stopped"
    elif end.to_be_resumed(row.starts, retries):
        row.status = "waiting"
        screen.log(f"{row.job.name}: {_how(code)}: resuming it")
    else:
        row.status = "failed"
        said = (
            row.job.last_words()
            if code > 0 and code != PREEMPTED
            else f"{_how(code)} before its end"
        )
        row.note = end.why or said
        screen.log(f"{row.job.name}: failed: {row.note}")


def _how(code: int) -> str:
    if code == UNKNOWN:
        return "its process is gone"
    if code == PREEMPTED:
        return "preempted"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else "stopped"


def _conclude(rows: Sequence[Row], screen: Screen) -> int:
    screen.conclude(rows)
    failed = [row for row in rows if row.status == "failed"]
    for row in failed:
        see = f" (see {row.job.log})" if row.starts else ""
        screen.log(f"failed: {row.job.name}: {row.note}{see}")
    if any(row.status == "stopped" for row in rows):
        screen.log("stopped; the same command goes on")
    return 1 if failed else 0


@contextmanager
def stop_on_signals() -> Iterator[Any]:
    """Turn SIGINT and SIGTERM into a flag to be polled; the second Ctrl-C interrupts."""
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    handlers = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
