"""Reading the metrics of a run that is being written, line by line."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mam.runs.files import TAIL, goes_on
from mam.runs.sinks import RETURN, median_speed


class Follower:
    """A run's progress, read from its metrics.jsonl.

    Attributes:
        step_count: environment steps done, per seed.
        returns: each seed's mean return in the last evaluation, or as the absolute metric; empty
            before the first.
        speed: environment steps per second and seed, `median_speed` of the last records; NaN at
            first.
    """

    def __init__(self, path: Path):
        self._path = path
        self._begin()

    def _begin(self) -> None:
        self._offset, self._tail, self._kind = 0, b"", ""
        self._times: list[tuple[int, float]] = []  # steps and seconds at the last records
        self.step_count, self.returns, self.speed = 0, np.empty(0), float("nan")

    def poll(self) -> list[dict[str, Any]]:
        """Read the whole lines written since the last call; a file cut by a resume is read anew.

        A damaged line is passed over: whoever reads the run's results says so.
        """
        try:
            with self._path.open("rb") as file:
                if not goes_on(file, self._offset, self._tail):
                    self._begin()
                    file.seek(0)
                text = file.read()
        except FileNotFoundError:
            return []
        text = text[: text.rfind(b"\n") + 1]
        self._offset += len(text)
        self._tail = (self._tail + text)[-TAIL:]
        return [row for line in text.splitlines() if (row := self._taken(line))]

    def _taken(self, line: bytes) -> dict[str, Any] | None:
        try:
            row = json.loads(line)
            self._take(row)
        except (ValueError, TypeError, KeyError):
            return None
        return row

    def _take(self, row: dict[str, Any]) -> None:
        self._kind, self.step_count = row["kind"], row["step_count"]
        self._times = [*self._times[-99:], (self.step_count, row["elapsed"])]
        self.speed = median_speed(*zip(*self._times, strict=True))
        if self._kind != "train" and RETURN in row:
            self.returns = seed_returns(row)

    def finished(self, budget: int) -> bool:
        """Say whether the last row is the absolute metric, with all steps done."""
        return self._kind == "absolute" and self.step_count >= budget


def seed_returns(row: dict[str, Any]) -> np.ndarray:
    """Return each seed's mean return in an evaluation's row; NaN where an episode had none."""
    episodes = [
        [float("nan") if value is None else value for value in np.atleast_1d(seed)]
        for seed in row[RETURN]
    ]
    return np.array([np.mean(values) for values in episodes], float)
