"""Saves of the whole train state: written in the background, complete or not there, and checked.

    <folder>/<n>/arrays.safetensors    the arrays, by their leaves' names
    <folder>/<n>/manifest.json         its checksum, what the leaves are, the caller's own metadata

A save is written as `<n>.partial`, read back, and then renamed; older saves are deleted only after
that. A process that is killed at any moment leaves saves that can be read. What a disk did to a
save later on shows in the checksums, and the save before it is used.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Container
from concurrent import futures
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from mam.errors import RunError, UserError
from mam.runs.files import open_regular, parse_object

_ARRAYS, _MANIFEST, _PARTIAL = "arrays.safetensors", "manifest.json", ".partial"
# Parts of leaves' names, and what older versions called them.
_RENAMED = {".distribution.": ".kind.", ".memory.agents": ".memory", ".image.": ".picture."}
_ORBAX = "state"  # where the first versions of the library kept a save's arrays


class CheckpointError(RunError):
    """A checkpoint is missing, damaged, cannot be written, or does not fit."""


class Writer:
    """Saves to a folder, one after another, while the caller goes on.

    Args:
        folder: the run's checkpoint folder; made if missing, and cleared of what a killed save left
            behind.
        keep: how many of the newest saves to keep.
        after: the save to go on from; damaged ones that are newer are deleted. None begins anew.
    """

    def __init__(self, folder: Path, *, keep: int = 2, after: "Save | None" = None):
        self._folder, self._keep = folder, keep
        self._number = 0 if after is None else int(after.path.name)
        self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: futures.Future[None] | None = None
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            newer = [folder / str(number) for number in _numbers(folder) if number > self._number]
            for left in (*folder.glob(f"*{_PARTIAL}"), *newer):
                _remove(left)

    def save(self, state: PyTree, meta: dict[str, Any]) -> None:
        """Begin to write a save, once the one before it is done.

        Args:
            state: pytree of JAX arrays (typed PRNG keys included), NumPy arrays and numbers; may be
                changed or donated as soon as this returns.
            meta: whatever is to be known before the state is restored, as JSON.

        Raises:
            CheckpointError: if a leaf of `state` is neither an array nor a number, or the save
                before this failed.
        """
        leaves = _named_leaves(state)
        described = {name: _describe(name, leaf) for name, leaf in leaves.items()}
        arrays = _copy({name: _to_array(leaf) for name, leaf in leaves.items()})
        self.wait()
        self._number += 1
        if jax.process_index() == 0:
            contents = {"number": self._number, "leaves": described, "meta": meta}
            self._pending = self._pool.submit(self._write, arrays, contents)

    def wait(self, timeout: float | None = None) -> None:
        """Return when everything is on disk, or after so many seconds.

        Raises:
            CheckpointError: if the last save failed; those before it are intact.
        """
        if self._pending is None or not futures.wait([self._pending], timeout).done:
            return
        written, self._pending = self._pending, None
        if (error := written.exception()) is not None:
            if not isinstance(error, OSError | CheckpointError):
                raise error
            raise CheckpointError(
                f"cannot write a checkpoint to {self._folder}: {_reason(error)}"
            ) from error

    def close(self) -> None:
        """Wait for what is being written."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _write(self, arrays: dict[str, Any], contents: dict[str, Any]) -> None:
        number = contents["number"]
        path, final = self._folder / f"{number}{_PARTIAL}", self._folder / str(number)
        path.mkdir()
        try:
            checksum = _write_arrays(path / _ARRAYS, arrays)
            _write_manifest(path / _MANIFEST, {"sha256": checksum, **contents})
            _open(path, number)  # what cannot be read again is no save, and no reason to delete one
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)  # on a full disk there is room again to say so
            raise
        if os.path.lexists(final):  # not a save, which would have been continued or deleted
            _remove(final)
        path.rename(final)
        _sync(self._folder)
        for old in _numbers(self._folder)[self._keep :]:
            _remove(self._folder / str(old))


@dataclass(frozen=True)
class Save:
    """One complete save, its files as they were written."""

    path: Path
    leaves: dict[str, str]  # name → dtype and shape
    meta: dict[str, Any]

    def restore(self, like: PyTree, part: str = "") -> PyTree:
        """Read the state, or a part of it, bit for bit.

        Args:
            like: pytree of the structure, shapes and dtypes to expect, for instance a freshly
                initialised state; leaves may be `jax.ShapeDtypeStruct`. JAX arrays return with the
                sharding they have here, whatever it was when they were saved.
            part: the attribute of the state that is wanted, such as `.policy`; all of it if empty.

        Returns:
            The state, with the containers of `like` and the values of the save.

        Raises:
            CheckpointError: if the save does not fit `like`; the message names the first leaf that
                differs.
        """
        leaves = {
            _stored_name(name, self.leaves): leaf
            for name, leaf in _named_leaves(like, part).items()
        }
        saved = {name: leaf for name, leaf in self.leaves.items() if _belongs(name, f"state{part}")}
        _compare(self.path, saved, {name: _describe(name, leaf) for name, leaf in leaves.items()})
        shapes = {name: _shape(leaf) for name, leaf in leaves.items()}
        try:
            arrays = self._read_orbax(shapes) if (self.path / _ORBAX).is_dir() else self._read()
        except (OSError, ValueError) as error:
            raise _damaged(self.path, error) from error
        arrays = {name: arrays[name].view(shape.dtype) for name, shape in shapes.items()}
        values = [_from_array(arrays[name], leaf) for name, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(like), values)

    def _read(self) -> dict[str, np.ndarray]:
        from safetensors.numpy import load

        with open_regular(self.path / _ARRAYS) as file:
            return load(file.read())

    def _read_orbax(self, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
        """Read the arrays of a save of the first versions, which left out those of no elements."""
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:
            raise UserError(
                f"{self.path} is of an older version of mam: "
                "to read it, pip install orbax-checkpoint"
            ) from error
        empty = {name: np.empty(shape.shape, shape.dtype) for name, shape in shapes.items()}
        stored = {name: array for name, array in empty.items() if array.size}
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
            return empty | orbax.restore(
                self.path.resolve() / _ORBAX, args=ocp.args.StandardRestore(stored)
            )


def has_saves(folder: Path) -> bool:
    """Say whether a save was ever completed there."""
    return bool(_numbers(folder))


def newest(
    folder: Path,
    *,
    valid: Callable[[dict[str, Any]], bool] = lambda meta: True,
    warn: Callable[[str], None] = lambda line: None,
) -> Save:
    """Open the newest save that is intact.

    Args:
        folder: the run's checkpoint folder.
        valid: whether metadata is of the kind that the caller writes; what has other metadata is
            damaged.
        warn: called with a line about each newer one that is not.

    Raises:
        CheckpointError: if there is none.
    """
    damaged = []
    for number in _numbers(folder):
        try:
            save = _open(folder / str(number), number)
            if not valid(save.meta):
                raise _damaged(save.path, "it is not from a run")
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for problem in damaged:
            warn(f"{problem}; using the one before it, {save.path}")
        return save
    raise CheckpointError("; ".join(damaged) or f"no checkpoint in {folder}")


def _open(path: Path, number: int) -> Save:
    """Open the save of that number, whose files are all there and as they were written."""
    try:
        manifest = _read_manifest(path / _MANIFEST)
        match manifest:
            case {"sha256": str(checksum), "number": int(written)}:
                files = {_ARRAYS: checksum}
            case {"files": dict(files)}:  # of the first versions, which did not write the number
                written = number
            case _:
                raise ValueError(f"{_MANIFEST} is of another kind")
        leaves, meta = manifest.get("leaves"), manifest.get("meta")
        if (
            not isinstance(leaves, dict)
            or not isinstance(meta, dict)
            or {*map(type, leaves.values())} - {str}
        ):
            raise ValueError(f"{_MANIFEST} is of another kind")
        if written != number:
            raise ValueError(f"it is save {written}, renamed")
        for name, checksum in files.items():
            with open_regular(path / name) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != checksum:
                    raise ValueError(f"{name} has changed")
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    return Save(path, leaves, meta)


def _damaged(path: Path, why: object) -> CheckpointError:
    return CheckpointError(f"the checkpoint {path} is damaged: {_reason(why)}")


def _reason(why: object) -> object:
    """Return what the system says of an error of its own, without number and file."""
    return (why.strerror or why) if isinstance(why, OSError) else why


def _write_arrays(path: Path, arrays: dict[str, Any]) -> str:
    """Write arrays to a file, and return the checksum of what should be there."""
    from safetensors.numpy import save

    data = save({name: _storable(np.asarray(array)) for name, array in arrays.items()})
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def _storable(array: np.ndarray) -> np.ndarray:
    """Return an array in C order, of a type that NumPy has: of others, as bfloat16, the bits."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    return array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array


def _write_manifest(path: Path, contents: dict[str, Any]) -> None:
    """Write JSON on two lines: the contents, and their checksum."""
    text = json.dumps(contents)
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        data = file.read()
    text = data[: -len("\n") * 2 - 64]
    if data != text + f"\n{hashlib.sha256(text).hexdigest()}\n".encode():
        raise ValueError(f"{path.name} has changed")
    return parse_object(text)


def _numbers(folder: Path) -> list[int]:
    """List the numbers of complete saves, newest first, without names that no `Writer` gives."""
    names = [path.name for path in folder.glob("*") if path.is_dir()]
    return sorted(
        (int(name) for name in names if name.isdecimal() and name == str(int(name))), reverse=True
    )


def _remove(path: Path) -> None:
    """Delete a folder, a file, or a link but not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(folder: Path) -> None:
    """Make a rename last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(arrays: dict[str, Any]) -> dict[str, Any]:
    """Copy arrays, whole in every process, so that the originals may be donated or changed."""
    on_device = {name: x for name, x in arrays.items() if isinstance(x, jax.Array)}
    copies = {
        name: np.array(x) for name, x in arrays.items() if name not in on_device
    } | _copy_on_device(on_device)
    return {name: _whole(copies[name]) for name in arrays}


def _whole(array: Any) -> Any:
    """Return an array with the parts that other processes hold."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return array


_copy_on_device = jax.jit(partial(jax.tree.map, jnp.copy))


def _named_leaves(tree: PyTree, part: str = "") -> dict[str, Any]:
    """Return leaves by their place in the state, as `state.params['w'][0]`, in flattening order."""
    return {
        f"state{part}{jax.tree_util.keystr(path)}": leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _belongs(name: str, part: str) -> bool:
    """Say whether a leaf is this part of the state, or within it."""
    return name == part or (name.startswith(part) and name[len(part)] in ".[")


def _stored_name(name: str, saved: Container[str]) -> str:
    """Return a leaf's name in a save, whose version may have called a part of it otherwise."""
    old = name
    for now, before in _RENAMED.items():
        old = old.replace(now, before)
    return old if old in saved else name


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def _describe(name: str, leaf: Any) -> str:
    """Return dtype and shape as text, as `float32[2,3]` or, with its generator, `key<fry>[]`."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        leaf = np.asarray(leaf)
    if not _is_key(leaf) and not (jnp.issubdtype(leaf.dtype, np.number) or leaf.dtype == np.bool_):
        raise CheckpointError(f"{name} is neither an array nor a number")
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _compare(folder: Path, saved: dict[str, str], expected: dict[str, str]) -> None:
    """Refuse a checkpoint whose leaves are not those expected."""
    for name in [*expected, *saved]:
        if saved.get(name) != expected.get(name):
            raise CheckpointError(
                f"the checkpoint in {folder} does not fit: "
                f"{name} is {saved.get(name, 'missing')} in the checkpoint, "
                f"{expected.get(name, 'missing')} here"
            )


def _to_array(leaf: Any) -> Any:
    """Return a leaf as it is stored: keys as their bits, numbers as arrays."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return the shape and type of what is stored of a leaf."""
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    elif not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        leaf = np.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _from_array(array: np.ndarray, like: Any) -> Any:
    """Return a stored array as the kind of leaf that `like` is, on its devices if any."""
    if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return (
            array
            if isinstance(like, np.ndarray)
            else array[()]
            if isinstance(like, np.generic)
            else array.item()
        )
    bound, dtype = (
        like.committed if isinstance(like, jax.Array) else like.sharding is not None,
        cast(Any, like.dtype),
    )
    on_device = (
        jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])
        if bound
        else jnp.asarray(array)
    )
    return jax.random.wrap_key_data(on_device, dtype=dtype) if _is_key(like) else on_device
