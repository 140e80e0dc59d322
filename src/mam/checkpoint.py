"""Whole train state in, whole train state out: written in the background, complete or not there, and checked.

    <folder>/<n>/state/           the arrays, by Orbax
    <folder>/<n>/manifest.json    checksums of all files, what the leaves are, the caller's own metadata

A save is written as `<n>.partial` and renamed when its manifest is in place; older saves are deleted
only after that. Whoever is killed at any moment leaves saves that can be read. What a disk did to a save
later on shows in the checksums, and the save before it is used.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from mam.errors import RunError

_STATE, _MANIFEST, _PARTIAL = "state", "manifest.json", ".partial"


class CheckpointError(RunError):
    """A checkpoint is missing, damaged, cannot be written, or is of something else than what it is restored into."""


class Writer:
    """Saves to a folder, one after another, while the caller goes on.

    Args:
        folder: the run's checkpoint folder; made if missing, and cleared of what a killed save left behind.
        keep: how many of the newest saves to keep.
        after: the save to go on from; damaged ones that are newer are deleted. None begins anew.
    """

    def __init__(self, folder: Path, *, keep: int = 2, after: "Save | None" = None):
        self._folder, self._keep = folder, keep
        self._number = 0 if after is None else int(after.path.name)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            newer = [folder / str(number) for number in _numbers(folder) if number > self._number]
            for left in (*folder.glob(f"*{_PARTIAL}"), *newer):
                shutil.rmtree(left)

    def save(self, state: PyTree, meta: dict[str, Any]) -> None:
        """Begins to write a save, once the one before it is done.

        Args:
            state: pytree of JAX arrays (typed PRNG keys included), NumPy arrays and numbers; may be changed or
                donated as soon as this returns.
            meta: whatever is to be known before the state is restored, as JSON.

        Raises:
            CheckpointError: if a leaf of `state` is neither an array nor a number, or the save before this failed.
        """
        leaves = _named_leaves(state)
        described = {name: _describe(name, leaf) for name, leaf in leaves.items()}
        # Orbax refuses arrays without elements; their shape, in the manifest, says all there is.
        arrays = _copy({name: _to_array(leaf) for name, leaf in leaves.items() if np.size(leaf)})
        self.wait()
        self._number += 1
        self._pending = self._pool.submit(self._write, self._number, arrays, {"leaves": described, "meta": meta})
        if jax.process_count() > 1:
            self.wait()  # Orbax's barriers between processes must not meet the train step's collectives

    def wait(self, timeout: float | None = None) -> None:
        """Returns when everything is on disk, or after so many seconds.

        Raises:
            CheckpointError: if the last save failed; those before it are intact.
        """
        if self._pending is not None:
            try:
                self._pending.result(timeout)
                self._pending = None
            except TimeoutError:
                return
            except (OSError, ValueError, RuntimeError) as error:  # Orbax wraps what the system says
                raise CheckpointError(f"cannot write a checkpoint to {self._folder}: {_one_line(error)}") from error

    def close(self) -> None:
        """Waits for what is being written."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _write(self, number: int, arrays: dict[str, Any], contents: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        path = self._folder / f"{number}{_PARTIAL}"
        first = jax.process_index() == 0
        if first:
            path.mkdir()
        with _quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:  # all processes write their share
            orbax.save(path.resolve() / _STATE, args=ocp.args.StandardSave(arrays))
        if not first:
            return
        files = {str(f.relative_to(path)): _checksum(f) for f in _files(path)}
        _write_manifest(path / _MANIFEST, {"files": files, **contents})
        path.rename(self._folder / str(number))
        _sync(self._folder)
        for old in _numbers(self._folder)[self._keep :]:
            shutil.rmtree(self._folder / str(old))


@dataclass(frozen=True)
class Save:
    """One complete save, its files as they were written."""

    path: Path
    leaves: dict[str, str]  # name → dtype and shape
    meta: dict[str, Any]

    def restore(self, like: PyTree) -> PyTree:
        """Reads the state, bit for bit.

        Args:
            like: pytree of the structure, shapes and dtypes to expect, for instance a freshly initialised
                state; leaves may be `jax.ShapeDtypeStruct`. JAX arrays return with the sharding they have here,
                whatever it was when they were saved.

        Returns:
            The state, with the containers of `like` and the values of the save.

        Raises:
            CheckpointError: if the save does not fit `like`; the message names the first leaf that differs.
        """
        import orbax.checkpoint as ocp

        leaves = _named_leaves(like)
        _compare(self.path, self.leaves, {name: _describe(name, leaf) for name, leaf in leaves.items()})
        targets = {name: _target(leaf) for name, leaf in leaves.items()}
        stored = {name: target for name, target in targets.items() if target.size}
        with _quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
            arrays = orbax.restore(self.path.resolve() / _STATE, args=ocp.args.StandardRestore(stored))
        empty = {name: np.empty(target.shape, target.dtype) for name, target in targets.items() if not target.size}
        values = [_from_array((arrays | empty)[name], leaf) for name, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(like), values)


def has_saves(folder: Path) -> bool:
    """Whether a save was ever completed there."""
    return bool(_numbers(folder))


def newest(folder: Path, *, warn: Callable[[str], None] = lambda line: None) -> Save:
    """The newest save that is intact.

    Args:
        folder: the run's checkpoint folder.
        warn: hears about each newer one that is not.

    Raises:
        CheckpointError: if there is none.
    """
    damaged = []
    for number in _numbers(folder):
        try:
            save = _open(folder / str(number))
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for problem in damaged:
            warn(f"{problem}; using the one before it, {save.path}")
        return save
    raise CheckpointError("; ".join(damaged) or f"no checkpoint in {folder}")


def _open(path: Path) -> Save:
    """A save whose files are all there and as they were written."""
    try:
        manifest = _read_manifest(path / _MANIFEST)
        for name, checksum in manifest["files"].items():
            if _checksum(path / name) != checksum:
                raise ValueError(f"{name} has changed")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {_one_line(error)}") from error
    return Save(path, manifest["leaves"], manifest["meta"])


def _write_manifest(path: Path, contents: dict[str, Any]) -> None:
    """JSON on two lines: the contents, and their checksum."""
    text = json.dumps(contents)
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    text = data[: -len("\n") * 2 - 64]
    if data != text + f"\n{hashlib.sha256(text).hexdigest()}\n".encode():
        raise ValueError(f"{path.name} has changed")
    return json.loads(text)


def _numbers(folder: Path) -> list[int]:
    """Of all complete saves, newest first."""
    return sorted((int(f.name) for f in folder.glob("*") if f.name.isdecimal()), reverse=True)


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())


def _checksum(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Makes a rename last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax, silent below warnings."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


def _copy(arrays: dict[str, Any]) -> dict[str, Any]:
    """Arrays that stay what they are when the originals are donated or changed."""
    on_device = {name: x for name, x in arrays.items() if isinstance(x, jax.Array)}
    return {name: np.array(x) for name, x in arrays.items() if name not in on_device} | _copy_on_device(on_device)


_copy_on_device = jax.jit(partial(jax.tree.map, jnp.copy))


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by their place in the tree, such as `state.params['w'][0]`, in flattening order."""
    return {f"state{jax.tree_util.keystr(path)}": leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(name: str, leaf: Any) -> str:
    """Dtype and shape as text, such as `float32[2,3]` or `key<fry>[]`; the latter remembers the kind of generator."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        leaf = np.asarray(leaf)
    if not _is_key(leaf) and not (jnp.issubdtype(leaf.dtype, np.number) or leaf.dtype == np.bool_):
        raise CheckpointError(f"{name} is neither an array nor a number")
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _compare(folder: Path, saved: dict[str, str], expected: dict[str, str]) -> None:
    """Refuses a checkpoint whose leaves are not those expected."""
    for name in [*expected, *saved]:
        if saved.get(name) != expected.get(name):
            raise CheckpointError(
                f"the checkpoint in {folder} does not fit: {name} is {saved.get(name, 'missing')} in the checkpoint, "
                f"{expected.get(name, 'missing')} here"
            )


def _to_array(leaf: Any) -> Any:
    """A leaf as Orbax stores it: keys as their bits, numbers as arrays."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _target(leaf: Any) -> Any:
    """What Orbax is asked for: a JAX array if `leaf` is bound to devices, otherwise a NumPy array."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return np.asarray(leaf)
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf) if isinstance(leaf, jax.Array) else jax.eval_shape(jax.random.key_data, leaf)
    bound = leaf.committed if isinstance(leaf, jax.Array) else leaf.sharding is not None
    if bound:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.empty(leaf.shape, leaf.dtype)


def _from_array(array: Any, like: Any) -> Any:
    """A stored array as the kind of leaf that `like` is."""
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array), dtype=like.dtype)
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return jnp.asarray(array)  # what came as NumPy is bound to no device, just as `like` is not
    array = np.asarray(array)
    return array if isinstance(like, np.ndarray) else array[()] if isinstance(like, np.generic) else array.item()
