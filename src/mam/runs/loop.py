"""A run on this machine: a folder, a loop over compiled steps, and a stop that loses nothing.

RUN/config.json        what was run           RUN/metrics.jsonl       every number it reported
RUN/versions.json      with what              RUN/tensorboard/        the same for TensorBoard
RUN/checkpoint/        whole train states     RUN/marl_eval.json      the same for marl-eval
RUN/times.json         where time went        RUN/learning_curve.png  the same to look at
RUN/run.lock           held while it trains   RUN/trackers.json       the run elsewhere
RUN/teacher.json       what it distills, if it does
"""

import errno
import json
import os
import platform
import re
import shlex
import subprocess
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from mam.config import Config, to_json
from mam.envs.external.factories import code_of
from mam.envs.tasks import SUITES
from mam.errors import DISTRIBUTION, NATIVE, RunError, UserError, installed_version, shown
from mam.learning.evaluate import UNFINISHED
from mam.learning.train import Trainer, TrainState, Values, on_host
from mam.learning.update import check_minibatches
from mam.networks.policy import check_read, has_memory, sequence_length
from mam.runs.callbacks import Callback, Event
from mam.runs.checkpoint import Save, Writer, has_saves
from mam.runs.curriculum import carried_over, check_stages, trainer_at
from mam.runs.files import read_object
from mam.runs.folder import FREE, RunFolder, differences, restore, seeds_of
from mam.runs.footprint import footprint, out_of_memory
from mam.runs.initial import started_from
from mam.runs.load import teacher_of
from mam.runs.lock import acquire
from mam.runs.loggers import find_sink
from mam.runs.signals import GRACE, Stop, stop_on_signals
from mam.runs.sinks import (
    JsonLines,
    Progress,
    Record,
    Sink,
    write_atomically,
)
from mam.runs.summary import plot_learning_curve, write_marl_eval
from mam.runs.times import write_times

Outcome = Literal["finished", "stopped", "preempted"]
MOST_SKIPPED = 10  # updates in a row with non-finite values, before a run gives up


def start(config: Config, path: Path | None = None) -> tuple[RunFolder, Trainer]:
    """Check a configuration and make the folder of a new run, unless anything is wrong.

    Args:
        config: what to run.
        path: the folder; a new one, runs/<task>/<policy>/<time>, if None.

    Returns:
        The folder, locked, and what trains in it.

    Raises:
        UserError: for a task or policy that does not exist, minibatches of several sizes, a folder
            that holds a run already or is in use, or one that cannot be made.
    """
    if path is None and jax.process_count() > 1:
        raise UserError("several processes write one run: give them the same --out")
    if path is not None and jax.process_index() == 0:
        _check_unused(config, path)
    for name in config.log:
        find_sink(name)
    check_read(config.policy, config.network)
    teacher = teacher_of(config)
    trainer = trainer_at(config, 0, teacher)
    try:
        length = sequence_length(config) if has_memory(config.policy, config.network) else None
        size = config.steps_per_update // (length or 1)
        check_minibatches(size, length, config.ppo, trainer.devices.shard)
        trainer.shapes(np.asarray(seeds_of(config)))  # builds the networks, on paper
        check_stages(config, trainer, teacher)
        trainer = started_from(config, trainer)
        if jax.process_index() > 0:
            return RunFolder(cast(Path, path)), trainer
        return _make_folder(config, path, trainer), trainer
    except BaseException:
        trainer.close()
        raise


def _check_unused(config: Config, path: Path) -> None:
    """Refuse names that no terminal can show as they are, and folders with a run."""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in str(path)):
        raise UserError(f"--out takes names that can be printed, got {shown(str(path))}")
    try:
        (path / "config.json").lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"cannot make the folder {shown(str(path))}: {error.strerror}") from error
    command = shlex.join(["mam", "train", *resume_options(config, path)])
    raise UserError(f"{path} already holds a run: go on with `{command}`, or choose another --out")


def _make_folder(config: Config, path: Path | None, trainer: Trainer) -> RunFolder:
    """Make the folder of a new run, which no other run has."""
    try:
        if path is None:
            path = _make_unused(_default_folder(config))
        else:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {shown(str(path or 'runs'))}: {error.strerror}"
        ) from error
    folder = RunFolder(path)
    folder = replace(folder, held=acquire(folder.lock))
    try:
        _check_unused(config, path)
        _write_json(folder.config, to_json(config))
        if teacher := teacher_of(config):
            _write_json(folder.teacher, to_json(teacher))
        data = {"data": fingerprint} if (fingerprint := _fingerprint(trainer)) else {}
        _write_json(path / "versions.json", versions() | data)
    except BaseException:
        folder.release()
        raise
    return folder


def _default_folder(config: Config) -> Path:
    """Return where runs of this kind go; every file system takes the name."""
    task, algorithm = (re.sub(r'[<>:"|?*\\]', "_", name) for name in (config.env, config.algorithm))
    return Path("runs") / task / algorithm


def _make_unused(parent: Path) -> Path:
    """Make a folder called by the time, with a suffix where one began in the same second."""
    parent.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for name in (stamp, *(f"{stamp}_{number}" for number in range(2, 10_000))):
        with suppress(FileExistsError):
            (parent / name).mkdir()
            return parent / name
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(parent))


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    try:
        write_atomically(path, json.dumps(contents, indent=2))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def resume_options(config: Config, path: Path) -> list[str]:
    """Return the options of `mam train` that resume a run, with the names that are code.

    Args:
        config: of the run.
        path: its folder.
    """
    code = [part for name, code in code_of(config).items() for part in (f"--{name}", code)]
    return ["--resume", str(path), *code]


def resume(path: Path, config: Config) -> tuple[RunFolder, Trainer]:
    """Open a run to go on with it, possibly for longer.

    Args:
        path: the folder.
        config: the run's, except for settings that are FREE.

    Returns:
        The folder, locked, and what trains in it.

    Raises:
        UserError: if the configuration differs from the run's in anything but the settings that are
            FREE, or another process runs it.
    """
    folder = RunFolder(path)
    saved = folder.load_config()
    differing = differences(
        replace(saved, **{name: getattr(config, name) for name in FREE}), config
    )
    if differing:
        raise UserError(f"{path} cannot go on with other settings: {'; '.join(differing)}")
    if config.total_timesteps < saved.total_timesteps:
        raise UserError(
            f"total_timesteps cannot shrink from {saved.total_timesteps} "
            f"to {config.total_timesteps}"
        )
    if config.total_timesteps > saved.total_timesteps and (stretched := config.schedules):
        print(
            f"{', '.join(stretched)}: a share of the run, which is longer now, so that what had "
            "fallen rises again; a run of this length from its start would differ"
        )
    for name in config.log:
        find_sink(name)
    if jax.process_index() == 0:
        folder = replace(folder, held=acquire(folder.lock))
    try:
        trainer = trainer_at(config, 0, teacher_of(config, folder.teacher))
        _check_data(folder, config, trainer)
        if not has_saves(folder.checkpoint):
            trainer = started_from(config, trainer)
        if jax.process_index() == 0:
            if not has_saves(folder.checkpoint):
                lost = ", and metrics.jsonl is written anew" if folder.metrics.exists() else ""
                print(f"{path} holds no checkpoint: the run starts again at step 0{lost}")
            _write_json(folder.config, to_json(config))
    except BaseException:
        folder.release()
        raise
    return folder, trainer


def _fingerprint(trainer: Trainer) -> str | None:
    """Return what tells the dataset that is learned from from others."""
    return trainer.recordings.fingerprint if trainer.recordings is not None else None


def _check_data(folder: RunFolder, config: Config, trainer: Trainer) -> None:
    """Refuse to go on with another dataset than that of the first update."""
    path = folder.path / "versions.json"
    if config.data is None or not path.exists():
        return
    if read_object(path).get("data") not in (None, _fingerprint(trainer)):
        raise UserError(
            f"the dataset {config.data} is not what it was when {folder.path} began: "
            "put it back, or begin another run"
        )


def run(
    config: Config,
    folder: RunFolder,
    trainer: Trainer,
    *,
    callbacks: Sequence[Callback] = (),
    signals: bool = True,
) -> Outcome:
    """Train from the newest intact checkpoint, or from scratch, to the end or to a stop.

    Args:
        config: what is run.
        folder: where, as `start` or `resume` returned it.
        trainer: what trains there, as they returned it; closed at the end.
        callbacks: called after every update and every evaluation.
        signals: stop on SIGINT, SIGTERM and the like, whose handlers are replaced for as long as
            the run takes.

    Returns:
        How it ended; a run that was stopped is saved and can be resumed.

    Raises:
        RunError: if the run cannot go on: its files cannot be written, a value is not finite,
            memory is out.
    """
    with ExitStack() as stack:
        stack.callback(folder.release)
        stack.callback(trainer.close)
        save = folder.newest_save(config) if has_saves(folder.checkpoint) else None
        loop = _Loop(config, folder, save, trainer, callbacks)
        stack.callback(loop.close)
        total = config.num_updates * config.steps_per_update
        progress = stack.enter_context(
            Progress(total, num_seeds=config.num_seeds, step_count=loop.step_count)
        )
        stop = stack.enter_context(
            stop_on_signals(progress.log, loop.last_words) if signals else nullcontext(Stop())
        )
        stack.enter_context(out_of_memory(config))
        stack.enter_context(trainer.clock.compiling_apart())
        state = loop.compile(progress)
        loop.open(stack, progress)
        while not loop.agreed(stop):
            begun = time.monotonic()
            if config.evaluate_after(loop.update) and loop.evaluated < loop.update:
                progress.evaluating(config.eval)
                state = loop.evaluate(state, stop)
            elif loop.update < config.num_updates:
                state = loop.train(state, stop)
            else:
                break
            if loop.agreed_to_save(time.monotonic() - begun):
                loop.save(state)
        finished = loop.update >= config.num_updates and loop.evaluated >= loop.update
        loop.save(state)
        if finished:
            loop.play_best(state)
        loop.finish()
    if jax.process_index() == 0:
        _write_results(config, folder)
    return "finished" if finished else "preempted" if stop.preempted else "stopped"


class _Loop:
    """The place that a run has reached, and the files that its numbers go to."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        save: Save | None,
        trainer: Trainer,
        callbacks: Sequence[Callback],
    ):
        meta = save.meta if save else {"update": 0, "evaluated": -1, "elapsed": 0.0}
        self.update, self.evaluated = meta["update"], meta["evaluated"]
        self.diagnosis = ""  # of what was not finite
        self._config, self._folder, self._resumed = config, folder, save
        if stage := config.stage(self.update):
            trainer = trainer_at(config, stage, teacher_of(config, folder.teacher), trainer)
        self._trainer, self._spec, self._callbacks = trainer, trainer.spec, callbacks
        self._begun = time.monotonic() - meta["elapsed"]  # as if the run had never been interrupted
        self._clock = trainer.clock
        self._clock.seconds = dict(meta.get("times", {}))
        self._saved, self._saved_at = (
            (self.update, self.evaluated) if save else None,
            time.monotonic(),
        )
        self._sinks: list[Sink] = []
        self._writer: Writer | None = None
        self._metrics: JsonLines | None = None  # in the process that writes them
        self._skipped = 0
        self._said_unfinished = False
        self._log: Callable[[str], None] = print
        self._progress: Progress | None = None

    @property
    def step_count(self) -> int:
        return self.update * self._config.steps_per_update

    def compile(self, progress: Progress) -> TrainState:
        """Compile the steps, say what they need, and return the state they start from."""
        seeds = np.asarray(seeds_of(self._config))
        self._progress = progress

        def first() -> TrainState:
            if self._resumed:
                return restore(self._resumed, self._trainer.shapes(seeds))
            return self._trainer.init(seeds)

        return self._compiled(first)

    def _compiled(self, begin: Callable[[], TrainState]) -> TrainState:
        """Compile what trains, for the state that it begins with, and return that."""
        progress = cast(Progress, self._progress)
        with progress.compiling("the update and the evaluation"), self._clock.part("compile"):
            state = begin()
            self._trainer = self._trainer.compile(state)
        if line := footprint(self._trainer):
            progress.log(line)
        return state

    def next_stage(self, state: TrainState) -> TrainState:
        """Go on with the next task of the curriculum, if the last update ended a stage.

        Args:
            state: after that update.
        """
        config, stage = self._config, self._config.stage(self.update)
        if stage == config.stage(self.update - 1):
            return state
        teacher, old = teacher_of(config, self._folder.teacher), self._trainer
        old.close_source()
        self._trainer = trainer_at(config, stage, teacher, old)
        _, options = config.stages[stage]
        self._log(f"{self.step_count:,} steps: going on with {options or config.env}")
        seeds = np.asarray(seeds_of(config))
        return self._compiled(lambda: carried_over(state, self._trainer, seeds))

    def close(self) -> None:
        """End the environments of the stage."""
        self._trainer.close()

    def open(self, stack: ExitStack, progress: Progress) -> None:
        """Open the files, which `stack` closes."""
        self._log, meta = progress.log, self._resumed.meta if self._resumed else None
        if self._resumed:
            self._log(
                f"going on after update {self.update} of {self._config.num_updates} "
                f"({self.step_count:,} steps)"
            )
        with _writing(self._folder.path):
            # What was removed while the program was compiled is not made anew without it.
            self._folder.config.stat()
            self._writer = Writer(
                self._folder.checkpoint, keep=self._config.checkpoint.keep, after=self._resumed
            )
            stack.callback(_try, self._writer.close)
            if jax.process_index() > 0:
                return
            # The first is what resuming and reports read.
            for name in dict.fromkeys(("jsonl", *self._config.log)):
                self._add(stack, find_sink(name)(self._folder.path, self._config, meta))
        self._metrics = cast(JsonLines, self._sinks[0])
        if meta and (lost := self._metrics.missing):
            self._log(
                f"{self._folder.metrics} lacks {lost} of the {meta['metrics_bytes']} bytes "
                "that it had at the checkpoint: rows are lost, and the run goes on without them"
            )
        self._add(stack, progress)

    def _add(self, stack: ExitStack, sink: Sink) -> None:
        self._sinks.append(sink)
        stack.callback(_try, sink.close)

    def train(self, state: TrainState, stop: Stop) -> TrainState:
        """Take a train step and report it.

        Args:
            state: before it.
            stop: how callbacks ask for an end.

        Raises:
            RunError: it came to a non-finite value, and the run is not to go on with these.
        """
        with self._clock.part(self._trainer.step_part):
            state, values = self.take(self._trainer.train_step, state)
            if not self.healthy(state, values):
                self.save(state)
                raise RunError(self.diagnosis)
            self.update += 1
        # From here on what is saved, also for a callback that fails, is the next stage's.
        state = self.next_stage(state)
        self.report("train", values, state, stop)
        return state

    def evaluate(self, state: TrainState, stop: Stop) -> TrainState:
        """Evaluate the current weights and report it.

        Args:
            state: with these weights.
            stop: how callbacks ask for an end.
        """
        # However long the first evaluation takes, what was learned before it is safe.
        if self.update and self._saved is None:
            self.save(state)
        with self._clock.part("evaluation"):
            state, values = self.take(self._trainer.evaluate_step, state)
            self.evaluated = self.update
            self.report("evaluation", values, state, stop)
        return state

    def play_best(self, state: TrainState) -> None:
        """Play fresh episodes with the best weights and report them."""
        episodes = self._config.eval.num_absolute_episodes
        self._log(f"playing {episodes} fresh episodes with the best weights…")
        with self._clock.part("evaluation"):
            self.write("absolute", self.take(self._trainer.absolute_metric, state))

    def take(self, step: Callable[[TrainState], Any], state: TrainState) -> Any:
        """Take a step; if it fails, the state before it is saved.

        Args:
            step: of the trainer.
            state: before it.

        Raises:
            RunError: an environment or a callback failed.
        """
        try:
            return step(state)
        except Exception as error:
            # Several would have to save together, and only this one failed. Of a state that was
            # donated to the step nothing is left.
            if jax.process_count() == 1:
                with suppress(Exception):
                    self.save(state)
            if not isinstance(error, UserError):
                raise
            what, *traceback = str(error).split("\n")
            raise RunError("\n".join([f"{what}; {self.last_words()}", *traceback])) from error

    def report(self, kind: Any, values: Values, state: TrainState, stop: Stop) -> None:
        """Write what a step came to, and call the callbacks, which may stop the run.

        Args:
            kind: of step.
            values: what it reported.
            state: after it.
            stop: how callbacks ask for an end.
        """
        record = self.write(kind, values)
        event = Event(record.update, record.step_count, record.values, state, self._log, stop.ask)

        def tell(_: TrainState) -> None:
            for callback in self._callbacks:
                if (callback.on_update if kind == "train" else callback.on_evaluation)(event):
                    event.stop()

        self.take(tell, state)

    def write(self, kind: Any, values: Values) -> Record:
        numbers = on_host(values)
        record = Record(kind, self.update, self.step_count, time.monotonic() - self._begun, numbers)
        with _writing(self._folder.path), self._clock.part("logging"):
            for sink in self._sinks:
                sink.write(record)
            if self._metrics and kind != "train":
                write_times(self._folder.times, self._clock.seconds)
        if not self._said_unfinished:
            self._say_unfinished(numbers)
        return record

    def _say_unfinished(self, values: Mapping[str, np.ndarray]) -> None:
        cut = np.concatenate(
            [x.ravel() for name, x in values.items() if name.endswith(UNFINISHED)] or [np.zeros(0)]
        )
        if cut.any():
            self._said_unfinished = True
            limit = self._config.eval.max_episode_steps
            self._log(
                f"{int(cut.sum())} of {cut.size} evaluated episodes had not ended "
                f"after {limit:,} steps and count with what they had returned by then; "
                "--eval.max-episode-steps sets the limit"
            )

    def save(self, state: TrainState) -> None:
        """Begin a save, unless the state is that of the last one; at the end of the run, end it."""
        stands, self._saved_at = (self.update, self.evaluated), time.monotonic()
        if self._saved == stands:
            return
        with _writing(self._folder.path), self._clock.part("saving"):
            position = self._metrics.sync() if self._metrics else 0
            meta = {
                "update": self.update,
                "evaluated": self.evaluated,
                "step_count": self.step_count,
            }
            meta |= {"elapsed": time.monotonic() - self._begun, "metrics_bytes": position}
            meta |= {"config": to_json(self._config), "spec": asdict(self._spec)}
            meta |= {"times": dict(self._clock.seconds)}
            cast(Writer, self._writer).save(state, meta)
        self._saved = stands

    def healthy(self, state: TrainState, values: Values) -> bool:
        """Say whether to go on after a train step, and set what was not finite in it.

        Args:
            state: after it.
            values: what it reported.
        """
        bad = self._trainer.first_nonfinite(state, values)
        self._skipped = self._skipped + 1 if bad else 0
        if not bad:
            return True
        first, seeds = next(iter(bad.values())), [seeds_of(self._config)[index] for index in bad]
        who = f" (seed {', '.join(map(str, seeds))})" if self._config.num_seeds > 1 else ""
        self.diagnosis = (
            f"update {self.update + 1} met numbers that are not finite{who}, first in: {first}"
        )
        if self._config.on_non_finite == "stop":
            self.diagnosis += (
                "; the state before it is saved. "
                "If the environment is not to blame (mam check-env), "
                "lower --ppo.lr, or take --on-non-finite skip or rollback"
            )
            return False
        if self._skipped == MOST_SKIPPED:
            self.diagnosis += (
                f", as in the {MOST_SKIPPED - 1} updates before; the state before them is saved"
            )
            return False
        how = (
            "left out"
            if self._config.on_non_finite == "skip"
            else "left out, and the learning rate halved"
        )
        self._log(f"{self.diagnosis}: {how}")
        return True

    def agreed(self, stop: Stop) -> bool:
        """Say whether to stop: of several processes, as soon as one of them is asked to."""
        if jax.process_count() == 1:
            return stop.signal is not None
        signals = multihost_utils.process_allgather(np.asarray(stop.signal or 0))
        stop.signal = int(signals.max()) or None
        return stop.signal is not None

    def agreed_to_save(self, step_seconds: float) -> bool:
        """Say whether to save: at intervals, and before steps longer than a signal's deadline."""
        since = time.monotonic() - self._saved_at
        due = since >= self._config.checkpoint.seconds or step_seconds > GRACE / 2
        if jax.process_count() == 1:
            return due
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(due)))

    def finish(self) -> None:
        """Wait until everything is on disk."""
        with _writing(self._folder.path):
            with self._clock.part("saving"):
                if self._writer:
                    self._writer.wait()
            if self._metrics:
                write_times(self._folder.times, self._clock.seconds)

    def last_words(self) -> str:
        """Say what is saved, once the save being written is done."""
        if self._writer:
            self._writer.wait(timeout=4.0)
        return (
            f"the run is saved up to update {self._saved[0]}"
            if self._saved
            else "nothing is saved yet"
        )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn any reason why the run's files cannot be written into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(
            f"cannot write the run to {path}: {reason}; what was saved before is intact"
        ) from error


def _try(close: Callable[[], None]) -> None:
    """Close a file; what goes wrong then went wrong before, and was said."""
    with suppress(OSError, RunError):
        close()


def _write_results(config: Config, folder: RunFolder) -> None:
    """Write all that is derived from the metrics, anew from the whole file."""
    suite, slash, task = config.env.partition("/")
    if not slash:  # package.module:factory
        suite, task = "own", config.env
    title = f"{config.algorithm} on {config.env}"
    with _writing(folder.path):
        records, seeds = folder.records(), seeds_of(config)
        write_marl_eval(
            folder.path, records, env=suite, task=task, algorithm=config.algorithm, seeds=seeds
        )
        if any(record.kind == "evaluation" for record in records):
            plot_learning_curve(folder.learning_curve, records, title=title, seeds=seeds)


def versions() -> dict[str, Any]:
    """Return what the run's numbers depend on besides its configuration."""
    suites = (package for suite in SUITES.values() for package in suite.packages)
    others = ("jax", "jaxlib", "equinox", "optax", "numpy", *suites)
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in (DISTRIBUTION, NATIVE, *others)},
        "git": _git_sha(),
        "device": f"{device.platform}: {device.device_kind}",
        "platform": platform.platform(),
    }


def _git_sha() -> str | None:
    """Return the commit of the source, `-dirty` if changed since; None outside a checkout."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
