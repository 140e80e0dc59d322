"""Metrics of a run being written, as columns: a byte is read once, a row takes only its numbers."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
from jaxtyping import Float, Int

from mam.runs.files import TAIL, goes_on, open_regular
from mam.runs.sinks import is_of_infos, seed_means

CHUNK = 1 << 20  # bytes parsed at once: other threads wait no longer than that takes
MAX_LINE = 1 << 23  # bytes of a line; longer ones are skipped and counted
MAX_READ = 1 << 26  # bytes read of a file before the next one's turn
MAX_BYTES = 1 << 28  # held per run and kind, beyond which rows are dropped as beyond MAX_ROWS
# Rows kept per run and kind; beyond them every second one is dropped, then every second of those…
MAX_ROWS = 1 << 18
_HEAD = ("kind", "update", "step_count", "elapsed")


@dataclass(frozen=True)
class Rows:
    """Records of one kind. Values are means over episodes, NaN where there is none."""

    steps: Int[np.ndarray, "rows"]  # environment steps done, per seed
    elapsed: Float[np.ndarray, "rows"]  # seconds since the run began
    values: Mapping[str, Float[np.ndarray, "rows seeds"]]  # by metric


class Columns:
    """Rows that get more, in arrays with room to grow; one thread may append while others read.

    Args:
        dtype: of the values. JAX computes metrics in float32, which so loses nothing; means over
            episodes need float64.
    """

    def __init__(self, dtype: type[np.floating]):
        self._dtype, self._size, self._seen, self._stride = dtype, 0, 0, 1
        self._steps, self._elapsed = np.empty(0, np.int64), np.empty(0, np.float64)
        self._values: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._size

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(array.nbytes for array in (self._steps, self._elapsed, *self._values.values()))

    @property
    def metrics(self) -> list[str]:
        """Names of what was recorded, in the order of the file."""
        return list(self._values)

    def rows(self, metrics: Iterable[str]) -> Rows:
        """Copy all rows of some metrics."""
        with self._lock:
            end = self._size
            values = {
                name: self._values[name][:end].copy() for name in metrics if name in self._values
            }
            return Rows(self._steps[:end].copy(), self._elapsed[:end].copy(), values)

    def last(self, metric: str) -> Float[np.ndarray, "seeds"] | None:
        """Return the newest row of a metric; None if there is none."""
        with self._lock:
            return (
                self._values[metric][self._size - 1].copy()
                if self._size and metric in self._values
                else None
            )

    def check(self, new: Rows) -> None:
        """Check that rows can be appended.

        Raises:
            ValueError: if a metric has another number of seeds than before, or a row has too many
                numbers.
        """
        if 2 * self._row_bytes(new) > MAX_BYTES:
            raise ValueError("a row of more numbers than can be kept")
        for name, values in new.values.items():
            if name in self._values and self._values[name].shape[1:] != values.shape[1:]:
                raise ValueError(
                    f"{name} has {values.shape[1]} seeds, and had {self._values[name].shape[1]}"
                )

    def _row_bytes(self, new: Rows) -> int:
        """Return the bytes of a row once it has the new metrics, too."""
        widths = {
            name: values.shape[1] for name, values in (*self._values.items(), *new.values.items())
        }
        return 16 + np.dtype(self._dtype).itemsize * sum(widths.values())

    def append(self, new: Rows) -> None:
        """Add rows that were checked; metrics that either side lacks are NaN there."""
        with self._lock:
            self._append(new)

    def _append(self, new: Rows) -> None:
        count, most = len(new.steps), min(MAX_ROWS, MAX_BYTES // self._row_bytes(new))
        while -(-(self._seen + count) // self._stride) > most:
            self._thin()
        kept = np.arange(-self._seen % self._stride, count, self._stride)
        self._seen += count
        begin, end = self._size, self._size + len(kept)
        self._steps = self._with_room(self._steps, end)
        self._elapsed = self._with_room(self._elapsed, end)
        self._steps[begin:end], self._elapsed[begin:end] = new.steps[kept], new.elapsed[kept]
        for name, values in new.values.items():
            if name not in self._values:
                self._values[name] = np.full(
                    (len(self._steps), values.shape[1]), np.nan, self._dtype
                )
        for name, array in self._values.items():
            self._values[name] = array = self._with_room(array, end)
            array[begin:end] = new.values[name][kept] if name in new.values else np.nan
        self._size = end

    def _thin(self) -> None:
        self._stride *= 2
        self._steps, self._elapsed = (
            self._steps[: self._size : 2].copy(),
            self._elapsed[: self._size : 2].copy(),
        )
        self._values = {
            name: array[: self._size : 2].copy() for name, array in self._values.items()
        }
        self._size = len(self._steps)

    @staticmethod
    def _with_room(array: np.ndarray, size: int) -> np.ndarray:
        if size <= len(array):
            return array
        larger = np.empty((max(size, len(array) * 5 // 4), *array.shape[1:]), array.dtype)
        larger[: len(array)] = array
        return larger


@dataclass
class Metrics:
    """All of a metrics.jsonl up to some position; replaced as a whole when the file starts anew."""

    train: Columns = field(default_factory=lambda: Columns(np.float32))
    evaluation: Columns = field(default_factory=lambda: Columns(np.float64))
    absolute: Columns = field(default_factory=lambda: Columns(np.float64))
    last_kind: str = ""  # of the newest row
    step_count: int = 0  # of the newest row
    elapsed: float = 0.0  # of the newest row
    longest_gap: float = 0.0  # seconds between two rows
    damaged: int = 0  # lines that could not be read, or were too long to be

    def of(self, kind: str) -> Columns:
        """Return the columns of a kind of record.

        Raises:
            ValueError: if there is no such kind.
        """
        if kind not in ("train", "evaluation", "absolute"):
            raise ValueError(f"unknown kind {kind!r}")
        return getattr(self, kind)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(columns.nbytes for columns in (self.train, self.evaluation, self.absolute))


class Reader:
    """Follows a metrics.jsonl from the position last read.

    A half-written last line waits for its end; one without end is skipped. A file that was cut, as
    a resumed run does, or replaced is read anew: which shows in its size, or in other bytes before
    the position.

    Attributes:
        metrics: what was read.
    """

    def __init__(self, path: Path):
        self._path = path
        self._begin()

    def _begin(self) -> None:
        self.metrics = Metrics()
        self._position, self._tail, self._stat = 0, b"", (-1, -1, -1)
        self._skipping = False  # within a line that is too long

    def poll(self) -> bool:
        """Read what is new, of very much the next part; say whether there was anything."""
        try:
            stat = self._path.stat()
        except OSError:
            return False
        if (now := (stat.st_ino, stat.st_size, stat.st_mtime_ns)) == self._stat:
            return False
        try:
            with open_regular(self._path) as file:
                return self._read(
                    file, stat.st_size, anew=self._stat[0] not in (-1, stat.st_ino), stat=now
                )
        except OSError:
            return False

    def _read(self, file: IO[bytes], size: int, *, anew: bool, stat: tuple[int, int, int]) -> bool:
        if (
            changed := anew
            or size < self._position
            or not goes_on(file, self._position, self._tail)
        ):
            self._begin()
        self._stat = stat
        file.seek(self._position)
        pending, stop = bytearray(), self._position + MAX_READ
        while more := file.read(CHUNK):
            pending += more
            end = pending.rfind(b"\n", len(pending) - len(more)) + 1
            if not end and len(pending) <= MAX_LINE:
                continue
            self._take(bytes(pending[: end or None]), whole=end > 0)
            del pending[: end or None]
            changed = True
            if self._position >= stop:
                self._stat = (stat[0], -1, -1)  # there may be more
                break
        return changed

    def _take(self, text: bytes, *, whole: bool) -> None:
        """Read lines; what is not whole is a part of one that is too long."""
        self._position += len(text)
        self._tail = (self._tail + text)[-TAIL:]
        lines = text.split(b"\n")[: -1 if whole else 0]
        if self._skipping and whole:
            lines[0] = b" " * (MAX_LINE + 1)
        self._skipping = not whole
        self.metrics.damaged += sum(len(line) > MAX_LINE for line in lines)
        self._parse([line for line in lines if len(line) <= MAX_LINE])

    def _parse(self, lines: Sequence[bytes]) -> None:
        try:
            self._add(orjson.loads(b"[" + b",".join(lines) + b"]"))
        except Exception:  # whatever a line may hold
            for line in lines:  # all but the damaged ones
                try:
                    self._add([orjson.loads(line)])
                except Exception:
                    self.metrics.damaged += 1

    def _add(self, rows: Sequence[dict[str, Any]]) -> None:
        if not rows:
            return
        metrics = self.metrics
        elapsed = np.array([row["elapsed"] for row in rows], np.float64)
        if not (np.isfinite(elapsed).all() and all(type(row["step_count"]) is int for row in rows)):
            raise ValueError("no time, or no number of steps")
        kinds = {
            kind: [row for row in rows if row["kind"] == kind]
            for kind in {row["kind"] for row in rows}
        }
        parsed = [(metrics.of(kind), _columns(of_kind)) for kind, of_kind in kinds.items()]
        for columns, new in parsed:
            columns.check(new)
        for columns, new in parsed:
            columns.append(new)
        if metrics.last_kind:
            elapsed = np.concatenate([[metrics.elapsed], elapsed])
        metrics.longest_gap = max(metrics.longest_gap, float(np.diff(elapsed).max(initial=0.0)))
        last = rows[-1]
        metrics.last_kind, metrics.step_count = last["kind"], int(last["step_count"])
        metrics.elapsed = float(last["elapsed"])


def _columns(rows: Sequence[dict[str, Any]]) -> Rows:
    names = [
        name for name in dict.fromkeys(name for row in rows for name in row) if name not in _HEAD
    ]
    return Rows(
        steps=np.array([row["step_count"] for row in rows], np.int64),
        elapsed=np.array([row["elapsed"] for row in rows], np.float64),
        values=_values(rows, names),
    )


def _values(
    rows: Sequence[dict[str, Any]], names: Sequence[str]
) -> dict[str, Float[np.ndarray, "rows seeds"]]:
    """Parse all metrics at once where they are alike, which is fast for many, or one by one."""
    alike = [name for name in names if not is_of_infos(name)]
    try:
        block = np.array([[row[name] for name in alike] for row in rows], np.float64)
        block = block.reshape(*block.shape[:3], -1).mean(axis=-1) if block.ndim > 3 else block
        block = block.reshape(len(rows), len(alike), -1).swapaxes(0, 1)
        found = dict(zip(alike, block, strict=True))
    except (KeyError, ValueError):  # not in every row, or of other numbers of seeds or episodes
        found = {}
    rest = [name for name in names if name not in found]
    return found | {name: _means([row.get(name) for row in rows], name) for name in rest}


def _means(values: Sequence[Any], metric: str) -> Float[np.ndarray, "rows seeds"]:
    """Average over episodes, by row and seed; None, and a row without the metric, become NaN."""
    if None not in values and not is_of_infos(metric):
        try:
            array = np.array(values, np.float64)
            return (
                array.reshape(*array.shape[:2], -1).mean(axis=2)
                if array.ndim > 2
                else array.reshape(len(array), -1)
            )
        except ValueError:
            pass  # rows with different numbers of episodes
    some = next((value for value in values if value is not None), None)
    if some is None:
        raise ValueError("a metric without a number")
    return np.stack(
        [
            np.full(len(some), np.nan)
            if value is None
            else seed_means(np.array(value, np.float64), metric)
            for value in values
        ]
    )
