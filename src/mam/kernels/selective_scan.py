"""The selective scan: the linear recurrence of Mamba, one signature for every implementation.

    h_i = exp(Δ_i A) ⊙ h_{i-1} + (Δ_i x_i) ⊗ B_i
    y_i = h_i C_i + D ⊙ x_i

Source: Mamba (arXiv 2312.00752), §3.2 and Algorithm 2: zero-order hold for A, Euler for B.
Difference: no implementation for training keeps all states; `"sequential"` saves one state per
chunk of agents and recomputes the rest in its backward pass.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from mam.kernels.cuda.scan import kernel_supports, scan_kernel
from mam.kernels.dense import dense
from mam.kernels.native.library import avoids_loops, by_platform, is_portable, use_native
from mam.kernels.native.scan import MAX_RANK, ScanInputs, native_final_state, native_outputs

DT_LIMIT = 20.0  # Δ is clamped here: left alone it can drift upward until the update is NaN

# A state is kept for the backward pass every so many agents. Recomputing costs one more forward
# pass whatever the chunk; 16 keeps the kept states at N/16 and the recomputed ones at 16.
CHUNK = 16
# Sequences scanned together on CPU: 64 and 128 are alike, all at once takes up to twice as long.
TILE = 128
# Agents whose states are at once in memory where the scan is written out: 16 and 32 are alike.
PIECE = 32
# Up to here the sum over pairs is faster than the loop (on CPU, forward and backward: 2–6× at
# N = 2, none from 3 on).
MAX_PAIRWISE = 2


def selective_scan(
    x: Float[Array, "*batch N D"],
    dt: Float[Array, "*batch N D"],
    A: Float[Array, "D S"],
    B: Float[Array, "*batch N S"],
    C: Float[Array, "*batch N S"],
    D: Float[Array, "D"],
    *,
    initial_state: Float[Array, "*batch S D"] | None = None,
    reset: Bool[Array, "*batch N"] | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch N D"], Float[Array, "*batch S D"]]:
    """Run the recurrence along the agent axis, in float32 or wider.

    Args:
        x: inputs.
        dt: step sizes Δ ≥ 0, after the softplus. Δ = 0 leaves the state as it was.
        A: diagonal of the state matrix, negative.
        B: input vectors, shared by all channels.
        C: output vectors, shared by all channels.
        D: skip weights.
        initial_state: h before the first agent (zeros if None).
        reset: True where the state before agent i counts as zero, even if it is NaN: as if the
            sequence were cut there. If `reverse`, that is the state of agent i + 1.
        reverse: run from the last agent to the first; outputs stay in the order of the inputs.
        implementation: `"sequential"` (a loop with a hand-written, recomputing backward pass),
            `"associative"` (a parallel prefix, which materialises all states: the published form),
            `"pairwise"` (a sum over pairs of agents, quadratic in N), `"native"` (kernels for CPU,
            in float32, if installed), `"pallas"` (kernels for CUDA), `"interpret"` (the CUDA
            kernels, run on any device to be tested), `"unrolled"` (written out without a loop or
            resets, for exported programs), or None for the fastest.

    Returns:
        The outputs, and the state after the last agent read (the first one if `reverse`).

    Raises:
        ValueError: for an unknown implementation, or sizes or types that the kernels do not take.
        UserError: for kernels that are not installed.
    """
    if implementation is not None and implementation not in _SCANS:
        raise ValueError(
            f"unknown scan implementation {implementation!r}: choose one of {', '.join(_SCANS)}"
        )
    *batch, n, d = x.shape
    s = A.shape[1]
    if not x.size:
        return without_agents(x, initial_state, (*batch, s, d))
    # 1. One batch axis, and channels minor in the state: [batch, S, D].
    wide = jnp.promote_types(x.dtype, jnp.float32)
    flat = [v.reshape(-1, n, v.shape[-1]).astype(wide) for v in (x, dt, B, C)]
    reset = None if reset is None else reset.reshape(-1, n)
    h0 = None if initial_state is None else initial_state.reshape(-1, s, d)
    # 2. The recurrence, and the skip connection.
    scan: Callable[..., Any] = _automatic if implementation is None else _SCANS[implementation]
    y, h = scan(*flat, A.T, D, reset, h0, reverse)
    return y.reshape(x.shape).astype(x.dtype), h.reshape(*batch, s, d)


def gated_scan(
    x: Float[Array, "*batch N D"],
    features: Float[Array, "*batch N R"],
    dt_weight: Float[Array, "R D"],
    dt_bias: Float[Array, "D"],
    A: Float[Array, "D S"],
    B: Float[Array, "*batch N S"],
    C: Float[Array, "*batch N S"],
    D: Float[Array, "D"],
    gate: Float[Array, "*batch N D"],
    *,
    alive: Bool[Array, "*batch N"] | None = None,
    initial_state: Float[Array, "*batch S D"] | None = None,
    reset: Bool[Array, "*batch N"] | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch N D"], Float[Array, "*batch S D"]]:
    """Run `selective_scan` with step sizes Δ = softplus(W δ + b), its outputs times SiLU(gate).

    The native kernels do all of it in one pass: neither step sizes nor outputs before the gate are
    written.

    Args:
        x: inputs.
        features: δ, the R features that step sizes are made of.
        dt_weight: W.
        dt_bias: b.
        A: as in `selective_scan`, as are B, C, D, initial_state, reset, reverse and implementation.
        B: input vectors.
        C: output vectors.
        D: skip weights.
        gate: its SiLU multiplies the outputs.
        alive: False where Δ = 0, so that the state stays as it was (all alive if None).
        initial_state: h before the first agent.
        reset: True where the state before agent i counts as zero.
        reverse: run from the last agent to the first.
        implementation: of the scan.

    Returns:
        The outputs times the gate, and the state after the last agent read.

    Raises:
        ValueError: as in `selective_scan`.
        UserError: as in `selective_scan`.
    """
    args = (x, features, dt_weight, dt_bias, A, B, C, D, gate, alive, initial_state, reset)
    if _gates_natively(x, features, implementation):
        return _native_gated(*args, reverse=reverse)
    dt = step_size(dense(features, dt_weight, dt_bias), alive)
    scan = partial(selective_scan, reverse=reverse, implementation=implementation)
    y, h = scan(x, dt, A, B, C, D, initial_state=initial_state, reset=reset)
    return y * jax.nn.silu(gate), h


def gated_step(
    state: Float[Array, "*batch S D"],
    x: Float[Array, "*batch D"],
    features: Float[Array, "*batch R"],
    dt_weight: Float[Array, "R D"],
    dt_bias: Float[Array, "D"],
    A: Float[Array, "D S"],
    B: Float[Array, "*batch S"],
    C: Float[Array, "*batch S"],
    D: Float[Array, "D"],
    gate: Float[Array, "*batch D"],
    *,
    reset: Bool[Array, "*batch"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch S D"], Float[Array, "*batch D"]]:
    """Run `gated_scan` for one agent, as acting does.

    Args:
        state: h before the agent.
        x: the agent's input.
        features: δ, the R features that the step size is made of.
        dt_weight: W.
        dt_bias: b.
        A: diagonal of the state matrix, negative.
        B: input vector.
        C: output vector.
        D: skip weights.
        gate: its SiLU multiplies the output.
        reset: True where h counts as zero.
        implementation: of the scan; any but "native" is for sequences alone.

    Returns:
        The state after the agent, and its output times the gate.
    """
    if _gates_natively(x, features, implementation):
        x, features, B, C, gate = (v[..., None, :] for v in (x, features, B, C, gate))
        reset = None if reset is None else reset[..., None]
        args = (x, features, dt_weight, dt_bias, A, B, C, D, gate, None, state, reset)
        y, state = _native_gated(*args, reverse=False)
        return state, y[..., 0, :]
    dt = step_size(dense(features, dt_weight, dt_bias))
    state, y = selective_step(zero_where(reset, state), x, dt, A, B, C, D)
    return state, y * jax.nn.silu(gate)


def _gates_natively(x: Array, features: Array, implementation: str | None) -> bool:
    """Say whether the native kernels take step sizes and gate as well."""
    fits = x.dtype == jnp.float32 and features.shape[-1] <= MAX_RANK
    return implementation in (None, "native") and fits and bool(x.size) and use_native()


def zero_where(reset: Bool[Array, "*batch"] | None, v: Array) -> Array:
    """Put zeros into v, [*batch, …], where `reset`: nowhere if None.

    A choice, not a product: what is left out may be NaN.
    """
    if reset is None:
        return v
    return jnp.where(jnp.expand_dims(reset, range(reset.ndim, v.ndim)), 0, v)


def without_agents(
    x: Array, initial_state: Float[Array, "*batch S D"] | None, shape: tuple[int, ...]
) -> tuple[Array, Float[Array, "*batch S D"]]:
    """Return outputs and state of a scan that reads no agent or no sequence.

    Args:
        x: empty inputs, which are the outputs.
        initial_state: returned as it is.
        shape: [*batch, S, D], of the zeros returned if `initial_state` is None.
    """
    return x, jnp.zeros(
        shape, jnp.promote_types(x.dtype, jnp.float32)
    ) if initial_state is None else initial_state


def step_size(
    x: Float[Array, "*batch F"], alive: Bool[Array, "*batch"] | None = None
) -> Float[Array, "*batch F"]:
    """Return Δ = softplus(x), bounded by DT_LIMIT, and 0 for the dead; in float32 or wider.

    Args:
        x: one number per channel or head, of any sign.
        alive: False for the dead (all alive if None).
    """
    dt = jnp.minimum(jax.nn.softplus(x.astype(jnp.promote_types(x.dtype, jnp.float32))), DT_LIMIT)
    return dt if alive is None else jnp.where(alive[..., None], dt, 0.0)


def selective_step(
    state: Float[Array, "*batch S D"],
    x: Float[Array, "*batch D"],
    dt: Float[Array, "*batch D"],
    A: Float[Array, "D S"],
    B: Float[Array, "*batch S"],
    C: Float[Array, "*batch S"],
    D: Float[Array, "D"],
) -> tuple[Float[Array, "*batch S D"], Float[Array, "*batch D"]]:
    """Run `selective_scan` for one agent, as acting does.

    Args:
        state: h before the agent.
        x: the agent's input.
        dt: step sizes Δ ≥ 0.
        A: diagonal of the state matrix, negative.
        B: input vector.
        C: output vector.
        D: skip weights.

    Returns:
        The state after the agent, and its output in the type of x.
    """
    state = jnp.exp(dt[..., None, :] * A.T) * state + B[..., :, None] * (dt * x)[..., None, :]
    return state, (sum_over_states(state, C) + D * x).astype(x.dtype)


def sum_over_states(
    state: Float[Array, "*batch S D"], weight: Float[Array, "*batch S"]
) -> Float[Array, "*batch D"]:
    """Return Σ_s weight[s] state[s], written out as XLA's reduction on CPU is many times slower."""
    total = weight[..., 0, None] * state[..., 0, :]
    for s in range(1, state.shape[-2]):
        total += weight[..., s, None] * state[..., s, :]
    return total


def _with_skip(scan: Callable[..., Any]) -> Callable[..., Any]:
    """Add the skip connection to a recurrence."""

    def run(x, dt, B, C, A, D, reset, h0, reverse):
        y, h = scan(x, dt, B, C, A, reset, h0, reverse)
        return y + D * x, h

    return run


def _automatic(x, dt, B, C, A, D, reset, h0, reverse):
    """Run the device's kernels where they take sizes and types, else what is fastest on CPU."""
    plain = _unrolled if avoids_loops() and reset is None else _sequential
    xla = partial(_with_skip(_pairwise if x.shape[1] <= MAX_PAIRWISE else plain), reverse=reverse)
    args = (x, dt, B, C, A, D, reset, h0)
    if x.dtype == jnp.float32 and use_native():
        return _native(*args, reverse=reverse)
    if x.dtype != jnp.float32 or not has_cuda() or not kernel_supports(x.shape[1], *A.shape[::-1]):
        return xla(*args)
    return by_platform(*args, cuda=partial(_with_skip(_pallas), reverse=reverse), default=xla)


def has_cuda() -> bool:
    """Say whether this process has a GPU: without one its kernels are not traced, to save time."""
    return any(device.platform == "gpu" for device in jax.devices())


def _native(x, dt, B, C, A, D, reset, h0, reverse):
    if x.dtype != jnp.float32:
        raise ValueError(f"the native scan is for float32, not {x.dtype}")
    inputs = ScanInputs(x, dt, A, B, C, D.astype(x.dtype), reset, h0)
    return native_outputs(inputs, reverse=reverse), native_final_state(inputs, reverse=reverse)


def _native_gated(x, features, dt_weight, dt_bias, A, B, C, D, gate, alive, h0, reset, *, reverse):
    *batch, n, d = x.shape
    inputs = ScanInputs(
        x=x.reshape(-1, n, d),
        dt=features.reshape(-1, *features.shape[-2:]),
        A=A.T,
        B=B.reshape(-1, *B.shape[-2:]),
        C=C.reshape(-1, *C.shape[-2:]),
        D=D,
        reset=None if reset is None else reset.reshape(-1, n),
        h0=None if h0 is None else h0.reshape(-1, *A.T.shape),
        weight=jnp.concatenate([dt_weight, dt_bias[None]]),
        gate=gate.reshape(-1, n, d),
        alive=None if alive is None else alive.reshape(-1, n),
    )
    y, h = native_outputs(inputs, reverse=reverse), native_final_state(inputs, reverse=reverse)
    return y.reshape(x.shape), h.reshape(*batch, *A.T.shape)


def _pallas(x, dt, B, C, A, reset, h0, reverse, *, interpret=False):
    if not kernel_supports(x.shape[1], *A.shape[::-1]):
        raise ValueError(
            f"the scan's kernels take no d_inner = {A.shape[1]} with d_state = {A.shape[0]}"
        )
    return scan_kernel(x, dt, B, C, A, reset, h0, reverse=reverse, interpret=interpret)


def _decay(dt, A):
    """Return exp(Δ A): [batch, S, D]."""
    return jnp.exp(dt[:, None, :] * A)


def _advance(A, h, x, dt, B):
    return _decay(dt, A) * h + (dt * x)[:, None, :] * B[:, :, None]


def _forward(x, dt, B, C, A, reset, h0, reverse):
    """Return outputs [N, batch, D] and the last state, of inputs [N, batch, …]; A is [S, D]."""

    def body(h, inputs):
        x, dt, B, C, reset = inputs
        h = _advance(A, zero_where(reset, h), x, dt, B)
        return h, sum_over_states(h, C)

    h, y = lax.scan(body, h0, (x, dt, B, C, reset), reverse=reverse)
    return y, h


def _associative(x, dt, B, C, A, reset, h0, reverse):
    """Form all states [batch, N, D, S] by a parallel prefix over (decay, input): MAM as published.

    With resets there is a third, whether there was one: what is on its left is then not read.
    """
    a = jnp.exp(dt[..., None] * A.T)
    u = (dt * x)[..., None] * B[..., None, :]

    def combine(left, right):
        a, u, reset = right
        a_left, u_left = (zero_where(reset, v) for v in left[:2])
        return a_left * a, a * u_left + u, None if reset is None else left[2] | reset

    a, h, reset = lax.associative_scan(combine, (a, u, reset), axis=1, reverse=reverse)
    if h0 is not None:
        start = jnp.swapaxes(h0, 1, 2)[:, None]
        h += a * (start if reset is None else zero_where(reset, jnp.broadcast_to(start, h.shape)))
    return jnp.einsum("bnds,bns->bnd", h, C), jnp.swapaxes(h[:, 0 if reverse else -1], 1, 2)


def _unrolled(x, dt, B, C, A, reset, h0, reverse):
    """Run agent after agent without a loop: every step is written out.

    For programs whose runtime is slow at loops: two operations per agent on its whole state.
    """
    if reset is not None:
        raise ValueError("the unrolled scan takes no reset")
    agents = [jnp.swapaxes(v, 0, 1) for v in (x, dt, B, C)]
    step, h, outputs = -1 if reverse else 1, None if h0 is None else h0[None], []
    for start in range(0, x.shape[1], PIECE)[::step]:
        x, dt, B, C = (v[start : start + PIECE] for v in agents)
        inputs = jnp.split((dt * x)[:, :, None, :] * B[..., None], len(x))  # [1, batch, S, D] each
        decays = jnp.split(jnp.exp(dt[:, :, None, :] * A), len(x))
        states = []
        for u, decay in zip(inputs[::step], decays[::step], strict=True):
            h = u if h is None else decay * h + u
            states.append(h)
        outputs.append(jnp.matmul(C[:, :, None, :], jnp.concatenate(states[::step]))[:, :, 0])
    return jnp.swapaxes(jnp.concatenate(outputs[::step]), 0, 1), cast(Array, h)[0]


def _sequential(x, dt, B, C, A, reset, h0, reverse):
    """Run tiles of the batch one after another: a tile's states stay in the processor's cache."""
    if h0 is None:
        h0 = jnp.zeros((x.shape[0], *A.shape), A.dtype)
    batched = (x, dt, B, C, reset, h0)

    def tile(batched):
        *agents, h0 = batched
        x, dt, B, C, reset = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), tuple(agents))
        y, h = cast(Any, _recurrence)(x, dt, B, C, A, reset, h0, reverse)
        return jnp.swapaxes(y, 0, 1), h

    rows = x.shape[0]
    if is_portable() or rows <= TILE:  # a portable program's batch may have any size
        return tile(batched)
    tiles = jax.tree.map(
        lambda v: jnp.pad(v, [(0, -rows % TILE)] + [(0, 0)] * (v.ndim - 1)).reshape(
            -1, TILE, *v.shape[1:]
        ),
        batched,
    )
    return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:])[:rows], lax.map(tile, tiles))


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _recurrence(x, dt, B, C, A, reset, h0, reverse):
    return _forward(x, dt, B, C, A, reset, h0, reverse)


def _chunked(tree):
    """Cut [N, …] into [N / CHUNK, CHUNK, …], padded with zeros: no change of state, no gradient."""
    n = jax.tree.leaves(tree)[0].shape[0]
    chunk = min(CHUNK, n)
    pad = -n % chunk

    def split(v):
        v = jnp.pad(v, [(0, pad)] + [(0, 0)] * (v.ndim - 1))
        return v.reshape(-1, chunk, *v.shape[1:])

    return jax.tree.map(split, tree)


def _recurrence_fwd(x, dt, B, C, A, reset, h0, reverse):
    def chunk(h, inputs):
        x, dt, B, C, reset = inputs
        y, h_next = _forward(x, dt, B, C, A, reset, h, reverse)
        return h_next, (y, h)

    chunks = _chunked((x, dt, B, C, reset))
    h, (y, h_starts) = lax.scan(chunk, h0, chunks, reverse=reverse)
    y = y.reshape(-1, *y.shape[2:])[: x.shape[0]]
    return (y, h), (chunks, A, h_starts, x.shape[0])


def _recurrence_bwd(reverse, residuals, cotangents):
    """Run the recurrence in reverse mode, chunk by chunk from the last one.

    States inside a chunk are computed again. With G_i the gradient of h_i, a_i the decay, and
    u = Δ ⊙ x:
        G_i = gy_i ⊗ C_i + a_{i+1} ⊙ G_{i+1}
        gC_i = Σ_d gy_i h_i,   gB_i = Σ_d G_i u_i,   gu_i = Σ_s G_i B_i
        gx_i = gu_i Δ_i,       gΔ_i = gu_i x_i + Σ_s (G_i a_i h_{i-1}) A
        gA = Σ_i (G_i a_i h_{i-1}) Δ_i
    Where agent i is reset, h_{i-1} is zero, and so is a_i ⊙ G_i, the gradient of what it was.
    """
    chunks, A, h_starts, n = residuals
    gy, gh = cotangents

    def recompute(h, inputs):
        x, dt, B, reset, gy = inputs
        h = zero_where(reset, h)
        h_next = _advance(A, h, x, dt, B)
        return h_next, (h, jnp.einsum("bd,bsd->bs", gy, h_next))

    def agent(carry, inputs):
        later, gA = carry  # a_{i+1} G_{i+1}, and the sum over agents with the batch still apart
        x, dt, B, C, reset, gy, h = inputs
        u = dt * x
        # Sums with a broadcast factor are taken apart, Σ_s (later + gy C) B = Σ_s later B + gy
        # (C·B), so that each is a small contraction and none needs G itself in memory.
        gB = jnp.einsum("bd,bsd->bs", u, later) + C * jnp.sum(gy * u, axis=-1, keepdims=True)
        gu = sum_over_states(later, B) + gy * jnp.sum(B * C, axis=-1, keepdims=True)
        aG = _decay(dt, A) * (later + gy[:, None, :] * C[:, :, None])
        aGh = aG * h
        gdt = gu * x + sum(aGh[:, s] * A[s] for s in range(A.shape[0]))
        return (zero_where(reset, aG), gA + aGh * dt[:, None, :]), (gu * dt, gdt, gB)

    def chunk(carry, inputs):
        (x, dt, B, C, reset), h_start, gy = inputs
        _, (h, gC) = lax.scan(recompute, h_start, (x, dt, B, reset, gy), reverse=reverse)
        carry, (gx, gdt, gB) = lax.scan(
            agent, carry, (x, dt, B, C, reset, gy, h), reverse=not reverse
        )
        return carry, (gx, gdt, gB, gC)

    carry = (gh, jnp.zeros_like(gh))
    (gh0, gA), grads = lax.scan(chunk, carry, (chunks, h_starts, _chunked(gy)), reverse=not reverse)
    gx, gdt, gB, gC = (g.reshape(-1, *g.shape[2:])[:n] for g in grads)
    return gx, gdt, gB, gC, gA.sum(0), None, gh0


_recurrence.defvjp(_recurrence_fwd, _recurrence_bwd)


def _pairwise(x, dt, B, C, A, reset, h0, reverse):
    """Run the recurrence as a sum over pairs of agents: no state, and no exponential in K_ii.

    y_i = Σ_{j ≤ i} K_ij ⊙ u_j,   u = Δ ⊙ x
    K_ij[d] = Σ_s C_i[s] B_j[s] exp(A[s, d] Σ_{j < k ≤ i} Δ_k[d])
    """
    if reverse:
        x, dt, B, C = (jnp.flip(v, axis=1) for v in (x, dt, B, C))
        reset = None if reset is None else jnp.flip(reset, axis=1)
    n = x.shape[1]
    x, dt, B, C = ([v[:, i] for i in range(n)] for v in (x, dt, B, C))
    u = [dt[i] * x[i] for i in range(n)]

    def kept(j, i, v):
        """Return agent j's v as agent i sees it: zeros where one after j, up to i, is reset."""
        return zero_where(None if reset is None else jnp.any(reset[:, j + 1 : i + 1], axis=1), v)

    outputs = []
    for i in range(n):
        y = u[i] * jnp.sum(B[i] * C[i], axis=-1, keepdims=True)
        for j in range(i):
            span = kept(j, i, sum(dt[j + 1 : i + 1]))
            y += kept(j, i, u[j]) * _decayed_product(C[i] * kept(j, i, B[j]), span, A)
        outputs.append(y)
    # The initial state and the final one, each computed only where it is used.
    # Δ summed since the start or the last reset.
    total = list(accumulate(range(1, n), lambda t, i: kept(i - 1, i, t) + dt[i], initial=dt[0]))
    h = sum(
        jnp.exp(kept(j, n - 1, total[-1] - total[j])[:, None, :] * A)
        * kept(j, n - 1, u[j])[:, None, :]
        * kept(j, n - 1, B[j])[:, :, None]
        for j in range(n)
    )
    if h0 is not None:
        from_start = [jnp.exp(total[i][:, None, :] * A) * kept(-1, i, h0) for i in range(n)]
        outputs = [y + jnp.einsum("bs,bsd->bd", C[i], from_start[i]) for i, y in enumerate(outputs)]
        h += from_start[-1]
    return jnp.stack(outputs[::-1] if reverse else outputs, axis=1), h


@jax.custom_vjp
def _decayed_product(W, span, A):
    """Return K[d] = Σ_s W[s] exp(A[s, d] span[d]) per row, unrolled over s for one loop in XLA."""
    return sum(W[:, s : s + 1] * jnp.exp(A[s] * span) for s in range(A.shape[0]))


def _decayed_product_fwd(W, span, A):
    return _decayed_product(W, span, A), (W, span, A)


def _decayed_product_bwd(residuals, gK):
    W, span, A = residuals
    decay = [jnp.exp(a * span) for a in A]
    gW = jnp.stack([jnp.sum(p * gK, axis=-1) for p in decay], axis=-1)
    g_span = gK * sum(W[:, s : s + 1] * p * A[s] for s, p in enumerate(decay))
    g_exponent = gK * span
    gA = jnp.stack([jnp.einsum("b,bd->d", W[:, s], p * g_exponent) for s, p in enumerate(decay)])
    return gW, g_span, gA


_decayed_product.defvjp(_decayed_product_fwd, _decayed_product_bwd)


_SCANS: dict[str, Callable[..., Any]] = {
    "sequential": _with_skip(_sequential),
    "associative": _with_skip(_associative),
    "pairwise": _with_skip(_pairwise),
    "native": _native,
    "pallas": _with_skip(_pallas),
    "interpret": _with_skip(partial(_pallas, interpret=True)),
    "unrolled": _with_skip(_unrolled),
}
