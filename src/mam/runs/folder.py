"""The folder of a run: its files, its saves, and what a resumed run may change."""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mam.config import Config, from_json
from mam.errors import UserError
from mam.learning.train import Trainer, TrainState
from mam.runs.checkpoint import Save, newest
from mam.runs.files import read_config
from mam.runs.lock import Lock
from mam.runs.sinks import Record, read_records
from mam.runs.times import are_times

LOCK_FILE = "run.lock"  # held while a run is trained; see mam.runs.lock
# Settings that a resumed run may change.
FREE = (
    "total_timesteps",
    "num_devices",
    "num_workers",
    "worker",
    "checkpoint",
    "log",
)


@dataclass(frozen=True)
class RunFolder:
    """Names of what a run leaves behind."""

    path: Path
    held: Lock | None = field(default=None, compare=False)  # while training; readers need none

    @property
    def lock(self) -> Path:
        return self.path / LOCK_FILE

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def teacher(self) -> Path:
        return self.path / "teacher.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def times(self) -> Path:
        return self.path / "times.json"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def learning_curve(self) -> Path:
        return self.path / "learning_curve.png"

    def load_config(self) -> Config:
        """Read the configuration of the run.

        Raises:
            UserError: if the folder holds no run, or one of an incompatible version.
        """
        return read_config(self.config)

    def load_state(self, config: Config, trainer: Trainer) -> TrainState:
        """Read the newest train state that is intact, one leading axis of seeds.

        Args:
            config: of the run.
            trainer: of the run; says the shapes.
        """
        return restore(self.newest_save(config), trainer.shapes(np.asarray(seeds_of(config))))

    def newest_save(self, config: Config) -> Save:
        """Open the newest save that is intact.

        Raises:
            UserError: if it is of a run with another configuration: config.json was edited, or the
                save is another's.
            CheckpointError: if there is none.
        """
        save = newest(self.checkpoint, valid=_is_position, warn=print)
        if "config" not in save.meta:  # of the first versions
            return save
        try:
            saved = from_json(Config, save.meta["config"])
        except UserError as error:
            raise UserError(
                f"the configuration in {save.path} is of another version: {error}"
            ) from error
        if unlike := differences(
            replace(saved, **{name: getattr(config, name) for name in FREE}), config
        ):
            raise UserError(
                f"{self.config} is not what {save.path} was trained with: {'; '.join(unlike)}; "
                "undo the change, or begin another run"
            )
        return save

    def records(self) -> list[Record]:
        """Read all that the run has reported."""
        return read_records(self.metrics)

    def release(self) -> None:
        """Let other processes train here; happens by itself when this one ends."""
        if self.held:
            self.held.close()


def restore(save: Save, shapes: TrainState) -> TrainState:
    """Read a train state.

    Earlier versions kept the best weights of one mode only, which then stand for both.

    Args:
        save: the save.
        shapes: of the state, and where its arrays lie.
    """
    if shapes.best_beside is None or any(
        name.startswith("state.best_beside") for name in save.leaves
    ):
        return save.restore(shapes)
    state = save.restore(eqx.tree_at(lambda s: s.best_beside, shapes, None))
    best = jax.tree.map(jnp.copy, state.best(beside=False))
    return eqx.tree_at(lambda s: s.best_beside, state, best, is_leaf=lambda x: x is None)


def seeds_of(config: Config) -> list[int]:
    """Return the seeds of a run, in the order of every leading axis."""
    return list(range(config.seed, config.seed + config.num_seeds))


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """List the fields in which two configurations differ, as `ppo.lr was 0.0005, is 0.001`.

    Args:
        old: a configuration, or a group of one.
        new: the other one.
        prefix: of the names of its fields.
    """
    found = []
    for setting in fields(old):
        before, now = getattr(old, setting.name), getattr(new, setting.name)
        if is_dataclass(before):
            found += differences(before, now, f"{prefix}{setting.name}.")
        elif before != now:
            found.append(f"{prefix}{setting.name} was {before}, is {now}")
    return found


def _is_position(meta: dict[str, Any]) -> bool:
    """Say whether metadata is what `_Loop.save` writes."""
    least = {"update": 0, "evaluated": -1, "step_count": 0, "metrics_bytes": 0}
    return (
        all(
            isinstance(count := meta.get(name), int) and count >= low for name, low in least.items()
        )
        and isinstance(meta.get("elapsed"), float)
        and all(isinstance(meta.get(name, {}), dict) for name in ("config", "spec"))
        and are_times(meta.get("times", {}))
    )
