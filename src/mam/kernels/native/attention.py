"""Softmax attention among few agents on CPU, forward and backward, by the package `mam_native`.

XLA takes several times as long for many small products as for a few large ones. The weights are
computed again for the gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mam.kernels.native.library import LANES, call, num_blocks

MOST_AGENTS = 16  # kMaxAttended in native/src/cpp/kernels.h


def native_attention_supports(query: Array, keys: Array) -> bool:
    """Say whether `native_attention` takes these: float32, as many keys as queries, and few."""
    num_agents, size = query.shape[-2:]
    return (
        query.dtype == keys.dtype == jnp.float32
        and keys.shape[-2] == num_agents <= MOST_AGENTS
        and size % LANES == 0
    )


def native_attention(
    query: Float[Array, "*batch H N F"],
    keys: Float[Array, "*batch H N F"],
    values: Float[Array, "*batch H N F"],
    visible: Bool[Array, "..."],
) -> Float[Array, "*batch H N F"]:
    """Return softmax(q kᵀ / √F) v per head.

    Args:
        query: q.
        keys: k.
        values: v.
        visible: to which agents each may attend, [N, N] or less, before it the same batch as the
            others or none.
    """
    pairs = (query.shape[-2],) * 2
    shared = all(size == 1 for size in visible.shape[:-2])
    seen = visible.reshape(visible.shape[-2:]) if shared else visible
    batch = () if shared else query.shape[:-3]
    seen = jnp.broadcast_to(seen, (*batch, *pairs)).reshape(-1, *pairs)
    # Agents before heads, as projections make them: the two transpositions cancel.
    rows = [jnp.swapaxes(x, -2, -3) for x in (query, keys, values)]
    rows = [x.reshape(-1, *x.shape[-3:]) for x in rows]
    y = _attend(*rows, seen.astype(jnp.float32))
    return jnp.swapaxes(y.reshape(*query.shape[:-3], *y.shape[1:]), -2, -3)


@jax.custom_vjp
def _attend(query: Array, keys: Array, values: Array, visible: Array) -> Array:
    return _call("mam_native_attention", 1, query, keys, values, visible)[0]


def _attend_fwd(*inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    return _attend(*inputs), inputs


def _attend_bwd(inputs: tuple[Array, ...], gy: Array) -> tuple[Array | None, ...]:
    return *_call("mam_native_attention_backward", 3, *inputs, gy), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _call(name: str, outputs: int, query: Array, *others: Array) -> Any:
    return call(name, [query.shape] * outputs, query, *others, blocks=num_blocks(query))
