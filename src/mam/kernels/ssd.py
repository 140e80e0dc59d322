"""State space duality: the scan of Mamba-2, as matrix products or natively as the recurrence.

    h_i = exp(Δ_i A) h_{i-1} + (Δ_i x_i) ⊗ B_i
    y_i = h_i C_i + D x_i,      Δ_i, A and D one number per head

Because A is a number, the sum over earlier agents is an attention without softmax:
y = (C Bᵀ ⊙ L) (Δ x) with L_ij = exp(A (Δ_{j+1} + … + Δ_i)) for j ≤ i. A short sequence is one such
product; a long one is cut into chunks that hand a state on.

Source: Dao and Gu 2024 (arXiv 2405.21060), §6.
"""

import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from mam.kernels.native.library import use_native
from mam.kernels.native.scan import ScanInputs, native_final_state, native_outputs
from mam.kernels.selective_scan import selective_scan, sum_over_states, without_agents

# Agents in one product. On CPU, forward and backward, 32 is the fastest of 16, 32 and 64 from 64
# agents on.
CHUNK = 32
NEVER = -1e9  # exponent of the pairs in which j comes after i


def ssd(
    x: Float[Array, "*batch N D"],
    dt: Float[Array, "*batch N H"],
    A: Float[Array, "H"],
    B: Float[Array, "*batch N S"],
    C: Float[Array, "*batch N S"],
    D: Float[Array, "H"],
    *,
    initial_state: Float[Array, "*batch S D"] | None = None,
    reset: Bool[Array, "*batch N"] | None = None,
    reverse: bool = False,
    implementation: Literal["products", "scan", "native"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "*batch N D"], Float[Array, "*batch S D"]]:
    """Run the recurrence along the agent axis, in float32 or wider.

    Head k has channels k·P to (k+1)·P, P = D / H.

    Args:
        x: inputs.
        dt: step sizes Δ ≥ 0 of each head, after the softplus. Δ = 0 leaves the state as it was.
        A: decay rate per head, negative.
        B: input vectors, shared by all heads.
        C: output vectors, shared by all heads.
        D: skip weight per head.
        initial_state: h before the first agent (zeros if None).
        reset: True where the state before agent i counts as zero, as in `selective_scan`.
        reverse: run from the last agent to the first; outputs stay in the order of the inputs.
        implementation: `"products"` (the dual form, which takes no resets: a product with zero does
            not keep NaN apart), `"scan"` (the recurrence, by `selective_scan`), `"native"` (the
            recurrence by kernels for CPU, in float32, if installed), or None for the fastest that
            takes the arguments.
        chunk: longest sequence handled as one product.

    Returns:
        The outputs, and the state after the last agent read (the first one if `reverse`).

    Raises:
        ValueError: for types that the kernels do not take, or products with resets.
        UserError: for kernels that are not installed.
    """
    if not x.size:
        return without_agents(x, initial_state, (*x.shape[:-2], B.shape[-1], x.shape[-1]))
    if implementation == "products" and reset is not None:
        raise ValueError("products take no reset: choose scan, native or None")
    args = (x, dt, A, B, C, D, initial_state)
    if implementation is None and use_native() and _is_single(x, dt, B, C):
        implementation = "native"
    if implementation == "native":
        return _native(*args, reset=reset, reverse=reverse)
    if implementation == "scan" or reset is not None:
        return _scan(*args, reset=reset, reverse=reverse)
    return _products(*args, reverse=reverse, chunk=chunk)


def _scan(x, dt, A, B, C, D, initial_state, *, reset, reverse):
    """Run the recurrence of Mamba-1, with rates and step sizes that are equal within a head."""
    channels = x.shape[-1] // A.shape[0]
    A, D, dt = (jnp.repeat(v, channels, axis=-1) for v in (A, D, dt))
    A = jnp.broadcast_to(A[:, None], (A.shape[0], B.shape[-1]))
    return selective_scan(
        x, dt, A, B, C, D, initial_state=initial_state, reset=reset, reverse=reverse
    )


def _native(x, dt, A, B, C, D, initial_state, *, reset, reverse):
    """Run the recurrence by native kernels, with one rate for all states of a channel."""
    if not _is_single(x, dt, B, C):
        raise ValueError("the native scan is for float32")
    *batch, n, d = x.shape
    channels, s = d // A.shape[0], B.shape[-1]
    x_, dt_, B_, C_ = (
        v.reshape(-1, n, v.shape[-1]) for v in (x, jnp.repeat(dt, channels, axis=-1), B, C)
    )
    reset = None if reset is None else reset.reshape(-1, n)
    h0 = None if initial_state is None else initial_state.reshape(-1, s, d)
    inputs = ScanInputs(
        x_, dt_, jnp.repeat(A, channels)[None], B_, C_, jnp.repeat(D, channels), reset, h0
    )
    y, h = (run(inputs, reverse=reverse) for run in (native_outputs, native_final_state))
    return y.reshape(x.shape), h.reshape(*batch, s, d)


def _is_single(*arrays: Array) -> bool:
    return all(v.dtype == jnp.float32 for v in arrays)


def _products(x, dt, A, B, C, D, initial_state, *, reverse, chunk):
    """Compute the dual form, matrix products within chunks and a recurrence between them."""
    if reverse:
        x, dt, B, C = (jnp.flip(v, axis=-2) for v in (x, dt, B, C))
        y, h = _products(x, dt, A, B, C, D, initial_state, reverse=False, chunk=chunk)
        return jnp.flip(y, axis=-2), h
    *batch, n, d = x.shape
    heads, s = A.shape[0], B.shape[-1]
    channels, size = d // heads, min(chunk, n)
    # 1. [chunks of all sequences, size, …]; padded agents have Δ = 0 and change nothing.
    rows = [_chunks(v.reshape(-1, n, v.shape[-1]), size) for v in (x, dt, B, C)]
    x_, dt_, B_, C_ = (v.astype(jnp.promote_types(v.dtype, jnp.float32)) for v in rows)
    state = None if initial_state is None else initial_state.reshape(-1, s, d)
    # 2. Exponents: Δ A summed over the agents after j up to i, and over all up to i. As products,
    #    because XLA's cumulative sum is slow on CPU; not as differences of sums, in which short
    #    spans drown behind long ones.
    k, i, j = np.ogrid[:size, :size, :size]
    between = ((j < k) & (k <= i)).astype(x_.dtype).reshape(size, -1)
    exponent = jnp.swapaxes(dt_ * A, -1, -2)  # [chunks, H, size]
    span, total = (
        jnp.dot(exponent, sums, precision=lax.Precision.HIGHEST)
        for sums in (between, np.triu(np.ones((size, size), x_.dtype)))
    )
    span = span.reshape(*total.shape, size)
    decay = jnp.exp(jnp.where(np.tri(size, dtype=bool), span, NEVER))
    # 3. The scores C Bᵀ and, per head, the mixing L ∘ C Bᵀ: what agent i takes of agent j's input.
    #    Step sizes and the skip connection go into these small matrices, not to the channels.
    scores = jnp.einsum("bis,bjs->bij", C_, B_)
    mixing = scores[:, None] * decay * jnp.swapaxes(dt_, -1, -2)[..., None, :]
    mixing += D[:, None, None].astype(x_.dtype) * np.eye(size, dtype=x_.dtype)
    # 4. Head by head, which spares transposing.
    outputs, states, num_sequences = [], [], math.prod(batch)
    for k in range(heads):
        own = slice(k * channels, (k + 1) * channels)
        y = jnp.einsum("bij,bjp->bip", mixing[:, k], x_[..., own])
        to_end = jnp.exp(span[:, k, -1]) * dt_[..., k]
        ends = jnp.einsum("bjs,bjp->bsp", B_ * to_end[..., None], x_[..., own])
        handed = None if state is None else state[..., own]
        if n > size or state is not None:
            starts, ends = _hand_on(ends, jnp.exp(total[:, k, -1]), handed, num_sequences)
            y += jnp.einsum("bis,bsp->bip", C_ * jnp.exp(total[:, k])[..., None], starts)
        outputs.append(y)
        states.append(ends)
    y = jnp.concatenate(outputs, axis=-1).reshape(num_sequences, -1, d)[:, :n].reshape(x.shape)
    return y.astype(x.dtype), jnp.concatenate(states, axis=-1).reshape(*batch, s, d)


def _chunks(v, size):
    """Cut [batch, N, F] into [batch · chunks, size, F], padded with zeros."""
    v = jnp.pad(v, ((0, 0), (0, -v.shape[1] % size), (0, 0)))
    return v.reshape(-1, size, v.shape[-1])


def _hand_on(
    ends: Float[Array, "chunks S P"],
    decay: Float[Array, "chunks"],
    state: Float[Array, "batch S P"] | None,
    num_sequences: int,
) -> tuple[Float[Array, "chunks S P"], Float[Array, "batch S P"]]:
    """Return one head's states at the start of every chunk, and after the last.

    Args:
        ends: what each chunk adds to the state by itself, the chunks of a sequence in a row.
        decay: by which each chunk multiplies the state before it.
        state: before the first chunk (zeros if None).
        num_sequences: batch, the number of sequences.
    """
    if state is None:
        state = jnp.zeros((num_sequences, *ends.shape[1:]), ends.dtype)

    def chunk(h, inputs):
        end, decay = inputs
        return decay[:, None, None] * h + end, h

    def by_chunk(v):
        return jnp.swapaxes(v.reshape(num_sequences, -1, *v.shape[1:]), 0, 1)

    end, starts = lax.scan(chunk, state, (by_chunk(ends), by_chunk(decay)))
    return jnp.swapaxes(starts, 0, 1).reshape(ends.shape), end


def ssd_step(
    state: Float[Array, "*batch S D"],
    x: Float[Array, "*batch D"],
    dt: Float[Array, "*batch H"],
    A: Float[Array, "H"],
    B: Float[Array, "*batch S"],
    C: Float[Array, "*batch S"],
    D: Float[Array, "H"],
) -> tuple[Float[Array, "*batch S D"], Float[Array, "*batch D"]]:
    """Run `ssd` for one agent, as acting does.

    Args:
        state: h before the agent.
        x: the agent's input.
        dt: step sizes Δ ≥ 0 of each head.
        A: decay rate per head, negative.
        B: input vector.
        C: output vector.
        D: skip weight per head.

    Returns:
        The state after the agent, and its output in the type of x.
    """
    channels = x.shape[-1] // A.shape[0]
    decay, u = jnp.repeat(jnp.exp(dt * A), channels, axis=-1), jnp.repeat(dt, channels, axis=-1) * x
    state = decay[..., None, :] * state + B[..., :, None] * u[..., None, :]
    return state, (sum_over_states(state, C) + jnp.repeat(D, channels) * x).astype(x.dtype)
