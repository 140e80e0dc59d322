"""Trials of a sweep: asked for, run, ended early, recorded, and resumed after an interruption."""

import json
import os
import shlex
import time
from contextlib import closing
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from mam.config import flat, to_json
from mam.errors import RunError, UserError, needs_extra, shown
from mam.presets import preset_for
from mam.runs.lock import acquire
from mam.runs.sinks import write_atomically
from mam.statistics import iqm
from mam.study.experiment.follow import seed_returns
from mam.study.experiment.grid import changed, flags
from mam.study.experiment.jobs import Job, lacks_space
from mam.study.experiment.matrix import POLL_SECONDS, Row, stop_on_signals
from mam.study.experiment.pools import End, Pool
from mam.study.experiment.screen import Screen
from mam.study.sweep.command import Sweep
from mam.study.sweep.space import space_of

RETRIES = 2  # of a trial that was killed


@dataclass(eq=False)
class TrialRow(Row):
    """A trial under way."""

    trial: Any = field(kw_only=True)  # optuna.trial.Trial
    reported: int = 0  # environment steps of the last evaluation it was judged by
    going: bool = False  # there is a process of it, which may be saving what was given up


class Search:
    """One study, kept in the sweep's folder.

    Args:
        options: what to search.
        out: folder of study.log, best.json and a run per trial.
        pool: where trials run.
        screen: where they are shown.

    Raises:
        UserError: if Optuna is missing, a setting cannot be searched, or the folder cannot be made.
    """

    _study: Any  # optuna.study.Study
    _sampler: Any  # mam.study.sweep.sampler.Untried

    def __init__(self, options: Sweep, out: Path, pool: Pool, screen: Screen):
        with needs_extra("mam sweep", "Optuna", "sweep"):
            self._optuna: Any = import_module("optuna")
        self._options, self._out, self._pool, self._screen = options, out, pool, screen
        self._values = space_of(options.config, options.search)
        self._rows: dict[Job, TrialRow] = {}
        self._lacking = ""  # what there was no space for
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the folder {shown(str(out))}: {error.strerror}"
            ) from error

    def _open(self) -> None:
        """Open the study, or begin it; no other process does as long as this one has the lock."""
        optuna, options = self._optuna, self._options
        backend = import_module("optuna.storages.journal").JournalFileBackend
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=options.startup_trials)
        journal = self._out / "study.log"
        _mend(journal)
        try:
            self._study = study = optuna.create_study(
                study_name="sweep",
                storage=optuna.storages.JournalStorage(backend(str(journal))),
                direction="maximize",
                pruner=pruner if options.prune else optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
        except ValueError as error:
            raise UserError(f"{journal} is damaged: {error}; choose another --out") from error
        # A sampler that began anew with the same seed would ask for the same trials again.
        seed, startup = options.config.seed + len(study.trials), options.startup_trials
        self._sampler = import_module("mam.study.sweep.sampler").Untried(
            self._values, seed=seed, n_startup_trials=startup
        )
        study.sampler = self._sampler
        what = {
            "config": to_json(options.config),
            "search": self._values,
            "objective": options.objective,
        }
        what = json.loads(json.dumps(what))
        if (before := study.user_attrs.get("what", what)) != what:
            then, now = flat(before), flat(what)
            unlike = [
                f"{name} was {then.get(name)}, is {now.get(name)}"
                for name in sorted(then.keys() | now.keys())
                if then.get(name) != now.get(name)
            ]
            raise UserError(
                f"{self._out} holds a sweep of something else: {'; '.join(unlike[:5])}; choose "
                "another --out"
            )
        study.set_user_attr("what", what)

    def _introduce(self) -> None:
        """Say what is about to take so long."""
        config, there = self._options.config, len(self._study.trials)
        self._screen.log(
            f"searching settings of {config.algorithm} on {config.env}: {self._most} trials of "
            f"{config.num_seeds} × {config.total_timesteps:,} steps at most, {there} begun before, "
            f"in {self._out}"
        )
        for name, values in self._values.items():
            self._screen.log(f"    {name}: {' '.join(map(str, values))}")

    def run(self) -> None:
        """Run trials until there are enough, or a signal comes.

        Raises:
            UserError: if the folder holds a sweep of something else, or is in use.
            RunError: if there was no space for a trial, which is saved as by a signal.
        """
        # Two at once would tell the outcome of each other's trials.
        with closing(acquire(self._out / "sweep.lock")), stop_on_signals() as stopping:
            self._open()
            self._introduce()
            unfinished = self._study.get_trials(states=(self._optuna.trial.TrialState.RUNNING,))
            rows = [
                self._row(self._optuna.trial.Trial(self._study, trial._trial_id))
                for trial in unfinished
            ]
            waiting = [row for row in rows if row is not None]
            told = False
            while True:
                if (stopping() or self._lacking) and not told:
                    told = True
                    self._screen.log(
                        "stopping: every trial is told to save itself; Ctrl-C again kills them"
                    )
                    for row in self._going():
                        if row.status == "running":
                            self._pool.stop(row.job)
                while not told and self._pool.has_capacity() and (waiting or not self._enough()):
                    row = waiting.pop(0) if waiting else self._row(self._study.ask())
                    if row is not None:
                        self._start(row)
                for row in self._going():
                    self._judge(row)
                for end in self._pool.ended():
                    row = self._rows[end.job]
                    row.going = False
                    self._judge(row)
                    if self._settle(row, end, stopping=told):
                        waiting.append(row)
                self._screen.show(list(self._rows.values()))
                if not self._going() and (told or not waiting) and (told or self._enough()):
                    break
                time.sleep(POLL_SECONDS)
        if self._lacking:
            raise RunError(f"{self._lacking}: the same command goes on once there is space")

    @property
    def _most(self) -> int:
        """Trials in all: as many as are asked for, or as there are combinations."""
        return min(self._options.trials, self._sampler.num_combinations)

    def _enough(self) -> bool:
        return len(self._study.trials) >= self._most

    def _going(self) -> list[TrialRow]:
        return [row for row in self._rows.values() if row.going]

    def _row(self, trial: Any) -> TrialRow | None:
        """Return a trial's row; None if no run could have its settings, which is put on record."""
        name = f"trial_{trial.number:04d}"
        # Those that it has are returned; some are missing if asking was interrupted.
        settings = {key: trial.suggest_categorical(key, of) for key, of in self._values.items()}
        try:
            config = changed(self._options.config, settings)
        except UserError as error:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            self._screen.log(f"{name}: failed, {error}")
            return None
        return TrialRow(Job(name, config, self._out / name), trial=trial)

    def _start(self, row: TrialRow) -> None:
        self._rows[row.job] = row
        try:
            self._pool.start(row.job, row.job.command())
        except UserError as error:
            self._fail(row, str(error))
            return
        row.status, row.starts, row.going = "running", row.starts + 1, True

    def _judge(self, row: TrialRow) -> None:
        """Report new evaluations, and end a trial that is behind."""
        for line in row.progress.poll():
            if line["kind"] == "evaluation" and line["step_count"] > row.reported:
                row.reported = line["step_count"]
                value = self._objective(seed_returns(line))
                if np.isfinite(value) and row.status == "running":
                    row.trial.report(value, step=row.reported)
                    if row.trial.should_prune():
                        row.status = "pruned"
                        self._pool.stop(row.job)

    def _settle(self, row: TrialRow, end: End, *, stopping: bool) -> bool:
        """Decide what a process that ended means; return whether the trial is to be resumed."""
        if row.progress.finished(row.job.budget):
            self._tell(row, "finished")
        elif row.status == "pruned":
            self._tell(row, "pruned")
        elif stopping:
            row.status = "stopped"
        elif end.to_be_resumed(row.starts, RETRIES):
            row.status = "waiting"
            return True
        else:
            self._fail(row, end.why or row.job.last_words())
        return False

    def _fail(self, row: TrialRow, why: str) -> None:
        """Put a failure on record, unless all that the trial needs is space: then end the sweep."""
        if lacks_space(why):
            row.status, row.note = "stopped", why
            self._lacking = f"{row.job.name}: {why.removeprefix('mam: ')}"
        else:
            self._tell(row, "failed", why)

    def _tell(self, row: TrialRow, status: Any, why: str = "") -> None:
        """Put the outcome of a trial on record."""
        states, value = self._optuna.trial.TrialState, self._objective(row.progress.returns)
        row.status, row.note = status, why
        if status == "finished" and np.isfinite(value):
            self._study.tell(row.trial, value)
        else:
            self._study.tell(row.trial, state=states.PRUNED if status == "pruned" else states.FAIL)
        settings = " ".join(f"{name}={value}" for name, value in row.trial.params.items())
        said = why or self._screen.returns(row)
        self._screen.log(f"{row.job.name}: {row.status}, {said} · {settings}")

    def _objective(self, returns: np.ndarray) -> float:
        """Return what counts of the seeds' returns; NaN if there are none."""
        if not len(returns):
            return float("nan")
        return float(iqm(returns) if self._options.objective == "iqm" else returns.mean())

    def conclude(self) -> int:
        """Say which trial was best, and how to train with its settings; return the exit code."""
        states = self._optuna.trial.TrialState
        counts = {state: len(self._study.get_trials(states=(state,))) for state in states}
        shown = [f"{count} {state.name.lower()}" for state, count in counts.items() if count]
        self._screen.conclude(list(self._rows.values()))
        self._screen.log(f"trials: {', '.join(shown)}")
        if len(self._study.trials) >= self._sampler.num_combinations:
            self._screen.log(
                f"that is each of the {self._sampler.num_combinations} combinations once: "
                f"nothing is left"
            )
        if not counts[states.COMPLETE]:
            self._screen.log("no trial has finished: there is no best one")
            return 1 if counts[states.FAIL] else 0
        best = self._study.best_trial
        config = changed(self._options.config, best.params)
        write_atomically(self._out / "best.json", json.dumps(to_json(config), indent=2))
        options = flags(config, preset_for(config.env)[0])
        self._screen.log(
            f"best: trial_{best.number:04d}, {self._options.objective} {best.value:.4f}"
        )
        command = shlex.join(["mam", "train", "--env", config.env, *options])
        self._screen.log(f"    {command}")
        self._screen.log(
            f"in {self._out}: best.json, study.log (Optuna's journal), a run per trial"
        )
        return 0


def _mend(journal: Path) -> None:
    """Remove what a killed process, or one without space, left of what it wrote last.

    Optuna would write on behind half a line, and read nothing after it; and wait for its own lock.
    """
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
    if journal.exists():
        data = journal.read_bytes()
        os.truncate(journal, data.rfind(b"\n") + 1)
