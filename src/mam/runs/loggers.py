"""Sinks by name: what `--log` may say.

A new sink is something with `write` and `close`, and a row of `SINKS`, or an entry point of a
package of one's own.
"""

import csv
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mam.config import Config
from mam.errors import load_entry_point, missing_extra, unknown_name
from mam.runs.sinks import JsonLines, Record, Sink, TensorBoard, read_records, seed_means
from mam.runs.trackers import MLflow, Tracker, Trackio, WandB

# Metadata of the save that a run goes on from: step_count, update, metrics_bytes, ….
Resume = Mapping[str, Any]
# Arguments: the run's folder, its configuration, and the save, or None for a new run.
OpenSink = Callable[[Path, Config, Resume | None], Sink]


class Csv:
    """A row per record, seed and metric: of an evaluation's episodes the mean.

    Args:
        path: the file, which is written anew.
        first_seed: of the run.
        before: what the run has reported so far.
    """

    _HEADER = ("kind", "update", "step_count", "elapsed", "seed", "metric", "value")

    def __init__(self, path: Path, first_seed: int, before: list[Record]):
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._first_seed = first_seed
        self._writer.writerow(self._HEADER)
        for record in before:
            self.write(record)

    def write(self, record: Record) -> None:
        """Append its rows and hand them to the operating system."""
        head = (record.kind, record.update, record.step_count, record.elapsed)
        for name, values in record.values.items():
            for seed, value in enumerate(seed_means(values, name), start=self._first_seed):
                shown = repr(float(value)) if np.isfinite(value) else ""
                self._writer.writerow((*head, seed, name, shown))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _open_jsonl(folder: Path, config: Config, resume: Resume | None) -> JsonLines:
    del config
    return JsonLines(
        folder / "metrics.jsonl", append_at=resume["metrics_bytes"] if resume else None
    )


def _open_tensorboard(folder: Path, config: Config, resume: Resume | None) -> TensorBoard:
    seeds = range(config.seed, config.seed + config.num_seeds)
    return TensorBoard(
        folder / "tensorboard", seeds, append_after_step=resume["step_count"] if resume else None
    )


def _open_csv(folder: Path, config: Config, resume: Resume | None) -> Csv:
    """Open after `jsonl`, which a resume cuts: what it has is what the run has reported."""
    before = read_records(folder / "metrics.jsonl") if resume else []
    return Csv(folder / "metrics.csv", config.seed, before)


def _open_tracker(
    kind: type[Tracker], folder: Path, config: Config, resume: Resume | None
) -> Tracker:
    return kind(folder, config, resumed=resume is not None)


_TRACKERS = {kind.name: kind for kind in (WandB, MLflow, Trackio)}
SINKS: dict[str, OpenSink] = {
    "jsonl": _open_jsonl,
    "tensorboard": _open_tensorboard,
    "csv": _open_csv,
    **{name: partial(_open_tracker, kind) for name, kind in _TRACKERS.items()},
}
GROUP = "mam.sinks"  # of entry points, by which other packages add theirs


def find_sink(name: str) -> OpenSink:
    """Return what opens a sink: a row of `SINKS`, or an entry point of an installed package.

    Raises:
        UserError: if there is none of this name, or it cannot be imported.
    """
    if name in _TRACKERS:
        _require(name)
    if name in SINKS:
        return SINKS[name]
    installed = entry_points(group=GROUP)
    if name not in installed.names:
        raise unknown_name("sink", name, [*SINKS, *sorted(installed.names)], see="mam train --help")
    return load_entry_point("sink", installed[name])


def find_tracker(name: str) -> type[Tracker]:
    """Return a sink that takes pictures, too.

    Raises:
        UserError: if there is none of this name, or its package is missing.
    """
    if name not in _TRACKERS:
        raise unknown_name("tracker", name, _TRACKERS, see="mam play --help")
    _require(name)
    return _TRACKERS[name]


def _require(name: str) -> None:
    if find_spec(name) is None:
        raise missing_extra(f"--log {name}", name, name)
