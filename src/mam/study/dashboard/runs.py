"""A run as the live view sees it: what it is, how far it has got, and whether it is still going."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mam.config import Config, flat, to_json
from mam.errors import UserError
from mam.runs.files import open_regular, read_config, read_object
from mam.runs.sinks import RETURN, median_speed
from mam.runs.times import read_times, shares
from mam.study.dashboard.reading import Metrics, Reader

_RECENT = 100  # updates whose median speed is shown
_PATIENCE = 10.0  # times the longest silence so far, after which a run counts as stopped
_LEAST_PATIENCE, _FIRST_PATIENCE = 60.0, 900.0  # seconds: at any time, and while compiling
_TAIL_BYTES = 16384
_HEADLINE = "· results in "  # what `mam train` begins with


@dataclass(frozen=True)
class State:
    """Whether a run goes on."""

    name: str  # running, finished, stopped or failed
    why: str = ""  # how one can tell


class LiveRun:
    """One run folder, read again and again.

    Args:
        path: the folder.
        name: what to call it.

    Attributes:
        config: None if it cannot be read; `problem` then says why.
        speed: environment steps per second of all seeds over the last updates; NaN before the
            second one.
        version: grows with every change.
    """

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self.config: Config | None = None
        self.problem, self.version, self.speed = "", 0, float("nan")
        self._reader, self._config_time = Reader(path / "metrics.jsonl"), 0.0

    @property
    def metrics(self) -> Metrics:
        """All numbers so far."""
        return self._reader.metrics

    @property
    def budget(self) -> int:
        """Environment steps per seed that were asked for, in whole updates."""
        return self.config.num_updates * self.config.steps_per_update if self.config else 0

    @property
    def num_seeds(self) -> int:
        """Seeds trained side by side."""
        return self.config.num_seeds if self.config else 0

    @property
    def returns(self) -> Float[np.ndarray, "seeds"]:
        """Each seed's mean return in the last evaluation or absolute metric; may be empty."""
        columns = (
            self.metrics.absolute
            if self.metrics.last_kind == "absolute"
            else self.metrics.evaluation
        )
        values = columns.last(RETURN)
        return np.empty(0) if values is None else values

    @property
    def last_sign(self) -> float:
        """The time at which it last wrote a row, or began; seconds since 1970."""
        return max(changed(self.path / "metrics.jsonl"), self._config_time)

    def poll(self) -> bool:
        """Read what is new; say whether there was anything."""
        anything = self._read_config()
        anything |= self._reader.poll()
        if anything:
            self.speed = self.median_speed(_RECENT)
            self.version += 1
        return anything

    def _read_config(self) -> bool:
        path = self.path / "config.json"
        if (written := changed(path)) in (0.0, self._config_time):
            return False
        self._config_time = written
        try:
            self.config, self.problem = read_config(path), ""
        except UserError as error:
            self.config, self.problem = None, str(error)
        return True

    def median_speed(self, recent: int | None = None) -> float:
        """Return the median speed of recent updates, or of all, while training.

        In environment steps per second of all seeds; NaN before the second update. Neither
        compiling nor evaluating moves a median.
        """
        kinds = [columns.rows(()) for columns in (self.metrics.train, self.metrics.evaluation)]
        steps, elapsed = (
            np.concatenate([getattr(rows, name) for rows in kinds]) for name in ("steps", "elapsed")
        )
        last = np.argsort(elapsed, kind="stable")[-(recent or 0) :]
        return median_speed(steps[last], elapsed[last]) * self.num_seeds

    def state(self, now: float | None = None) -> State:
        """Say whether it goes on, as far as its files tell: its process may be on another machine.

        Finished is the absolute metric at the end of the budget. Failed is an error as the last
        thing it printed. Stopped is a run that has written its results before the end, or was
        silent for ten times as long as ever.

        Args:
            now: seconds since 1970; the clock's if None.
        """
        metrics, now = self.metrics, time.time() if now is None else now
        if self.problem:
            return State("failed", self.problem)
        if metrics.last_kind == "absolute" and metrics.step_count >= self.budget:
            return State("finished")
        if error := self._error():
            return State("failed", error)
        if changed(self.path / "marl_eval.json") >= self.last_sign:
            return State("stopped", "saved itself and ended")
        patience = (
            max(_PATIENCE * metrics.longest_gap, _LEAST_PATIENCE)
            if metrics.last_kind
            else _FIRST_PATIENCE
        )
        if now - self.last_sign > patience:
            return State("stopped", f"has written nothing for more than {patience:.0f} s")
        return State("running")

    def _error(self) -> str:
        """Return the error that ends its output, if newer than everything else; empty if none."""
        log = self.path / "output.log"
        if changed(log) < self.last_sign:
            return ""
        text = tail(log)
        start = text.rfind(_HEADLINE)  # of the last of several attempts
        lines = text[start + 1 :].strip().splitlines()
        failed = lines and (
            lines[-1].startswith("mam: ") or any(line.startswith("Traceback (") for line in lines)
        )
        return lines[-1].strip() if failed else ""

    def versions(self) -> dict[str, Any]:
        """Read what it ran with: flat, such as packages.jax; empty if unknown."""
        try:
            return flat(read_object(self.path / "versions.json"))
        except UserError:
            return {}

    def times(self) -> str:
        """Say where its wall-clock time went, in shares, as far as that is known."""
        return shares(read_times(self.path / "times.json"))

    def settings(self) -> dict[str, Any]:
        """Return its configuration, flat: ppo.lr and so on."""
        return flat(to_json(self.config)) if self.config else {}


def differing(of_runs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Find the keys in which dictionaries differ, with the value of each; None if it is missing."""
    names = dict.fromkeys(name for one in of_runs for name in one)
    rows = {name: [one.get(name) for one in of_runs] for name in names}
    return {
        name: values for name, values in rows.items() if any(value != values[0] for value in values)
    }


def tail(path: Path, size: int = _TAIL_BYTES) -> str:
    """Read the end of a text file, from the beginning of a line; empty if it cannot be read."""
    try:
        with open_regular(path) as file:
            length = file.seek(0, 2)
            file.seek(max(length - size, 0))
            text = file.read(size)
    except OSError:
        return ""
    if length > size:
        text = text[text.find(b"\n") + 1 :]
    return text.decode("utf-8", errors="replace")


def changed(path: Path) -> float:
    """Return when a file was written, in seconds since 1970; 0 if there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
