"""Finding runs and reading them, seed by seed."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mam.config import Config, flat, to_json
from mam.errors import UserError
from mam.runs.files import read_config, read_object
from mam.runs.sinks import RETURN, Record, read_records, seed_means, training_speed
from mam.runs.summary import evaluation_returns

# Settings that are said elsewhere in a report, or change no numbers.
NO_SETTINGS = (
    "env",
    "policy",
    "seed",
    "num_seeds",
    "checkpoint.",
    "worker.",
    "log",
    "num_workers",
    "num_devices",
)
_HOW_LONG = ("total_timesteps", "eval.")  # how long runs learn and are evaluated, not how


@dataclass(frozen=True)
class Run:
    """One run folder."""

    path: Path
    config: Config
    step_count: int  # environment steps done, per seed
    finished: bool
    seconds: float  # wall-clock, compiling and evaluations included
    steps_per_second: float  # environment steps of all seeds, while training; NaN if unknown
    device: str
    commit: str  # of the source it ran with; `-dirty` if that was changed

    @property
    def budget(self) -> int:
        """Environment steps per seed that were asked for, in whole updates."""
        return self.config.num_updates * self.config.steps_per_update


@dataclass(frozen=True)
class SeedRun:
    """The results of one seed of a run."""

    task: str
    algorithm: str
    seed: int
    steps: Int[np.ndarray, "evaluations"]
    minutes: Float[np.ndarray, "evaluations"]  # of wall-clock, of the whole run
    returns: Float[np.ndarray, "evaluations"]  # mean return of each evaluation
    # The absolute metric and its companions, means over episodes; empty if unfinished.
    absolute: dict[str, float]
    run: Run

    @property
    def name(self) -> str:
        """Task, algorithm and seed, which make a run unique."""
        return f"{self.algorithm} on {self.task}, seed {self.seed}"


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Find the run folders among and below some folders, each once, in alphabetical order.

    Raises:
        UserError: if a folder does not exist, or none of them holds a run.
    """
    paths, found = list(paths), set[Path]()
    if not paths:
        raise UserError("report needs folders of runs: mam report RUNS…")
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist")
        for folder, below, files in os.walk(path):
            if "config.json" in files:
                found.add(Path(folder))
                below.clear()  # a run holds no runs
    if not found:
        raise UserError(
            f"no runs in {', '.join(map(str, paths))}: a run is a folder with a config.json"
        )
    return sorted(found)


def read_run(path: Path, by: Sequence[str] = ()) -> list[SeedRun]:
    """Read the seeds of a run, finished or not; settings in `by` are part of its algorithm's name.

    Raises:
        UserError: if the configuration or the metrics cannot be read.
    """
    config = read_config(path / "config.json")
    try:
        records = read_records(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else []
        _check(records, config.num_seeds)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    run = _describe(path, config, records)
    steps, returns = evaluation_returns(records)
    absolute = (
        {name: seed_means(value, name) for name, value in records[-1].values.items()}
        if run.finished
        else {}
    )
    minutes = np.array([one.elapsed / 60 for one in records if one.kind == "evaluation"], float)
    algorithm = algorithm_of(config, by)
    return [
        SeedRun(
            task=config.env,
            algorithm=algorithm,
            seed=config.seed + index,
            steps=steps,
            minutes=minutes,
            returns=returns[:, index] if len(steps) else np.empty(0),
            absolute={name: float(values[index]) for name, values in absolute.items()},
            run=run,
        )
        for index in range(config.num_seeds)
    ]


def _check(records: Sequence[Record], num_seeds: int) -> None:
    """Refuse records that no single run can have written.

    Raises:
        ValueError: naming the first one that does not fit.
    """
    updates: dict[str, int] = {}
    for number, record in enumerate(records, start=1):
        clock = {
            "update": record.update,
            "step_count": record.step_count,
            "elapsed": record.elapsed,
        }
        broken = [name for name, value in clock.items() if type(value) not in (int, float)]
        broken += [
            name
            for name, values in record.values.items()
            if values.dtype.kind not in "biuf"
            or values.shape[:1] != (num_seeds,)
            or not values.size
        ]
        if broken:
            raise ValueError(
                f"{broken[0]} in row {number} of metrics.jsonl is no number per seed ({num_seeds})"
            )
        before = updates.get(record.kind, -1)
        if record.update < before or (record.update == before and record.kind != "absolute"):
            raise ValueError(
                f"row {number} of metrics.jsonl is of update {record.update}, "
                f"after one of update {before}: two processes have written it"
            )
        updates[record.kind] = record.update


def algorithm_of(config: Config, by: Sequence[str] = ()) -> str:
    """Name the algorithm, with the values of some settings."""
    settings = flat(to_json(config)) if by else {}
    return " ".join(
        [config.algorithm, *(f"{key.rpartition('.')[2]}={settings[key]}" for key in by)]
    )


def unlike(configs: Iterable[Config]) -> list[str]:
    """List the settings in which configurations differ that decide what is learned."""
    flats = [flat(to_json(config)) for config in set(configs)]
    return [
        key
        for key in flats[0]
        if not key.startswith((*NO_SETTINGS, *_HOW_LONG))
        and len({str(one[key]) for one in flats}) > 1
    ]


def _describe(path: Path, config: Config, records: Sequence[Record]) -> Run:
    total = config.num_updates * config.steps_per_update
    last = records[-1] if records else None
    versions = read_versions(path)
    return Run(
        path=path,
        config=config,
        step_count=last.step_count if last else 0,
        finished=last is not None
        and last.kind == "absolute"
        and last.step_count >= total
        and RETURN in last.values,
        seconds=last.elapsed if last else 0.0,
        steps_per_second=training_speed(records) * config.num_seeds,
        device=str(versions.get("device") or "unknown"),
        commit=str(versions.get("git") or "unknown"),
    )


def read_versions(path: Path) -> dict[str, Any]:
    """Read what a run ran with; nothing where that cannot be read."""
    try:
        return read_object(path / "versions.json")
    except UserError:
        return {}
