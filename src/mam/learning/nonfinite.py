"""Non-finite values: found inside the compiled update, which then changes nothing, and named.

Arrays are watched in the order in which data flow through a train step, so the first one with such
a value is where it began. Dead agents may see and earn anything.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from mam.learning.sharding import WHOLE, Shard
from mam.types import Observation, Transition

NO_FAULT = -1  # in place of the index of an array with a non-finite value


def first_nonfinite(flags: Sequence[Bool[Array, ""]], shard: Shard = WHOLE) -> Int[Array, ""]:
    """Return the index of the first flag that is set, on any device; NO_FAULT if none is.

    Args:
        flags: scalars, each for one array.
        shard: where arrays lie on several devices, this one's share.
    """
    stacked = shard.max(jnp.stack(flags).astype(jnp.int32))
    return jnp.where(stacked.any(), jnp.argmax(stacked), NO_FAULT).astype(jnp.int32)


def is_nonfinite(x: Array | None, alive: Bool[Array, "*batch N"] | None = None) -> Bool[Array, ""]:
    """Say whether an array has a non-finite value.

    Args:
        x: any array [*batch, N, …], or None, which has none.
        alive: agents whose values count; all if None.
    """
    if x is None or not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros((), bool)
    if alive is not None:
        x = jnp.where(alive.reshape(*alive.shape, *[1] * (x.ndim - alive.ndim)), x, 0)
    # A product, because XLA's reductions are slow on CPU; with small numbers, so that sums of
    # finite ones do not overflow.
    return ~jnp.isfinite(jnp.vdot(x, jnp.full_like(x, 1e-20)))


def nonfinite_leaves(tree: PyTree) -> list[Bool[Array, ""]]:
    """Say of each leaf whether it has a non-finite value."""
    return [is_nonfinite(leaf) for leaf in jax.tree.leaves(tree)]


def leaf_names(tree: PyTree, what: str) -> list[str]:
    """Return a name per leaf, `what` and its path, such as `gradient of decoder.head.weight`."""
    return [
        f"{what} {jax.tree_util.keystr(path).lstrip('.')}"
        for path, _ in jax.tree.leaves_with_path(tree)
    ]


ROLLOUT_NAMES = (
    *(f"observation.{name}" for name in ("agents_view", "grid", "positions", "state")),
    *("reward", "log_prob of the rollout", "value of the rollout"),
)


def nonfinite_in_rollout(transitions: Transition) -> list[Bool[Array, ""]]:
    """Say of each of ROLLOUT_NAMES whether it has a non-finite value."""
    seen, reached = transitions.observation, transitions.final_observation
    alive = seen.alive
    own = (transitions.reward, transitions.log_prob, transitions.value)
    return [
        *(
            a | b
            for a, b in zip(
                _nonfinite_in_observation(seen), _nonfinite_in_observation(reached), strict=True
            )
        ),
        *(is_nonfinite(x, alive) for x in own),
    ]


def _nonfinite_in_observation(observation: Observation) -> list[Bool[Array, ""]]:
    views = (observation.agents_view, observation.grid, observation.positions)
    return [*(is_nonfinite(x, observation.alive) for x in views), is_nonfinite(observation.state)]


def select_per_seed(bad: Bool[Array, "seeds"], old: PyTree, new: PyTree) -> PyTree:
    """Select the old state for seeds with a non-finite value, the new one for others.

    Args:
        bad: seeds that had such a value.
        old: the state before, whose leaves are [seeds, …].
        new: the state after.
    """

    def choose(old: Array, new: Array) -> Array:
        return jnp.where(bad.reshape(-1, *[1] * (new.ndim - 1)), old, new)

    return jax.tree.map(choose, old, new)
