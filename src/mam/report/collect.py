"""Finding runs and reading them, seed by seed."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mam.config import Config, flat, from_json, to_json
from mam.errors import UserError
from mam.logging import RETURN, Record, read_records, seed_means, training_speed
from mam.report.single import evaluation_returns


@dataclass(frozen=True)
class Run:
    """One run folder."""

    path: Path
    config: Config
    step_count: int  # environment steps done, per seed
    finished: bool
    seconds: float  # wall-clock, compiling and evaluations included
    steps_per_second: float  # environment steps of all seeds together, while training; NaN if unknown
    device: str
    commit: str  # of the source it ran with; `-dirty` if that was changed

    @property
    def budget(self) -> int:
        """Environment steps per seed that were asked for, in whole updates."""
        return self.config.num_updates * self.config.steps_per_update


@dataclass(frozen=True)
class SeedRun:
    """What one seed of a run gave."""

    task: str
    algorithm: str
    seed: int
    steps: Int[np.ndarray, "evaluations"]
    returns: Float[np.ndarray, "evaluations"]  # mean return of each evaluation
    absolute: dict[str, float]  # the absolute metric and its companions, means over episodes; empty if unfinished
    run: Run

    @property
    def name(self) -> str:
        """Task, algorithm and seed, which make a run unique."""
        return f"{self.algorithm} on {self.task}, seed {self.seed}"


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders among and below some folders, each once, in alphabetical order.

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
        raise UserError(f"no runs in {', '.join(map(str, paths))}: a run is a folder with a config.json")
    return sorted(found)


def read_run(path: Path, by: Sequence[str] = ()) -> list[SeedRun]:
    """The seeds of a run, finished or not; settings named in `by` are part of its algorithm's name.

    Raises:
        UserError: if the configuration or the metrics cannot be read.
    """
    try:
        config = from_json(Config, json.loads((path / "config.json").read_text(encoding="utf-8")))
        records = read_records(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else []
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    run = _describe(path, config, records)
    steps, returns = evaluation_returns(records)
    absolute = {name: seed_means(value) for name, value in records[-1].values.items()} if run.finished else {}
    settings = flat(to_json(config))
    algorithm = " ".join([config.algorithm, *(f"{key.rpartition('.')[2]}={settings[key]}" for key in by)])
    return [
        SeedRun(
            task=config.env,
            algorithm=algorithm,
            seed=config.seed + index,
            steps=steps,
            returns=returns[:, index] if len(steps) else np.empty(0),
            absolute={name: float(values[index]) for name, values in absolute.items()},
            run=run,
        )
        for index in range(config.num_seeds)
    ]


def _describe(path: Path, config: Config, records: Sequence[Record]) -> Run:
    total = config.num_updates * config.steps_per_update
    last = records[-1] if records else None
    versions = _versions(path)
    return Run(
        path=path,
        config=config,
        step_count=last.step_count if last else 0,
        finished=last is not None and last.kind == "absolute" and last.step_count >= total and RETURN in last.values,
        seconds=last.elapsed if last else 0.0,
        steps_per_second=training_speed(records) * config.num_seeds,
        device=versions.get("device", "unknown"),
        commit=str(versions.get("git") or "unknown"),
    )


def _versions(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "versions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
