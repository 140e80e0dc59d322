"""Retention: attention without a softmax, whose sum over everything earlier is one matrix per head.

    S_t = κ S_{t−1} + Σ_i k_{t,i} v_{t,i}ᵀ        κ once per environment step, never between agents
    y_{t,i} = qᵀ_{t,i} S_t                        of all agents of step t, or with `causal`
    y_{t,i} = qᵀ_{t,i} (κ S_{t−1} + Σ_{j≤i} k_{t,j} v_{t,j}ᵀ)

A short sequence of tokens (t, i) is one masked product, y = (Q Kᵀ ⊙ D) V; a long one is cut into
chunks that hand S on, so that memory and work are linear in steps and in agents.

Source: Sun et al. 2023 (arXiv 2307.08621), §2; its decay along time only is that of Sable (arXiv
2410.01706), §3.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

CHUNK = 64  # tokens in one product


def retention(
    query: Float[Array, "T *batch N H F"],
    key: Float[Array, "T *batch N H F"],
    value: Float[Array, "T *batch N H F"],
    state: Float[Array, "*batch H F F"],
    reset: Bool[Array, "T *batch"],
    *,
    decay: tuple[float, ...],
    causal: bool,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "*batch H F F"], Float[Array, "T *batch N H F"]]:
    """Run retention over N agents of each of T environment steps, in float32 or wider.

    Args:
        query: q.
        key: k; zeros of an agent that is not to be seen.
        value: v.
        state: S after the step before the first.
        reset: whether step t is the first of its episode: nothing before reaches it.
        decay: κ of every head.
        causal: agents see those before them and themselves; if not, all of their step.
        chunk: most tokens handled as one product, but for those of one step if not `causal`.

    Returns:
        S after the last step, and y.
    """
    length, *batch, agents, heads, width = query.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # 1. [batch, H, chunks, size, F]; what fills up the last chunk has keys of zero.
    size = min(chunk, length * agents) if causal else min(max(1, chunk // agents), length) * agents
    padding = -(length * agents) % size

    q, k, v = (_chunked(x.astype(wide), size, padding) for x in (query, key, value))
    reset = reset.reshape(length, -1)
    state = jnp.where(reset[0][:, None, None, None], 0, state.reshape(-1, heads, width, width))
    # 2. Step and episode of every token, of the last before its chunk, and of its chunk's last.
    time = np.minimum(np.arange(length * agents + padding) // agents, length - 1).reshape(-1, size)
    begun = jnp.cumsum(reset, axis=0).T  # [batch, T]
    before = np.concatenate([[-1], time[:-1, -1]])
    episode = begun[:, time]
    episode_before = jnp.concatenate([jnp.zeros_like(begun[:, :1]), episode[:, :-1, -1]], axis=1)

    weights = partial(_weights, jnp.asarray(decay, wide))
    from_before = weights(time - before[:, None], episode == episode_before[..., None])
    to_end = weights(time[:, -1:] - time, episode == episode[..., -1:])
    over = weights(time[:, -1] - before, episode[..., -1] == episode_before)
    # 3. S before and after every chunk.
    added = jnp.einsum("bhcjf,bhcjg->bhcfg", k * to_end[..., None], v)
    starts, ends = _hand_on(state.astype(wide), over, added)
    # 4. Outputs. Where a chunk is one step that all of its agents see, they are those of S after.
    if not causal and size == agents:
        y = jnp.einsum("bhcif,bhcfg->bhcig", q, ends)
    else:
        ago = time[:, :, None] - time[:, None]
        seen = np.tri(size, dtype=bool) if causal else ago >= 0
        same = (episode[..., None] == episode[..., None, :]) & seen
        scores = jnp.einsum("bhcif,bhcjf->bhcij", q, k) * weights(np.maximum(ago, 0), same)
        y = jnp.einsum("bhcij,bhcjg->bhcig", scores, v)
        y += jnp.einsum("bhcif,bhcfg->bhcig", q * from_before[..., None], starts)
    return ends[:, :, -1].reshape(*batch, heads, width, width), _unchunked(y, query.shape)


def _chunked(x: Float[Array, "T *batch N H F"], size: int, padding: int) -> Array:
    """Return the tokens (t, i) in chunks of a size, [batch, H, chunks, size, F].

    Args:
        x: what is read of every agent at every step.
        size: of a chunk.
        padding: tokens of zeros that fill up the last chunk.
    """
    length, *_, agents, heads, width = x.shape
    x = x.reshape(length, -1, agents, heads, width).transpose(1, 3, 0, 2, 4)
    x = jnp.pad(x.reshape(*x.shape[:2], -1, width), [(0, 0), (0, 0), (0, padding), (0, 0)])
    return x.reshape(*x.shape[:2], -1, size, width)


def _unchunked(y: Float[Array, "batch H chunks size F"], shape: tuple[int, ...]) -> Array:
    """Return the agents' rows in the shape [T, *batch, N, H, F], without what filled up a chunk."""
    length, *_, agents, heads, width = shape
    y = y.reshape(*y.shape[:2], -1, width)[:, :, : length * agents]
    return y.reshape(-1, heads, length, agents, width).transpose(2, 0, 3, 1, 4).reshape(shape)


def _weights(decay: Float[Array, "H"], steps: np.ndarray, same: Bool[Array, "batch ..."]) -> Array:
    """Return κ^steps per head, [batch, H, …], zeros where it is not the same episode."""
    rates = decay.reshape(-1, *[1] * steps.ndim)
    return jnp.where(same[:, None], rates ** jnp.asarray(steps, decay.dtype), 0)


def _hand_on(
    state: Float[Array, "batch H F F"],
    decay: Float[Array, "batch H chunks"],
    added: Float[Array, "batch H chunks F F"],
) -> tuple[Float[Array, "batch H chunks F F"], Float[Array, "batch H chunks F F"]]:
    """Return the states before and after every chunk.

    Args:
        state: before the first.
        decay: by which each chunk multiplies the state before it.
        added: what each adds to it.
    """
    if added.shape[2] == 1:
        return state[:, :, None], state[:, :, None] * decay[..., None, None] + added

    def chunk(state: Array, inputs: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        decay, added = inputs
        after = state * decay[..., None, None] + added
        return after, (state, after)

    by_chunk = jax.tree.map(lambda v: jnp.moveaxis(v, 2, 0), (decay, added))
    return jax.tree.map(lambda v: jnp.moveaxis(v, 0, 2), lax.scan(chunk, state, by_chunk)[1])


def retention_step(
    query: Float[Array, "*batch H F"],
    key: Float[Array, "*batch H F"],
    value: Float[Array, "*batch H F"],
    state: Float[Array, "*batch H F F"],
) -> tuple[Float[Array, "*batch H F F"], Float[Array, "*batch H F"]]:
    """Run causal `retention` for one agent, as acting does.

    Args:
        query: q.
        key: k.
        value: v.
        state: S after the agents before.

    Returns:
        S after the agent, and y.
    """
    q, k, v = (x.astype(state.dtype) for x in (query, key, value))
    state = state + k[..., None] * v[..., None, :]
    return state, jnp.einsum("...hf,...hfg->...hg", q, state)
