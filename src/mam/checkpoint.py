"""Whole train state in, whole train state out, atomically, by Orbax.

A checkpoint folder holds numbered saves, `<folder>/<n>/`, each with three items: the arrays of the
state, the list of its leaves (what `restore` compares before it reads anything), and the caller's own
metadata. Only the newest save is kept. Orbax writes a save next to its final place and renames it when
it is complete, and deletes the older one only after that: whoever is killed at any moment leaves a
checkpoint that can be read.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from mam.errors import UserError

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

_STATE, _LEAVES, _META = "state", "leaves", "meta"


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of something else than what it is restored into."""


def save(folder: Path, state: PyTree, meta: dict[str, Any]) -> Path:
    """Writes a checkpoint, then removes the one before it.

    Args:
        folder: the run's checkpoint folder; made if missing.
        state: pytree of JAX arrays (typed PRNG keys included), NumPy arrays and numbers.
        meta: whatever is to be known before the state is restored, as JSON (`read_meta`).

    Returns:
        Folder of this save.

    Raises:
        CheckpointError: if a leaf of `state` is neither an array nor a number.
    """
    import orbax.checkpoint as ocp

    leaves = _named_leaves(state)
    # Orbax refuses arrays without elements; their shape, in the list of leaves, says all there is.
    arrays = {name: _to_array(leaf) for name, leaf in leaves.items() if np.size(leaf)}
    items = ocp.args.Composite(
        **{
            _STATE: ocp.args.StandardSave(arrays),
            _LEAVES: ocp.args.JsonSave({name: _describe(name, leaf) for name, leaf in leaves.items()}),
            _META: ocp.args.JsonSave(meta),
        }
    )
    with _open(folder, write=True) as manager:
        number = (manager.latest_step() or 0) + 1
        manager.save(number, args=items)
    return folder / str(number)


def restore(folder: Path, like: PyTree) -> PyTree:
    """Reads the newest checkpoint, bit for bit.

    Args:
        folder: the run's checkpoint folder.
        like: pytree of the structure, shapes and dtypes to expect, for instance a freshly initialised
            state; leaves may be `jax.ShapeDtypeStruct`. JAX arrays return with the sharding they have here.

    Returns:
        The state, with the containers of `like` and the values of the checkpoint.

    Raises:
        CheckpointError: if there is no checkpoint, it cannot be read, or it does not fit `like`;
            the message names the first leaf that differs.
    """
    import orbax.checkpoint as ocp

    leaves = _named_leaves(like)
    with _open(folder) as manager:
        saved = _read(manager, folder, **{_LEAVES: ocp.args.JsonRestore()})[_LEAVES]
        _compare(folder, saved, {name: _describe(name, leaf) for name, leaf in leaves.items()})
        targets = {name: _target(leaf) for name, leaf in leaves.items()}
        stored = {name: target for name, target in targets.items() if target.size}
        arrays = _read(manager, folder, **{_STATE: ocp.args.StandardRestore(stored)})[_STATE]
    empty = {name: np.empty(target.shape, target.dtype) for name, target in targets.items() if not target.size}
    values = [_from_array((arrays | empty)[name], leaf) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(like), values)


def read_meta(folder: Path) -> dict[str, Any]:
    """What was passed to `save` as `meta`.

    Raises:
        CheckpointError: if there is no checkpoint or it cannot be read.
    """
    import orbax.checkpoint as ocp

    with _open(folder) as manager:
        return _read(manager, folder, **{_META: ocp.args.JsonRestore()})[_META]


@contextmanager
def _open(folder: Path, *, write: bool = False) -> Iterator["ocp.CheckpointManager"]:
    """Orbax's manager of the folder, silent below warnings while it is open."""
    import orbax.checkpoint as ocp

    if not write and not folder.is_dir():
        raise CheckpointError(f"no checkpoint in {folder}")
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(1),
        create=write,
        cleanup_tmp_directories=write,  # what a killed save left behind; never while another process may be saving
        enable_async_checkpointing=False,
        lightweight_initialize=True,
    )
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        with ocp.CheckpointManager(folder.resolve(), options=options) as manager:
            yield manager
    finally:
        logger.setLevel(level)


def _read(manager: "ocp.CheckpointManager", folder: Path, **items: Any) -> Any:
    """Items of the newest save; every way in which that fails becomes one error."""
    import orbax.checkpoint as ocp

    number = manager.latest_step()
    if number is None:
        raise CheckpointError(f"no checkpoint in {folder}")
    try:
        return manager.restore(number, args=ocp.args.Composite(**items))
    except (ValueError, KeyError, TypeError, OSError) as error:  # a damaged file shows itself as any of these
        raise CheckpointError(f"the checkpoint {folder / str(number)} cannot be read: {error}") from error


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
