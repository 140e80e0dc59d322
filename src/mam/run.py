"""A run on the host: a folder, a loop over compiled steps, and a stop that loses nothing.

RUN/config.json        what was run           RUN/metrics.jsonl       every number it reported
RUN/versions.json      with what              RUN/tensorboard/        the same for TensorBoard
RUN/checkpoint/        whole train states     RUN/marl_eval.json      the same for marl-eval
                                              RUN/learning_curve.png  the same to look at
"""

import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from mam.checkpoint import Save, Writer, has_saves, newest
from mam.config import Config, from_json, to_json
from mam.errors import RunError, UserError
from mam.evaluate import UNFINISHED
from mam.logging import JsonLines, Progress, Record, Sink, TensorBoard, read_records, write_atomically
from mam.plan import footprint, out_of_memory
from mam.report import plot_learning_curve, write_marl_eval
from mam.stop import GRACE, Stop, stop_on_signals
from mam.train import NON_FINITE, Trainer, TrainState, Values, make_train

Outcome = Literal["finished", "stopped", "preempted"]
FREE = ("total_timesteps", "num_devices", "num_workers", "worker", "checkpoint")  # settings a resumed run may change
MOST_SKIPPED = 10  # updates in a row with numbers that are not finite, before a run gives up


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
        """The newest train state that is intact, one leading axis of seeds."""
        return newest(self.checkpoint, warn=print).restore(trainer.shapes(np.asarray(seeds_of(config))))

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
    if folder.config.exists() and jax.process_index() == 0:
        raise UserError(f"{path} already holds a run: go on with `mam train --resume {path}`, or choose another --out")
    trainer = make_train(config)
    trainer.shapes(np.asarray(seeds_of(config)))  # builds the networks, on paper
    if jax.process_index() == 0:
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(folder.config, json.dumps(to_json(config), indent=2))
            write_atomically(path / "versions.json", json.dumps(versions(), indent=2))
    return folder, trainer


def resume(path: Path, config: Config) -> tuple[RunFolder, Trainer]:
    """Opens a run to go on with it, possibly for longer.

    Raises:
        UserError: if the configuration differs from the run's in anything but the settings that are FREE.
    """
    folder = RunFolder(path)
    saved = folder.load_config()
    differing = differences(replace(saved, **{name: getattr(config, name) for name in FREE}), config)
    if differing:
        raise UserError(f"{path} cannot go on with other settings: {'; '.join(differing)}")
    if config.total_timesteps < saved.total_timesteps:
        raise UserError(f"total_timesteps cannot shrink from {saved.total_timesteps} to {config.total_timesteps}")
    trainer = make_train(config)
    if jax.process_index() == 0:
        if not has_saves(folder.checkpoint):
            lost = ", and metrics.jsonl is written anew" if folder.metrics.exists() else ""
            print(f"{path} holds no checkpoint: the run starts again at step 0{lost}")
        with _writing(path):
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


def run(config: Config, folder: RunFolder, trainer: Trainer) -> Outcome:
    """Trains from where the folder's newest intact checkpoint stands, or from scratch, to the end or to a stop.

    Returns:
        How it ended: whoever was stopped is saved and can be resumed.

    Raises:
        RunError: if the run cannot go on: its files cannot be written, a number is not finite, memory is out.
    """
    seeds = np.asarray(seeds_of(config))
    save = newest(folder.checkpoint, warn=print) if has_saves(folder.checkpoint) else None
    with ExitStack() as stack:
        stack.callback(trainer.close)
        loop = _Loop(config, folder, save)
        total = config.num_updates * config.steps_per_update
        progress = stack.enter_context(Progress(total, num_seeds=config.num_seeds, step_count=loop.step_count))
        stop = stack.enter_context(stop_on_signals(progress.log, loop.last_words))
        stack.enter_context(out_of_memory(config))
        with progress.compiling("the update and the evaluation"):
            state = save.restore(trainer.shapes(seeds)) if save else trainer.init(seeds)
            trainer = trainer.compile(state)
        if line := footprint(trainer):
            progress.log(line)
        if save:
            progress.log(f"going on after update {loop.update} of {config.num_updates} ({loop.step_count:,} steps)")
        loop.open(stack, progress)
        while not loop.agreed(stop):
            begun = time.monotonic()
            if config.evaluate_after(loop.update) and loop.evaluated < loop.update:
                if not loop.has_saved:
                    loop.save(state)  # however long the first evaluation takes, what was learned before it is safe
                progress.evaluating(config.eval.num_episodes)
                state, values = loop.take(trainer.evaluate_step, state)
                loop.evaluated = loop.update
                loop.write("evaluation", values)
            elif loop.update < config.num_updates:
                state, values = loop.take(trainer.train_step, state)
                if not loop.healthy(trainer, state, values):
                    loop.save(state)
                    raise RunError(loop.diagnosis)
                loop.update += 1
                loop.write("train", values)
            else:
                break
            if loop.agreed_to_save(time.monotonic() - begun):
                loop.save(state)
        finished = loop.update >= config.num_updates and loop.evaluated >= loop.update
        loop.save(state)
        if finished:
            progress.log(f"playing {config.eval.num_absolute_episodes} fresh episodes with the best weights…")
            loop.write("absolute", loop.take(trainer.absolute_metric, state))
        loop.finish()
    if jax.process_index() == 0:
        with _writing(folder.path):
            _write_results(config, folder)
    return "finished" if finished else "preempted" if stop.preempted else "stopped"


class _Loop:
    """Where the loop stands, and where its numbers go."""

    def __init__(self, config: Config, folder: RunFolder, save: Save | None):
        meta = save.meta if save else {"update": 0, "evaluated": 0, "elapsed": 0.0}
        self.update, self.evaluated = meta["update"], meta["evaluated"]
        self.diagnosis = ""  # of what was not finite
        self._config, self._folder, self._resumed = config, folder, save
        self._begun = time.monotonic() - meta["elapsed"]  # as if the run had never been interrupted
        self._saved, self._saved_at = (self.update, self.evaluated) if save else None, time.monotonic()
        self._sinks: list[Sink] = []
        self._writer: Writer | None = None
        self._metrics: JsonLines | None = None  # in the process that writes them
        self._skipped = 0
        self._said_unfinished = False
        self._log: Callable[[str], None] = print

    @property
    def step_count(self) -> int:
        return self.update * self._config.steps_per_update

    @property
    def has_saved(self) -> bool:
        return self._saved is not None

    def open(self, stack: ExitStack, progress: Progress) -> None:
        """Opens the files, which `stack` closes."""
        self._log, meta = progress.log, self._resumed.meta if self._resumed else None
        with _writing(self._folder.path):
            self._writer = Writer(self._folder.checkpoint, keep=self._config.checkpoint.keep, after=self._resumed)
            stack.callback(_try, self._writer.close)
            if jax.process_index() > 0:
                return
            self._metrics = JsonLines(self._folder.metrics, append_at=meta["metrics_bytes"] if meta else None)
            tensorboard = TensorBoard(
                self._folder.path / "tensorboard",
                seeds_of(self._config),
                append_after_step=self.step_count if meta else None,
            )
        self._sinks = [self._metrics, tensorboard, progress]
        for sink in self._sinks:
            stack.callback(_try, sink.close)

    def take(self, step: Callable[[TrainState], Any], state: TrainState) -> Any:
        """Takes a step; if it fails, the state before it is saved.

        Raises:
            RunError: an environment failed.
        """
        try:
            return step(state)
        except Exception as error:
            if jax.process_count() == 1:  # several would have to save together, and only this one failed
                with suppress(Exception):  # of a state that was given away to the step nothing is left
                    self.save(state)
            if not isinstance(error, UserError):
                raise
            what, *traceback = str(error).split("\n")
            raise RunError("\n".join([f"{what}; {self.last_words()}", *traceback])) from error

    def write(self, kind: Any, values: Values) -> None:
        numbers = {name: np.asarray(value) for name, value in jax.device_get(values).items() if name != NON_FINITE}
        record = Record(kind, self.update, self.step_count, time.monotonic() - self._begun, numbers)
        with _writing(self._folder.path):
            for sink in self._sinks:
                sink.write(record)
        if not self._said_unfinished:
            self._say_unfinished(numbers)

    def _say_unfinished(self, values: Mapping[str, np.ndarray]) -> None:
        cut = np.concatenate([x.ravel() for name, x in values.items() if name.endswith(UNFINISHED)] or [np.zeros(0)])
        if cut.any():
            self._said_unfinished = True
            limit = self._config.eval.max_episode_steps
            self._log(
                f"{int(cut.sum())} of {cut.size} evaluated episodes had not ended after {limit:,} steps "
                "and count with what they had returned by then; --eval.max-episode-steps sets the limit"
            )

    def save(self, state: TrainState) -> None:
        """Begins a save, unless the state is that of the last one; at the end of the run, ends it."""
        stands, self._saved_at = (self.update, self.evaluated), time.monotonic()
        if self._saved == stands:
            return
        with _writing(self._folder.path):
            position = self._metrics.sync() if self._metrics else 0
            meta = {"update": self.update, "evaluated": self.evaluated, "step_count": self.step_count}
            meta |= {"elapsed": time.monotonic() - self._begun, "metrics_bytes": position}
            cast(Writer, self._writer).save(state, meta)
        self._saved = stands

    def healthy(self, trainer: Trainer, state: TrainState, values: Values) -> bool:
        """Whether to go on after a train step; says what was not finite in it."""
        bad = trainer.first_bad(state, values)
        self._skipped = self._skipped + 1 if bad else 0
        if not bad:
            return True
        first, seeds = next(iter(bad.values())), [seeds_of(self._config)[index] for index in bad]
        who = f" (seed {', '.join(map(str, seeds))})" if self._config.num_seeds > 1 else ""
        self.diagnosis = f"update {self.update + 1} met numbers that are not finite{who}, first in: {first}"
        if self._config.on_non_finite == "stop":
            self.diagnosis += (
                "; the state before it is saved. If the environment is not to blame (mam check-env), "
                "lower --ppo.lr, or take --on-non-finite skip or rollback"
            )
            return False
        if self._skipped == MOST_SKIPPED:
            self.diagnosis += f", as in the {MOST_SKIPPED - 1} updates before; the state before them is saved"
            return False
        how = "left out" if self._config.on_non_finite == "skip" else "left out, and the learning rate halved"
        self._log(f"{self.diagnosis}: {how}")
        return True

    def agreed(self, stop: Stop) -> bool:
        """Whether to stop: where there are several processes, as soon as one of them is asked to."""
        if jax.process_count() == 1:
            return stop.signal is not None
        signals = multihost_utils.process_allgather(np.asarray(stop.signal or 0))
        stop.signal = int(signals.max()) or None
        return stop.signal is not None

    def agreed_to_save(self, step_seconds: float) -> bool:
        """Whether it is time: at intervals, and where a signal's deadline would come before the end of a step."""
        since = time.monotonic() - self._saved_at
        due = since >= self._config.checkpoint.seconds or step_seconds > GRACE / 2
        if jax.process_count() == 1:
            return due
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(due)))

    def finish(self) -> None:
        """Waits until everything is on disk."""
        with _writing(self._folder.path):
            if self._writer:
                self._writer.wait()

    def last_words(self) -> str:
        """What is saved, once the save being written is done."""
        if self._writer:
            self._writer.wait(timeout=4.0)
        return f"the run is saved up to update {self._saved[0]}" if self._saved else "nothing is saved yet"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns whatever keeps the run's files from being written into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"cannot write the run to {path}: {reason}; what was saved before is intact") from error


def _try(close: Callable[[], None]) -> None:
    """Closes a file; what goes wrong then went wrong before, and was said."""
    with suppress(OSError, RunError):
        close()


def _write_results(config: Config, folder: RunFolder) -> None:
    """Everything derived from the metrics, made anew from the whole file."""
    records, seeds = folder.records(), seeds_of(config)
    suite, slash, task = config.env.partition("/")
    if not slash:  # package.module:factory
        suite, task = "own", config.env
    write_marl_eval(folder.path, records, env=suite, task=task, algorithm=config.algorithm, seeds=seeds)
    if any(record.kind == "evaluation" for record in records):
        plot_learning_curve(folder.learning_curve, records, title=f"{config.algorithm} on {config.env}", seeds=seeds)


def versions() -> dict[str, Any]:
    """What the run's numbers depend on besides its configuration."""
    own, suites = ("mam", "mam-native"), ("jumanji", "jaxmarl")
    found = {}
    for name in (*own, "jax", "jaxlib", "equinox", "optax", "orbax-checkpoint", "numpy", *suites):
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
