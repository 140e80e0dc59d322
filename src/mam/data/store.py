"""A dataset of joint trajectories on disk: whole episodes, to which others are appended.

    <folder>/dataset.json       the task, without agents' ids, and where the episodes come from
    <folder>/arrays/<field>     zarr arrays, compressed in chunks: a row for each environment step
    <folder>/episodes.jsonl     a line for each append: its rows, its episodes, and checksums

An append writes its rows and then its line. Rows without a line are not there: they are written
over. A process that is killed at any moment leaves whole episodes, each of them once.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mam.config import from_json
from mam.data.steps import OPTIONAL, SUCCESSOR, Rows, concatenate, layout, to_rows, to_steps
from mam.errors import UserError, needs_extra
from mam.types import EnvSpec, Transition

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

FACTS, LINES, ARRAYS = "dataset.json", "episodes.jsonl", "arrays"
FORMAT = 1
_CHUNK_BYTES = 2**18  # of a chunk before it is compressed
_BUFFERED = 4096  # steps that a writer holds back


def tensorstore() -> Any:
    """Return the array store.

    Raises:
        UserError: if it is not installed.
    """
    with needs_extra("a dataset", "tensorstore", "data"):
        import tensorstore
    return tensorstore


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say in one line that a dataset is damaged, and why.

    Raises:
        UserError: for whatever goes wrong in reading a file of unknown origin.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"the dataset {path} is damaged: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        first = why.split("\n")[0].split(" [tensorstore")[0]
        raise UserError(f"the dataset {path} is damaged: {first}") from error


@dataclass(frozen=True)
class Append:
    """Episodes that were appended together, and where their rows are."""

    first: int  # step
    first_successor: int
    lengths: tuple[int, ...]  # of its episodes
    returns: tuple[float, ...]
    num_successors: int
    sha256: str  # of all its rows

    @property
    def stop(self) -> int:
        """The step behind its last."""
        return self.first + sum(self.lengths)

    @property
    def stop_successor(self) -> int:
        """The successor behind its last."""
        return self.first_successor + self.num_successors

    def place(self, name: str) -> slice:
        """Return the rows of a field."""
        own = name.startswith(SUCCESSOR)
        return (
            slice(self.first_successor, self.stop_successor)
            if own
            else slice(self.first, self.stop)
        )


@dataclass(frozen=True)
class Dataset:
    """Episodes of one task, read in part or as a whole."""

    path: Path
    spec: EnvSpec  # without agents' ids
    optional: tuple[str, ...]  # which of log_prob, value and order were recorded
    provenance: Mapping[str, Any]
    appends: tuple[Append, ...] = field(repr=False, default=())

    @classmethod
    def open(cls, path: Path) -> "Dataset":
        """Open a dataset; no trajectory is read.

        Raises:
            UserError: if there is none, or its files are damaged.
        """
        if not (path / FACTS).exists():
            raise UserError(f"{path} holds no dataset: there is no {FACTS} in it")
        with reading(path):
            facts = json.loads((path / FACTS).read_bytes())
            if facts["format"] != FORMAT:
                raise ValueError(f"its format is {facts['format']}, this version reads {FORMAT}")
            spec = from_json(EnvSpec, facts["spec"])
            optional = tuple(name for name in OPTIONAL if name in facts["optional"])
            appends, _ = _read_lines(path / LINES)
        return cls(path, spec, optional, facts["provenance"], appends)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Steps of each episode."""
        return np.array([n for one in self.appends for n in one.lengths], np.int64)

    @cached_property
    def returns(self) -> np.ndarray:
        """Return of each episode: the sum of its rewards, averaged over agents."""
        return np.array([x for one in self.appends for x in one.returns], np.float64)

    @property
    def fingerprint(self) -> str:
        """Return what tells datasets of other contents apart; only small files are read for it."""
        lines = [asdict(one) for one in self.appends]
        return hashlib.sha256(json.dumps([asdict(self.spec), lines]).encode()).hexdigest()

    def read(self, episodes: Sequence[int] | np.ndarray | None = None) -> Transition:
        """Read episodes, one after another, [steps, …]; all of them if None.

        Raises:
            UserError: if there are none, or their rows are not as they were written.
        """
        wanted = np.arange(len(self.lengths)) if episodes is None else np.asarray(episodes)
        if not len(wanted):
            raise UserError(f"the dataset {self.path} holds no episodes")
        found, first = {}, 0
        for one in self.appends:
            here = wanted[(wanted >= first) & (wanted < first + len(one.lengths))]
            if len(here):
                steps, starts = self._read(one), np.cumsum((0, *one.lengths)).tolist()
                found |= {k: cut(steps, starts[k - first], starts[k - first + 1]) for k in here}
            first += len(one.lengths)
        return concatenate([found[k] for k in wanted])

    def _read(self, one: Append) -> Transition:
        with reading(self.path):
            parts = {name: self._arrays[name][one.place(name)].read() for name in self._arrays}
            rows = {name: np.asarray(part.result()) for name, part in parts.items()}
            if checksum(rows) != one.sha256:
                raise ValueError(f"steps {one.first:,} to {one.stop:,} have changed")
            return to_steps(rows)

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        with reading(self.path):
            return _open_arrays(self.path, self.spec, self.optional)


def cut(steps: Transition, start: int, stop: int) -> Transition:
    """Return some of the steps, in a row."""
    return jax.tree.map(lambda x: x[start:stop], steps)


def checksum(rows: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of the bytes of all fields, by name."""
    digest = hashlib.sha256()
    for name in sorted(rows):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(rows[name]).tobytes())
    return digest.hexdigest()


def episode_returns(steps: Transition) -> tuple[list[int], list[float]]:
    """Return the lengths and the returns of whole episodes."""
    stops = np.flatnonzero(np.asarray(steps.terminated) | np.asarray(steps.truncated)) + 1
    starts = np.concatenate([[0], stops[:-1]])
    rewards = np.asarray(steps.reward, np.float64).mean(axis=-1)
    pairs = list(zip(starts.tolist(), stops.tolist(), strict=True))
    return [b - a for a, b in pairs], [float(rewards[a:b].sum()) for a, b in pairs]


class Writer:
    """Appends whole episodes to a dataset, new or old; a context manager.

    Episodes are held back until there are many steps; `flush` and the end write them.

    Args:
        path: folder of the dataset, made if missing.
        spec: of the task, without agents' ids.
        optional: which of log_prob, value and order the steps have.
        provenance: where the episodes come from, as JSON.

    Raises:
        UserError: if the folder holds other things, a dataset of another task, or one that another
            process appends to.
    """

    def __init__(
        self,
        path: Path,
        spec: EnvSpec,
        *,
        optional: Sequence[str] = (),
        provenance: Mapping[str, Any] | None = None,
    ):
        tensorstore()
        self._spec, self._optional = spec, tuple(name for name in OPTIONAL if name in optional)
        self._held: list[tuple[Rows, list[int], list[float]]] = []
        self._made = not (path / FACTS).exists()
        if self._made:
            _make(path, spec, self._optional, dict(provenance or {}))
        old = Dataset.open(path)
        if (old.spec, old.optional) != (spec, self._optional):
            raise UserError(
                f"{path} holds {_described(old.spec, old.optional)}, "
                f"not {_described(spec, self._optional)}: choose another folder"
            )
        self.path = path
        self._file = _lock(path / LINES)
        with reading(path):
            appends, end = _read_lines(path / LINES)
            self._file.truncate(end)  # a line that a killed writer left unfinished
            self._arrays = _open_arrays(path, spec, self._optional)
        last = appends[-1] if appends else None
        self._next = (last.stop, last.stop_successor) if last else (0, 0)
        self.num_episodes, self.num_steps = sum(len(a.lengths) for a in appends), self._next[0]

    def append(self, steps: Transition) -> None:
        """Append whole episodes.

        Args:
            steps: of one episode or several, [T, …], without agents' ids.

        Raises:
            UserError: if they are not whole episodes of the dataset's task.
        """
        rows = to_rows(steps, self._spec, self._optional)
        lengths, returns = episode_returns(steps)
        self._held.append((rows, lengths, returns))
        self.num_episodes, self.num_steps = (
            self.num_episodes + len(lengths),
            self.num_steps + sum(lengths),
        )
        if self.num_steps - self._next[0] >= _BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Write what was held back."""
        if not self._held:
            return
        held = self._held
        whole = {name: np.concatenate([rows[name] for rows, *_ in held]) for name in held[0][0]}
        first, first_successor = self._next
        one = Append(
            first=first,
            first_successor=first_successor,
            lengths=tuple(n for _, lengths, _ in held for n in lengths),
            returns=tuple(x for *_, returns in held for x in returns),
            num_successors=int(whole["has_successor"].sum()),
            sha256=checksum(whole),
        )
        self._write(whole, one)
        text = json.dumps(asdict(one))
        self._file.write(f"{text} {zlib.crc32(text.encode()):08x}\n".encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._next, self._held = (one.stop, one.stop_successor), []

    def _write(self, rows: Mapping[str, np.ndarray], one: Append) -> None:
        """Write rows behind those that are there, and return when they are on disk."""
        sizes = {name: one.place(name).stop for name in rows}
        resized = {
            name: self._arrays[name].resize(exclusive_max=[size, *self._arrays[name].shape[1:]])
            for name, size in sizes.items()
        }
        self._arrays = {name: future.result() for name, future in resized.items()}
        written = [self._arrays[name][one.place(name)].write(x) for name, x in rows.items()]
        for future in written:
            future.result()

    def close(self) -> None:
        """Write what was held back, and let others append; take a new dataset away if empty."""
        try:
            if not self._file.closed:
                self.flush()
        finally:
            if self._made and not self._next[0]:
                _take_away(self.path)
            self._file.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _described(spec: EnvSpec, optional: Sequence[str]) -> str:
    actions = spec.joint_action
    return (
        f"{spec.name} with {spec.num_agents} agents, {spec.obs_dim} features and actions "
        f"{actions.dtype}{[*actions.shape]} of {spec.num_actions}"
        + (f" ({', '.join(optional)})" if optional else "")
    )


def _make(path: Path, spec: EnvSpec, optional: Sequence[str], provenance: dict[str, Any]) -> None:
    """Make an empty dataset; its facts come last, without which there is none."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(other.name not in (LINES, ARRAYS, FACTS + ".tmp") for other in path.iterdir()):
            raise UserError(f"{path} holds other things than a dataset: choose another folder")
        (path / LINES).touch()
        _open_arrays(path, spec, optional, create=True)
        facts = {"format": FORMAT, "spec": asdict(spec), "optional": [*optional]}
        text = json.dumps(facts | {"provenance": provenance}, indent=2)
        temporary = path / f"{FACTS}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path / FACTS)
    except OSError as error:
        raise UserError(f"cannot make the dataset {path}: {error.strerror or error}") from error


def _take_away(path: Path) -> None:
    """Undo `_make`."""
    for file in (FACTS, LINES):
        (path / file).unlink(missing_ok=True)
    shutil.rmtree(path / ARRAYS, ignore_errors=True)
    with suppress(OSError):  # others have put something there
        path.rmdir()


def _open_arrays(
    path: Path, spec: EnvSpec, optional: Sequence[str], *, create: bool = False
) -> dict[str, Any]:
    """Open the array of every field; `create` replaces what is there."""
    ts, opened = tensorstore(), {}
    for name, (shape, dtype) in layout(spec, optional).items():
        size = max(1, dtype.itemsize * int(np.prod(shape)))
        store = {"driver": "file", "path": str((path / ARRAYS / name).absolute())}
        metadata = {
            "shape": [0, *shape],
            "chunks": [min(2**16, max(64, _CHUNK_BYTES // size)), *(max(1, n) for n in shape)],
            "dtype": dtype.str,
            "compressor": {"id": "zstd", "level": 3},
        }
        asked = {"driver": "zarr", "kvstore": store, **({"metadata": metadata} if create else {})}
        opened[name] = ts.open(asked, open=not create, create=create, delete_existing=create)
    arrays = {name: future.result() for name, future in opened.items()}
    for name, (shape, dtype) in layout(spec, optional).items():
        found = arrays[name]
        if (found.shape[1:], found.dtype.numpy_dtype) != (shape, dtype):
            raise ValueError(f"the array {name} has other rows than {dtype}{[*shape]}")
    return arrays


def _lock(path: Path) -> Any:
    """Open a file to append to, and lock it against other processes."""
    file = path.open("ab")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"another process appends to the dataset {path.parent}: wait for it, or end it first"
        ) from None
    except OSError:  # this file system has no locks
        pass
    return file


def _read_lines(path: Path) -> tuple[tuple[Append, ...], int]:
    """Read the appends, and where the last whole line ends."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    appends: list[Append] = []
    for number, line in enumerate(data[:end].decode().splitlines(), 1):
        text, _, crc = line.rpartition(" ")
        if f"{zlib.crc32(text.encode()):08x}" != crc:
            raise ValueError(f"line {number} of {path.name} has changed")
        one = json.loads(text)
        one |= {name: tuple(one[name]) for name in ("lengths", "returns")}
        appends.append(Append(**one))
    return tuple(appends), end
