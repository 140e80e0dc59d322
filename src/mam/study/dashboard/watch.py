"""Watching a folder of runs, in a thread of its own."""

import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mam.errors import UserError, printable
from mam.runs.sinks import mean_and_spread
from mam.study.dashboard.runs import LiveRun
from mam.study.report.collect import find_runs

INTERVAL = 2.0  # seconds between two looks at the files
_SEARCH_INTERVAL = 6.0  # seconds between two searches for new runs
_PATIENCE = 30.0  # seconds that one run's files may take before the page says so


@dataclass(frozen=True)
class Progress:
    """The progress of reading."""

    runs: int
    unread: int  # of them
    nbytes: int  # of the numbers in memory


class Watcher:
    """All runs below a folder; new ones appear by themselves, and none blocks reading the others.

    Args:
        root: the folder.

    Attributes:
        version: grows with every change of what `runs` or `table` say.
        runs: by name. Replaced as a whole when runs come or go.
        table: what the table of runs shows, by name; only rows that changed are new objects.
    """

    def __init__(self, root: Path):
        self.root, self.version = root, 0
        self.runs: dict[str, LiveRun] = {}
        self.table: dict[str, dict[str, Any]] = {}
        self._searched, self._unread = float("-inf"), 0
        self._doing, self._since, self._failure = "", time.monotonic(), ""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._thread = threading.Thread(target=self._watch, daemon=True, name="reader")
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after the run it is reading."""
        self._ended.set()
        if self._thread:
            self._thread.join(timeout=5)

    @property
    def progress(self) -> Progress:
        """The progress of reading."""
        runs = self.runs.values()
        return Progress(len(runs), self._unread, sum(run.metrics.nbytes for run in runs))

    @property
    def trouble(self) -> str:
        """Why what is shown may be old; empty if it is not."""
        if self._thread and not self._thread.is_alive() and not self._ended.is_set():
            return "nothing is read any more: start the page again"
        if self._failure:
            return f"reading failed: {self._failure}"
        late = self._doing and time.monotonic() - self._since > _PATIENCE
        return (
            f"{self._doing} takes more than {_PATIENCE:.0f} s to read; the others wait"
            if late
            else ""
        )

    def refresh(self) -> None:
        """Look at every run once."""
        if time.monotonic() - self._searched >= _SEARCH_INTERVAL or not self.runs:
            self._search()
        # Those that train come first.
        runs = sorted(self.runs.values(), key=lambda run: run.last_sign, reverse=True)
        self._unread = sum(run.version == 0 for run in runs)
        for run in runs:
            if self._ended.is_set():
                return
            self._unread -= run.version == 0
            self._begin(run.name)
            self._look(run)
        self._begin("")

    def _watch(self) -> None:
        while not self._ended.is_set():
            try:
                self.refresh()
                self._failure = ""
            except Exception as error:  # said on the page, and tried again
                self._failure = f"{type(error).__name__}: {printable(error)}"
            self._ended.wait(INTERVAL)

    def _begin(self, doing: str) -> None:
        self._doing, self._since = doing, time.monotonic()

    def _search(self) -> None:
        self._searched = time.monotonic()
        self._begin("the search for runs")
        try:
            paths = find_runs([self.root])
        except UserError:  # none yet
            paths = []
        names = {self._name(path): path for path in paths}
        if names.keys() == self.runs.keys():
            return
        self.runs = {
            name: self.runs.get(name) or LiveRun(path, name) for name, path in names.items()
        }
        self.table = {name: row for name, row in self.table.items() if name in names}
        self.version += 1

    def _name(self, path: Path) -> str:
        name = printable(path.relative_to(self.root).as_posix())
        return printable(self.root.resolve().name) if name == "." else name

    def _look(self, run: LiveRun) -> None:
        """Read what is new of a run and describe it."""
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                run.poll()
                row = _row(run)
        except Exception as error:  # whatever its files hold
            row = _UNKNOWN | {"id": run.name, "why": f"{type(error).__name__}: {printable(error)}"}
        if self.table.get(run.name) != row:
            self.table[run.name] = row
            self.version += 1


_UNKNOWN = {"task": "–", "algorithm": "–", "seeds": 0, "state": "failed", "steps": 0, "budget": 0}
_UNKNOWN |= {"mean": None, "returns": "–", "speed": None, "last": 0}


def _row(run: LiveRun) -> dict[str, Any]:
    """Describe a run as a row of the table."""
    state, returns = run.state(), run.returns
    mean = float(np.nanmean(returns)) if np.isfinite(returns).any() else math.nan
    return {
        "id": run.name,
        "task": run.config.env if run.config else "–",
        "algorithm": run.config.algorithm if run.config else "–",
        "seeds": run.num_seeds,
        "state": state.name,
        "why": printable(state.why),
        "steps": run.metrics.step_count,
        "budget": float(run.budget),  # which may have more than 64 bits
        "mean": float(f"{mean:.6g}") if math.isfinite(mean) else None,
        "returns": mean_and_spread(returns) if len(returns) else "–",
        "speed": float(f"{run.speed:.3g}") if math.isfinite(run.speed) else None,
        "last": round(run.last_sign),
    }
