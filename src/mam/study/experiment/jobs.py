"""The runs of an experiment, each with its folder and the command that brings it to its end."""

import errno
import hashlib
import os
import runpy
import shlex
import shutil
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mam.config import Config
from mam.envs.tasks import check_task
from mam.errors import UserError, shown
from mam.presets import preset_for
from mam.runs.folder import FREE, LOCK_FILE, RunFolder, differences
from mam.runs.lock import is_held
from mam.runs.loop import resume_options
from mam.study.experiment.follow import Follower
from mam.study.experiment.grid import flags

_LOG = "output.log"
_FULL = "the disk is full"
_NO_SPACE = (_FULL, *(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)))
_LONGEST = 200  # bytes in the name of a folder


@dataclass(frozen=True)
class Job:
    """One run."""

    name: str
    config: Config
    path: Path

    @property
    def budget(self) -> int:
        """Environment steps per seed at its end."""
        return self.config.num_updates * self.config.steps_per_update

    @property
    def log(self) -> Path:
        """The file of all that the process prints."""
        return self.path / _LOG

    def follow(self) -> Follower:
        """Make a reader of its metrics, from the beginning."""
        return Follower(self.path / "metrics.jsonl")

    def finished(self) -> bool:
        """Say whether the absolute metric was measured after all steps; exit codes do not tell.

        Raises:
            UserError: if it was, but of a run with other settings.
        """
        follower = self.follow()
        follower.poll()
        return follower.finished(self.budget) and bool(self.saved())

    def started(self) -> bool:
        """Say whether there is something to go on with."""
        return (self.path / "config.json").exists()

    def running(self) -> bool:
        """Say whether any process goes on with it."""
        return is_running(self.path)

    def command(self) -> list[str]:
        """Return the arguments of `mam` that start it, or resume it.

        Raises:
            UserError: if its folder holds a run with other settings.
        """
        if not self.started():
            preset, _ = preset_for(self.config.env)
            options = flags(self.config, preset)
            return ["train", "--env", self.config.env, *options, "--out", str(self.path)]
        saved = self.saved()
        return ["train", *resume_options(self.config, self.path), *flags(self.config, saved)]

    def saved(self) -> Config:
        """Read the configuration of the run in its folder.

        Raises:
            UserError: if it cannot be read, or is that of a run with other settings.
        """
        saved = RunFolder(self.path).load_config()
        if unlike := differences(
            saved, replace(self.config, **{name: getattr(saved, name) for name in FREE})
        ):
            raise UserError(
                f"{self.path} holds a run with other settings: {'; '.join(unlike)}; take the "
                "change back, or give the run another name"
            )
        return saved

    def command_line(self) -> str:
        """Return the command that starts it, or resumes it, quoted for a shell."""
        return shlex.join(["mam", *self.command()])

    def last_words(self) -> str:
        """Return the last line it printed; say if a full disk may have lost its error."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            full = shutil.disk_usage(self.path).free == 0
        except OSError:
            lines, full = [], False
        return (lines[-1].strip() if lines else "it printed nothing") + f" ({_FULL})" * full


def lacks_space(words: str) -> bool:
    """Say whether a run ended, by its last words, because there was no space for it."""
    return any(reason in words for reason in _NO_SPACE)


def is_running(folder: Path) -> bool:
    """Say whether a process is training there, or was started to."""
    return is_held(folder / _LOG) or is_held(folder / LOCK_FILE)


def load_runs(file: Path) -> list[Any]:
    """Run a file and return what it defines as `runs`.

    Raises:
        UserError: if it cannot be run, with the end of its traceback, or defines none.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist")
    try:
        found = runpy.run_path(str(file)).get("runs")
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except Exception as error:
        last = "".join(traceback.format_exception(error)[-3:]).strip()
        raise UserError(f"{file} failed:\n{last}") from error
    if not isinstance(found, Iterable) or not (runs := list(found)):
        raise UserError(
            f"{file} defines no `runs`: a list of Config or (name, Config), "
            f"see mam.study.experiment.grid"
        )
    return runs


def jobs_of(runs: Iterable[Any], out: Path) -> list[Job]:
    """Make one job per run; a configuration without a name is called by its task and algorithm.

    Raises:
        UserError: if something is no configuration, there is no such task, or two runs have one
            name.
    """
    jobs = dict[Path, Job]()
    for run in runs:
        match run:
            case Config():
                name, config = f"{run.env}/{run.algorithm}", run
            case (str(name), Config() as config):
                pass
            case _:
                raise UserError(f"runs must be Config or (name, Config), got {run!r}")
        check_task(config.env)
        path = out / _file_name(name)
        if path == out:
            raise UserError(f"the run called {shown(name)} needs a name with letters or digits")
        if path in jobs:
            raise UserError(
                f"two runs are called {name}, or nearly so: give them names, as (name, Config)"
            )
        jobs[path] = Job(name, config, path)
    for path, job in jobs.items():
        if outer := next((jobs[one] for one in path.parents if one in jobs), None):
            raise UserError(
                f"the run {job.name} would lie in the folder of {outer.name}: call one otherwise"
            )
    return list(jobs.values())


def _file_name(name: str) -> Path:
    """Turn a name into a path for any file system, the same on every machine."""
    parts = [
        "".join(c if c.isalnum() or c in "-_.,=" else "_" for c in part) for part in name.split("/")
    ]
    return Path(*(_short(part) for part in parts if part.strip(".")))


def _short(part: str) -> str:
    """Shorten part of a name that is too long for file systems to its beginning and a checksum."""
    data = part.encode(errors="replace")
    if len(data) <= _LONGEST:
        return part
    return (
        f"{data[: _LONGEST - 17].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:16]}"
    )


def python_command(arguments: list[str]) -> list[str]:
    """Return the command for a process of its own, with this interpreter."""
    return [sys.executable, "-m", "mam", *arguments]
