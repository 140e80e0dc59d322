"""Sinks of a run: all that it reports goes through `write`, to files and the terminal."""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from mam.config import EvalConfig
from mam.envs.external.shared import INFO, mean_of_said
from mam.runs.files import open_regular

RETURN = "episode_return"  # the metric every environment reports


@dataclass(frozen=True)
class Record:
    """The metrics that a run reports at one moment, for all of its seeds at once."""

    kind: Literal["train", "evaluation", "absolute"]
    update: int  # updates done
    step_count: int  # environment steps done, per seed
    elapsed: float  # wall-clock seconds since the run began; a resumed run goes on counting
    # Metric → [num_seeds], or [num_seeds, num_episodes] in an evaluation
    values: dict[str, np.ndarray]


@runtime_checkable
class Sink(Protocol):
    """A destination of records."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def is_of_infos(name: str) -> bool:
    """Say whether a metric is made of infos, which not every episode need have."""
    return name.removeprefix("greedy_").removeprefix("sampled_").startswith(INFO)


def seed_means(values: np.ndarray, name: str = "") -> np.ndarray:
    """Return one number per seed, [num_seeds]: the mean over its episodes, or the scalar itself.

    Args:
        values: [num_seeds] or [num_seeds, episodes].
        name: of the metric: one that is made of infos is the mean over the episodes that say it.
    """
    values = np.asarray(values, np.float64)
    if is_of_infos(name):
        return mean_of_said(values)
    return values.reshape(len(values), -1).mean(axis=1)


def median_speed(steps: Sequence[int] | np.ndarray, elapsed: Sequence[float] | np.ndarray) -> float:
    """Return the speed of training: environment steps per second of one seed.

    It is the median over updates, each timed from the record before it, so that compiling moves it
    no more than evaluating. Times the number of seeds it is the speed that is shown.

    Args:
        steps: environment steps done at each record, of updates and of evaluations.
        elapsed: seconds at each record.

    Returns:
        NaN before the second update.
    """
    steps, seconds = np.diff(steps), np.diff(elapsed)
    timed = (seconds > 0) & (steps > 0)  # no step is done in an evaluation
    return float(np.median(steps[timed] / seconds[timed])) if timed.any() else float("nan")


def training_speed(records: Sequence[Record]) -> float:
    """Return `median_speed` of a run's records."""
    return median_speed(
        [record.step_count for record in records], [record.elapsed for record in records]
    )


def to_json(values: np.ndarray) -> Any:
    """Return an array as nested lists; NaN and infinity, which JSON lacks, become None."""
    array = np.asarray(values)
    if array.dtype.kind not in "biu":
        array = array.astype(np.float64).astype(object)
        array[~np.isfinite(array.astype(np.float64))] = None
    return array.tolist()


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader sees the old text or the new one.

    A failure or a kill leaves the old one.

    Args:
        path: the file.
        text: all of it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


class JsonLines:
    """One JSON object per record and line, in full precision: the run's own record of itself.

    Args:
        path: the file, by custom `metrics.jsonl`.
        append_at: None starts the file anew. A number, the checkpoint's `position` on a resume,
            cuts the file there: the resumed run writes the rest again.

    Attributes:
        missing: bytes before that position which a file that has lost its tail no longer has.
    """

    def __init__(self, path: Path, *, append_at: int | None):
        path.parent.mkdir(parents=True, exist_ok=True)
        if append_at is None:
            write_atomically(path, "")
        self._file = path.open("ab")
        self.missing = 0
        if append_at is not None:
            end = _end_of_line(path, append_at)
            self._file.truncate(end)
            self.missing = append_at - end

    def write(self, record: Record) -> None:
        """Append one line and hand it to the operating system."""
        row = {
            "kind": record.kind,
            "update": int(record.update),
            "step_count": int(record.step_count),
        }
        row |= {"elapsed": float(record.elapsed)} | {
            name: to_json(value) for name, value in record.values.items()
        }
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Put everything on disk, and return the position behind it, in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _end_of_line(path: Path, position: int) -> int:
    """Return the position, or the end of the last whole line before it if the tail is lost."""
    with path.open("rb") as file:
        return file.read(position).rfind(b"\n") + 1


def read_records(path: Path) -> list[Record]:
    """Read what `JsonLines` wrote.

    None becomes NaN. A half-written last line, left by a kill, is ignored.

    Raises:
        ValueError: if any other line is damaged, naming it.
    """
    return [record for _, record in _parse(path)]


def _parse(path: Path) -> Iterator[tuple[str, Record]]:
    with open_regular(path) as file:
        lines = file.read().decode(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            head = [row.pop(name) for name in ("kind", "update", "step_count", "elapsed")]
            record = Record(*head, values={name: _from_json(value) for name, value in row.items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                return
            raise ValueError(f"{path}, line {number} is damaged: {error}") from error
        yield line, record


def _from_json(value: Any) -> np.ndarray:
    array = np.asarray(value)
    return array.astype(np.float64) if array.dtype == object else array


class TensorBoard:
    """One TensorBoard sub-run per seed, so that its charts show the spread.

    Tags are `<kind>/<metric>`; of an evaluation's episodes the mean, and the standard deviation as
    `<kind>/<metric>_std`. The horizontal axis is environment steps per seed.

    Args:
        folder: sub-runs go to `<folder>/seed_<k>`.
        seeds: the seeds k, in the order of the records' first axis.
        append_after_step: on a resume, the checkpoint's step count; later points of the earlier run
            are hidden.
    """

    def __init__(self, folder: Path, seeds: Sequence[int], *, append_after_step: int | None = None):
        # The file format alone: the package's SummaryWriter writes in a thread that dies in silence
        # on a full disk.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        self._event, self._summary = Event, Summary
        self._writers = []
        for seed in seeds:
            path = folder / f"seed_{seed}"
            path.mkdir(parents=True, exist_ok=True)
            # Of a relative one it takes `s3:` and `gs:` for a place elsewhere.
            events = str((path / "events").absolute())
            self._writers.append(EventsWriter(events, f".{os.getpid()}.{append_after_step or 0}"))
            if append_after_step is not None:
                start = SessionLog(status=SessionLog.START)
                self._writers[-1].write_event(Event(step=append_after_step + 1, session_log=start))

    def write(self, record: Record) -> None:
        """Add one point per metric and seed."""
        points = {}
        for name, value in record.values.items():
            points[name] = seed_means(value, name)
            if np.ndim(value) > 1:
                points[f"{name}_std"] = np.std(value, axis=1)
        for index, writer in enumerate(self._writers):
            values = [
                self._summary.Value(
                    tag=f"{record.kind}/{name}", simple_value=float(of_seeds[index])
                )
                for name, of_seeds in points.items()
            ]
            summary = self._summary(value=values)
            writer.write_event(
                self._event(wall_time=time.time(), step=record.step_count, summary=summary)
            )
            writer.flush()

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers:
            writer.close()


class Progress:
    """The live terminal: a bar with steps, speed, time left and the latest return.

    A context manager, so that the terminal is itself again whatever ends the run. Where output is
    no terminal (a file, a CI log) it prints one plain line per evaluation instead.

    Args:
        total_steps: environment steps per seed at the end of the run.
        num_seeds: seeds trained side by side.
        step_count: environment steps per seed already done, on a resume.
        console: where to print; standard output by default.
    """

    _MEMORY = 30.0  # seconds over which the speed is smoothed

    def __init__(
        self,
        total_steps: int,
        *,
        num_seeds: int,
        step_count: int = 0,
        console: Console | None = None,
    ):
        self._total, self._num_seeds = total_steps, num_seeds
        # FORCE_COLOR, usual in CI, makes rich take a file for a terminal; it is not one that can be
        # redrawn.
        self._console = console or Console(
            highlight=False, force_interactive=None if sys.stdout.isatty() else False
        )
        self._live = self._console.is_interactive
        columns = (BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
        self._bar = Bar(
            *columns,
            console=self._console,
            refresh_per_second=4,
            transient=True,
            disable=not self._live,
        )
        self._return, self._evaluated = "", False
        self._compile_seconds = 0.0  # in all; no part of the speed
        # Steps and seconds at the last records.
        self._times: deque[tuple[int, float]] = deque(maxlen=100)
        self._losses = ""
        self._recent = np.zeros(2)  # steps and seconds, older ones fading away
        self._task = self._bar.add_task(
            self._status(step_count), total=total_steps, completed=step_count
        )

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen and give the cursor back; safe to call twice."""
        self._bar.stop()

    def log(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """Say that `what` (such as "the update") is being compiled, and then how long that took."""
        begin = time.perf_counter()
        if self._bar.live.is_started:
            self._bar.stop()  # one live display at a time
            columns = (
                SpinnerColumn(),
                TextColumn(f"compiling {what}…", markup=False),
                TimeElapsedColumn(),
            )
            with Bar(
                *columns, console=self._console, refresh_per_second=4, transient=True
            ) as clock:
                clock.add_task("", total=None)
                yield
            self._bar.start()
        else:
            self.log(f"compiling {what}…")
            yield
        seconds = time.perf_counter() - begin
        self._compile_seconds += seconds
        self.log(f"compiled {what} in {seconds:.1f} s")

    def evaluating(self, settings: EvalConfig) -> None:
        """Say that an evaluation runs; where nothing is live, the first time."""
        modes = ("greedy", "sampled") if settings.greedy else ("sampled", "greedy")
        played = " and ".join(modes if settings.both_modes else modes[:1])
        what = f"evaluating: {settings.num_episodes} episodes, {played}…"
        if self._live:
            self._bar.update(self._task, description=what)
        elif not self._evaluated:
            self.log(what)

    def write(self, record: Record) -> None:
        """Move the bar; where nothing is live, print a line at an evaluation."""
        now = record.elapsed - self._compile_seconds
        if self._times:
            steps_before, before = self._times[-1]
            seconds = max(now - before, 0.0)
            self._recent *= 0.5 ** (seconds / self._MEMORY)
            self._recent += (record.step_count - steps_before, seconds)
        self._times.append((record.step_count, now))
        if record.kind == "train":
            self._losses = " · ".join(
                f"{name.replace('_', ' ')} {mean_and_spread(record.values[name], name)}"
                for name in _WATCHED
                if name in record.values
            )
        if RETURN in record.values and (record.kind != "train" or not self._evaluated):
            self._evaluated = record.kind != "train"
            name = {
                "train": "training return",
                "evaluation": "return",
                "absolute": "absolute return",
            }[record.kind]
            self._return = f"{name} {mean_and_spread(record.values[RETURN])}"
        status = self._status(record.step_count)
        self._bar.update(self._task, completed=record.step_count, description=status)
        if not self._live and record.kind != "train":
            self.log(status)

    def _status(self, step_count: int) -> str:
        parts = [f"{_short(step_count)}/{_short(self._total)}"]
        steps, seconds = self._recent
        if steps and seconds:
            left = timedelta(seconds=round((self._total - step_count) * seconds / steps))
            speed = median_speed(*zip(*self._times, strict=True)) * self._num_seeds
            parts += (
                [f"{_short(speed)} steps/s", f"{left} left"]
                if np.isfinite(speed)
                else [f"{left} left"]
            )
        line = " · ".join([*parts, self._return] if self._return else parts)
        return f"{line}{chr(10) if self._live else ' · '}{self._losses}" if self._losses else line


_WATCHED = ("policy_loss", "value_loss", "approx_kl", "entropy")  # of an update, in the live line


def mean_and_spread(values: np.ndarray, name: str = "") -> str:
    """Return the mean over seeds, ± their sample standard deviation, of those with a number."""
    seeds = seed_means(values, name)
    seeds = seeds[np.isfinite(seeds)]
    if not seeds.size:
        return "–"
    return f"{seeds.mean():.3f}" + (f" ± {seeds.std(ddof=1):.3f}" if seeds.size > 1 else "")


def _short(number: int | float) -> str:
    """Return a number in five characters or so: 950, 12.3k, 5.0M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
