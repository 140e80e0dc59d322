"""A run on the host: a folder, a loop over compiled steps, and a stop that loses nothing.

RUN/config.json        what was run           RUN/metrics.jsonl       every number it reported
RUN/versions.json      with what              RUN/tensorboard/        the same for TensorBoard
RUN/checkpoint/        the whole train state  RUN/marl_eval.json      the same for marl-eval
                                              RUN/learning_curve.png  the same to look at
"""

import json
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mam import checkpoint
from mam.config import Config, from_json, to_json
from mam.errors import UserError
from mam.logging import JsonLines, Progress, Record, Sink, TensorBoard, read_records, write_atomically
from mam.report import plot_learning_curve, write_marl_eval
from mam.train import Trainer, TrainState, Values, make_train

CHECKPOINT_SECONDS = 300.0  # a running run is saved this often, besides at its end and when it is stopped


@dataclass(frozen=True)
class RunFolder:
    """Names of what a run leaves behind."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def learning_curve(self) -> Path:
        return self.path / "learning_curve.png"

    def load_config(self) -> Config:
        """The configuration of the run.

        Raises:
            UserError: if the folder holds no run, or one of an incompatible version.
        """
        if not self.config.is_file():
            raise UserError(f"{self.path} holds no run: there is no config.json in it")
        try:
            return from_json(Config, json.loads(self.config.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise UserError(f"{self.config} is damaged: {error}") from error

    def load_state(self, config: Config, trainer: Trainer) -> TrainState:
        """The saved train state, one leading axis of seeds."""
        like = jax.eval_shape(trainer.init, jnp.asarray(seeds_of(config)))
        return checkpoint.restore(self.checkpoint, like)

    def records(self) -> list[Record]:
        """Everything the run has reported."""
        return read_records(self.metrics)


def seeds_of(config: Config) -> list[int]:
    """The seeds of a run, in the order of every leading axis."""
    return list(range(config.seed, config.seed + config.num_seeds))


def start(config: Config, path: Path) -> tuple[RunFolder, Trainer]:
    """Checks the configuration and makes the folder of a new run; nothing is written if anything is wrong.

    Raises:
        UserError: for a task or policy that does not exist, or a folder that holds a run already.
    """
    folder = RunFolder(path)
    if folder.config.exists():
        raise UserError(f"{path} already holds a run: go on with `mam train --resume {path}`, or choose another --out")
    trainer = make_train(config)
    jax.eval_shape(trainer.init, jnp.asarray(seeds_of(config)))  # builds the networks, on paper
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.config, json.dumps(to_json(config), indent=2))
    write_atomically(path / "versions.json", json.dumps(versions(), indent=2))
    return folder, trainer


def resume(path: Path, config: Config) -> tuple[RunFolder, Trainer]:
    """Opens a run to go on with it, possibly for longer.

    Raises:
        UserError: if the configuration differs from the run's in anything but total_timesteps.
    """
    folder = RunFolder(path)
    saved = folder.load_config()
    differing = differences(replace(saved, total_timesteps=config.total_timesteps), config)
    if differing:
        raise UserError(f"{path} cannot go on with other settings: {'; '.join(differing)}")
    if config.total_timesteps < saved.total_timesteps:
        raise UserError(f"total_timesteps cannot shrink from {saved.total_timesteps} to {config.total_timesteps}")
    trainer = make_train(config)
    write_atomically(folder.config, json.dumps(to_json(config), indent=2))
    return folder, trainer


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Fields in which two configurations differ, as `ppo.lr was 0.0005, is 0.001`."""
    found = []
    for field in fields(old):
        before, now = getattr(old, field.name), getattr(new, field.name)
        if is_dataclass(before):
            found += differences(before, now, f"{prefix}{field.name}.")
        elif before != now:
            found.append(f"{prefix}{field.name} was {before}, is {now}")
    return found


def run(config: Config, folder: RunFolder, trainer: Trainer) -> bool:
    """Trains from where the folder's checkpoint stands (from scratch if there is none) to the end, or to a stop.

    Returns:
        Whether the run reached its end. If not, it was interrupted, is saved, and can be resumed.
    """
    seeds = seeds_of(config)
    done = checkpoint.read_meta(folder.checkpoint) if folder.checkpoint.exists() else None
    update = done["update"] if done else 0
    loop = _Loop(config, folder, begun=time.monotonic() - (done["elapsed"] if done else 0.0), update=update)
    total = config.num_updates * config.steps_per_update
    with ExitStack() as stack:
        stack.callback(trainer.close)
        progress = stack.enter_context(
            Progress(total, num_seeds=config.num_seeds, step_count=update * config.steps_per_update)
        )
        stopping = stack.enter_context(_stop_on_signals(progress.log))
        with progress.compiling("the update and the evaluation"):
            state = folder.load_state(config, trainer) if done else trainer.init(jnp.asarray(seeds))
            trainer = trainer.compile(state)
        loop.sinks = [
            JsonLines(folder.metrics, append_after_update=update if done else None),
            TensorBoard(folder.path / "tensorboard", seeds, append_after_step=loop.step_count if done else None),
            progress,
        ]
        for sink in loop.sinks:
            stack.callback(sink.close)
        while loop.update < config.num_updates and not stopping():
            state, values = trainer.train_step(state)
            loop.update += 1
            loop.write("train", values)
            if config.evaluate_after(loop.update):
                state, values = trainer.evaluate_step(state)
                loop.write("evaluation", values)
            if time.monotonic() - loop.saved > CHECKPOINT_SECONDS:
                loop.save(state)
        finished = loop.update >= config.num_updates
        loop.save(state)
        if finished:
            progress.log(f"playing {config.eval.num_absolute_episodes} fresh episodes with the best weights…")
            loop.write("absolute", trainer.absolute_metric(state))
    _write_results(config, folder)
    return finished


@dataclass
class _Loop:
    """Where the loop stands, and where its numbers go."""

    config: Config
    folder: RunFolder
    begun: float  # on the monotonic clock, as if the run had never been interrupted
    update: int
    sinks: Sequence[Sink] = ()
    saved: float = 0.0

    def __post_init__(self):
        self.saved = time.monotonic()

    @property
    def step_count(self) -> int:
        return self.update * self.config.steps_per_update

    def write(self, kind: Any, values: Values) -> None:
        numbers = {name: np.asarray(value) for name, value in jax.device_get(values).items()}
        record = Record(kind, self.update, self.step_count, time.monotonic() - self.begun, numbers)
        for sink in self.sinks:
            sink.write(record)

    def save(self, state: TrainState) -> None:
        meta = {"update": self.update, "step_count": self.step_count, "elapsed": time.monotonic() - self.begun}
        checkpoint.save(self.folder.checkpoint, state, meta)
        self.saved = time.monotonic()


def _write_results(config: Config, folder: RunFolder) -> None:
    """Everything derived from the metrics, made anew from the whole file."""
    records, seeds = folder.records(), seeds_of(config)
    suite, slash, task = config.env.partition("/")
    if not slash:  # package.module:factory
        suite, task = "own", config.env
    write_marl_eval(folder.path, records, env=suite, task=task, algorithm=config.algorithm, seeds=seeds)
    if any(record.kind == "evaluation" for record in records):
        plot_learning_curve(folder.learning_curve, records, title=f"{config.algorithm} on {config.env}", seeds=seeds)


@contextmanager
def _stop_on_signals(log: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a question to ask between two updates; a second Ctrl-C interrupts at once."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        log("stopping after this update; press Ctrl-C again to stop at once and lose what is not saved")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def versions() -> dict[str, Any]:
    """What the run's numbers depend on besides its configuration."""
    packages = ("mam", "jax", "jaxlib", "equinox", "optax", "orbax-checkpoint", "numpy", "jumanji", "jaxmarl")
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "packages": found,
        "git": _git_sha(),
        "device": f"{device.platform}: {device.device_kind}",
        "platform": platform.platform(),
    }


def _git_sha() -> str | None:
    """The commit of the source in use, `-dirty` if it was changed since; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
