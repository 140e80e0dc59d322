"""The agents in chunks of equal size, for what goes along them piece by piece."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

S = TypeVar("S")


def cut_agents(tree: PyTree[Array], size: int, *, axis: int) -> PyTree[Array]:
    """Return chunks, [*batch, N, …] → [N / size, *batch, size, …], the last padded with zeros.

    Args:
        tree: arrays with the agents at `axis`.
        size: agents in a chunk.
        axis: how many batch axes there are.
    """

    def chunks(v: Array) -> Array:
        v = jnp.pad(v, [(0, -v.shape[axis] % size if i == axis else 0) for i in range(v.ndim)])
        return jnp.moveaxis(v.reshape(*v.shape[:axis], -1, size, *v.shape[axis + 1 :]), axis, 0)

    return jax.tree.map(chunks, tree)


def join_agents(tree: PyTree[Array], num_agents: int, *, axis: int) -> PyTree[Array]:
    """Return what was cut, [N / size, *batch, size, …] → [*batch, N, …], without the padding.

    Args:
        tree: arrays of chunks.
        num_agents: N.
        axis: how many batch axes there are.
    """

    def agents(v: Array) -> Array:
        v = jnp.moveaxis(v, 0, axis)
        v = v.reshape(*v.shape[:axis], -1, *v.shape[axis + 2 :])
        return lax.slice_in_dim(v, 0, num_agents, axis=axis)

    return jax.tree.map(agents, tree)


def hand_on(
    step: Callable[[S, Any], tuple[S, Any]], state: S, chunks: PyTree, *, reverse: bool = False
) -> tuple[S, PyTree]:
    """Run chunk after chunk, each from the state after the one before it.

    Only the states between chunks are kept for the backward pass, which runs each chunk again.

    Args:
        step: from a state and a chunk to the state after it, and outputs.
        state: before the first chunk.
        chunks: of `cut_agents`.
        reverse: begin with the last one.
    """
    return lax.scan(jax.checkpoint(step), state, chunks, reverse=reverse)
