"""Experiment trackers as sinks: Weights & Biases, MLflow and Trackio.

A run folder is one run there, which a resumed run continues: `trackers.json` in the folder keeps
its identity. Tags are `<kind>/<metric>`: the mean over seeds and, of several, each seed's own below
it, against environment steps. Where numbers go (a server, a local store) is what each package's
environment variables say.
"""

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, final
from uuid import uuid4

import numpy as np

from mam.config import Config, flat, to_json
from mam.errors import RunError
from mam.runs.files import read_object
from mam.runs.sinks import Record, seed_means, write_atomically

IDENTITIES = "trackers.json"
PROJECT = "mam"  # unless the environment names another


class Tracker(ABC):
    """One run of a tracker. If it fails while the run goes on, that is said once.

    Args:
        folder: of the run.
        config: of the run.
        resumed: whether the run goes on, in the same place if it had one.
    """

    name: str  # of the sink

    def __init__(self, folder: Path, config: Config, *, resumed: bool):
        path = folder / IDENTITIES
        known = read_object(path) if path.exists() else {}
        before = known.get(self.name) if resumed else None
        self._seeds = range(config.seed, config.seed + config.num_seeds)
        self._failed = False
        settings = flat(to_json(config)) | {"commit": read_object(folder / "versions.json")["git"]}
        try:
            identity = self._open(f"{folder.parent.name}/{folder.name}", before, settings, folder)
        except Exception as error:
            raise RunError(f"{self.name} cannot be opened: {_line(error)}") from error
        write_atomically(path, json.dumps(known | {self.name: identity}))

    @abstractmethod
    def _open(
        self, title: str, identity: str | None, settings: dict[str, Any], folder: Path
    ) -> str:
        """Begin a run, or continue one, and return its identity.

        Args:
            title: what it is to be called.
            identity: of the run to continue; None for a new one.
            settings: of the run, by dotted name, with the commit.
            folder: of the run.
        """

    @abstractmethod
    def _log(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers at a number of environment steps."""

    @abstractmethod
    def _show(self, tag: str, picture: Path, step: int) -> None:
        """Take a GIF at a number of environment steps."""

    @abstractmethod
    def _close(self) -> None:
        """End the run there."""

    @final
    def write(self, record: Record) -> None:
        """Hand the record's numbers on."""
        values = {}
        for name, value in record.values.items():
            means = seed_means(value, name)
            values[f"{record.kind}/{name}"] = means.mean()
            if len(means) > 1:
                for seed, mean in zip(self._seeds, means, strict=True):
                    values[f"{record.kind}/{name}/seed_{seed}"] = mean
        finite = {name: float(value) for name, value in values.items() if np.isfinite(value)}
        self._try(lambda: self._log(finite, record.step_count))

    @final
    def show(self, picture: Path, step: int) -> None:
        """Hand an episode's GIF on, under the name of its file.

        Args:
            picture: the GIF.
            step: environment steps that what played it had been trained for.
        """
        self._try(lambda: self._show(picture.stem, picture, step))

    @final
    def close(self) -> None:
        """End the run there."""
        self._try(self._close)

    def _try(self, act: Any) -> None:
        try:
            act()
        except Exception as error:
            if not self._failed:
                line = f"{self.name} failed, and the run goes on without it: {_line(error)}"
                print(line, file=sys.stderr)
            self._failed = True


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class WandB(Tracker):
    """Weights & Biases; WANDB_MODE=offline keeps everything in the run's folder."""

    name = "wandb"

    def _open(
        self, title: str, identity: str | None, settings: dict[str, Any], folder: Path
    ) -> str:
        wandb: Any = import_module("wandb")
        identity = identity or uuid4().hex[:8]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=folder,
            id=identity,
            name=title,
            resume="allow",
            config=settings,
            reinit="create_new",
            settings=wandb.Settings(silent=True),
        )
        # Steps of a resumed run begin before where it was killed: no counter that only grows.
        self._run.define_metric("*", step_metric="step_count")
        return identity

    def _log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({"step_count": step, **values})

    def _show(self, tag: str, picture: Path, step: int) -> None:
        wandb: Any = import_module("wandb")
        self._run.log({"step_count": step, tag: wandb.Video(str(picture), format="gif")})

    def _close(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    """MLflow; without MLFLOW_TRACKING_URI the store is mlflow.db where the command runs."""

    name = "mlflow"

    def _open(
        self, title: str, identity: str | None, settings: dict[str, Any], folder: Path
    ) -> str:
        mlflow: Any = import_module("mlflow")
        self._entities: Any = import_module("mlflow.entities")
        self._client = mlflow.MlflowClient()
        if identity:
            self._client.update_run(identity, status="RUNNING")
            self._identity = identity
            return identity
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        tags = {"mlflow.source.git.commit": str(settings["commit"])}
        run = self._client.create_run(experiment, run_name=title, tags=tags)
        self._identity = run.info.run_id
        params = [self._entities.Param(key, str(value)) for key, value in settings.items()]
        self._send("params", params)
        return self._identity

    def _log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._send("metrics", metrics)

    def _show(self, tag: str, picture: Path, step: int) -> None:
        self._client.log_artifact(self._identity, str(picture), f"{tag}/{step}")

    def _send(self, kind: str, items: list[Any]) -> None:
        for first in range(0, len(items), _BATCH):
            self._client.log_batch(self._identity, **{kind: items[first : first + _BATCH]})

    def _close(self) -> None:
        self._client.set_terminated(self._identity)


_BATCH = 100  # parameters, or metrics, that MLflow takes at once


class Trackio(Tracker):
    """Trackio, whose store is in TRACKIO_DIR, in the cache folder without."""

    name = "trackio"

    def _open(
        self, title: str, identity: str | None, settings: dict[str, Any], folder: Path
    ) -> str:
        trackio: Any = import_module("trackio")
        identity = identity or f"{title.replace('/', '-')}-{uuid4().hex[:8]}"
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=identity,
            config=settings,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return identity

    def _log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def _show(self, tag: str, picture: Path, step: int) -> None:
        trackio: Any = import_module("trackio")
        self._run.log({tag: trackio.Video(str(picture), format="gif")}, step=step)

    def _close(self) -> None:
        self._run.finish()
