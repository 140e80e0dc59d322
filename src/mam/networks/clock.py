"""Steps of an episode: counted, and written as sines and cosines."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree


class CountsSteps(eqx.Module):
    """A memory that counts the steps of the episode so far."""

    num_steps: Float[Array, "*batch"]


def counts_of(memory: PyTree) -> list[Float[Array, "*batch"]]:
    """Return how many steps of the episode the parts of a memory have counted."""
    parts = jax.tree.leaves(memory, is_leaf=_counts)
    return [part.num_steps for part in parts if _counts(part)]


def at_step(memory: PyTree, num_steps: Float[Array, "*batch"]) -> PyTree:
    """Return a memory that counts on from where an episode is, whatever else it knows of it.

    Args:
        memory: with any leading axes.
        num_steps: steps of the episode so far, for the last of its leading axes.
    """

    def moved(part: PyTree) -> PyTree:
        if not _counts(part):
            return part
        count = jnp.broadcast_to(num_steps, part.num_steps.shape)
        return replace(part, num_steps=count.astype(part.num_steps.dtype))

    return jax.tree.map(moved, memory, is_leaf=_counts)


def _counts(part: PyTree) -> bool:
    return isinstance(part, CountsSteps)


def count_steps(
    before: Float[Array, "*batch"], reset: Bool[Array, "T *batch"]
) -> Float[Array, "T *batch"]:
    """Return how many steps of its episode came before each of T steps.

    Args:
        before: the same of the first step, unless it is reset.
        reset: whether step t is the first of its episode.
    """
    t = jnp.arange(len(reset), dtype=before.dtype).reshape(-1, *[1] * before.ndim)
    first = lax.cummax(jnp.where(reset, t, -1), axis=0)
    return t + jnp.where(first < 0, before, -first)


def step_positions(
    steps: Float[Array, "*batch"], like: Float[Array, "... E"]
) -> Float[Array, "*batch E"]:
    """Return sin(step / 10000^(2k / E)) and its cosine as features 2k and 2k + 1.

    Args:
        steps: counted from the episode's first.
        like: an array of as many features and of the same type.
    """
    feature = np.arange(like.shape[-1])
    rate = 10_000.0 ** (-2 * (feature // 2) / like.shape[-1])
    return jnp.sin(steps[..., None] * rate + np.pi / 2 * (feature % 2)).astype(like.dtype)
