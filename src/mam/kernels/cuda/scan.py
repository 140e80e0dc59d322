"""The selective scan of `mam.kernels.selective_scan` as two Pallas-Triton kernels.

A program is one warp. It runs the recurrence of a tile of channels along a sequence with the state
[channels, S] in registers, 16 values per thread; there is one program per sequence (or a few short
ones) and tile. With S minor, Triton gives each thread 4 channels × 4 states, so that sums over
either need few shuffles and no warp waits for another.

For the backward pass the inputs are kept and one state per chunk of agents; the states inside a
chunk are computed again. Memory traffic in float32 at D = 128, S = 16, N large: 29 bytes per
agent and channel forward and 46 backward, 32 of them for x, Δ, y and their gradients. A sequence
of one chunk or less keeps no state.

The gradients of B and C are sums over all channels: each tile writes its part, and XLA adds the
parts. Atomic additions would save some of those bytes, but not give the same bits twice.

Source: the hardware-aware scan of Mamba (arXiv 2312.00752, §3.3.2), which recomputes likewise.
Difference: that one is a parallel prefix along the sequence, as long sequences need; here they are
short and many, and a loop does less.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mam.kernels.cuda.launch import launch
from mam.kernels.cuda.scan_programs import AXES, Inputs, backward_program, forward_program

# Agents whose states the backward pass holds in registers; they are unrolled. With chunks of 8,
# N = 32 takes four times as long to compile (47 s, not 11) and runs no faster. A sequence that is
# SHORT is one chunk, which keeps no state: with two chunks of 2, N = 4 takes twice the time.
CHUNK = 4
SHORT = 8
WIDE_STATE = 16  # above it B and C take the registers of a longer chunk
TILE = 512  # states per program: 32 threads × 16
MIN_BLOCK = 8  # channels per tile: fewer waste most of each read
MIN_STATE, MAX_STATE = 4, 64
# Agents per program, where sequences are short: each program reads A and writes a gradient of A.
MIN_AGENTS = 64
MIN_PROGRAMS = 2048  # fewer leave an H100 (132 multiprocessors) partly idle


def kernel_supports(n: int, d: int, s: int) -> bool:
    """Say whether `scan_kernel` takes arrays of these sizes.

    What a Triton program holds must have sizes that are powers of two: here a tile of channels, S,
    and their product.

    Args:
        n: N agents, any number from 1 on.
        d: D channels, a multiple of 8, better one of 512 / S.
        s: S states per channel, a power of two from 4 to 64.
    """
    return (
        n >= 1
        and s & (s - 1) == 0
        and MIN_STATE <= s <= MAX_STATE
        and math.gcd(d, TILE // s) >= MIN_BLOCK
    )


def scan_kernel(
    x: Float[Array, "M N D"],
    dt: Float[Array, "M N D"],
    B: Float[Array, "M N S"],
    C: Float[Array, "M N S"],
    A: Float[Array, "S D"],
    reset: Bool[Array, "M N"] | None,
    h0: Float[Array, "M S D"] | None,
    *,
    reverse: bool,
    interpret: bool = False,
    final_state: bool = True,
) -> tuple[Float[Array, "M N D"], Float[Array, "M S D"] | None]:
    """Run the recurrence along the agents of M sequences.

        h_i = exp(Δ_i A) ⊙ h_{i-1} + (Δ_i x_i) ⊗ B_i,   y_i = Σ_s h_i[s] C_i[s]

    Args:
        x: inputs, float32 or bfloat16, as may be dt, B and C; all arithmetic is in float32.
        dt: step sizes Δ ≥ 0.
        B: input vectors.
        C: output vectors.
        A: diagonal of the state matrix, negative.
        reset: True where the state before agent i counts as zero (None: nowhere).
        h0: h before the first agent (zeros if None).
        reverse: run from the last agent to the first; outputs stay in the order of the inputs.
        interpret: run as ordinary JAX operations, on any device.
        final_state: whether the second result is wanted. It is as large as the inputs of S / 2
            agents, which costs short sequences time.

    Returns:
        The outputs, without the skip D ⊙ x, in x's type; and the state after the last agent read,
        in float32 (None unless `final_state`).

    Raises:
        ValueError: for sizes that `kernel_supports` refuses.
    """
    m, n, d = x.shape
    s = A.shape[0]
    if not kernel_supports(n, d, s):
        raise ValueError(f"no scan kernel for N, D, S = {n}, {d}, {s}")
    plan = _Plan(m, n, d, s, reverse, final_state, interpret)
    reset = None if reset is None else reset.astype(jnp.float32)
    h0 = None if h0 is None else jnp.swapaxes(h0, 1, 2).astype(jnp.float32)
    y, last = _scan(plan, Inputs(x, dt, B, C, A.T.astype(jnp.float32), reset, h0))
    return y, None if last is None else jnp.swapaxes(last, 1, 2)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static plan of a call: its cut into programs, and that of each sequence into chunks.

    The agents are read as a head of at most one chunk, which starts from h0, and then whole chunks,
    whose first states are kept. So N may be any number, nothing is padded, and no state is kept
    that is not needed.
    """

    m: int
    n: int
    d: int
    s: int
    reverse: bool
    final_state: bool
    interpret: bool

    @property
    def block(self):
        """Channels per tile: the largest power of two that divides D and fits."""
        return math.gcd(self.d, TILE // self.s)

    @property
    def rows(self):
        """Sequences per program, one by one: a power of two that divides M; 1 if long or few."""
        rows = max(1, min(MIN_AGENTS // self.n, self.m * (self.d // self.block) // MIN_PROGRAMS))
        return math.gcd(self.m, 1 << (rows.bit_length() - 1))

    @property
    def chunk(self):
        return SHORT if self.n <= SHORT and self.s <= WIDE_STATE else CHUNK

    @property
    def chunks(self):
        """Whole chunks after the head."""
        return (self.n - 1) // self.chunk

    @property
    def head(self):
        return self.n - self.chunks * self.chunk

    def places(self, first, count):
        """List the positions of `count` agents, from the one read as number `first` on."""
        return [self.n - 1 - (first + j) if self.reverse else first + j for j in range(count)]

    def run(self, kernel, operands, outputs):
        """Launch a kernel over tiles (T) × groups of sequences (G); K are chunks."""
        tiles, groups = self.d // self.block, self.m // self.rows
        return launch(
            partial(kernel, plan=self),
            operands,
            outputs,
            sizes={
                "M": self.m,
                "N": self.n,
                "D": self.d,
                "S": self.s,
                "K": self.chunks,
                "T": tiles,
                "G": groups,
            },
            blocks={"D": self.block, "M": self.rows, "T": None, "G": None},
            grid=("DT", "MG"),
            interpret=self.interpret,
            name="selective_scan_" + kernel.__name__.removesuffix("_program"),
        )


def _run_forward(plan, inputs, keep_starts):
    kept = jnp.float32 if keep_starts and plan.chunks else None
    outputs = (
        (inputs.x.dtype, "MND"),
        (jnp.float32 if plan.final_state else None, "MDS"),
        (kept, "MKDS"),
    )
    return plan.run(forward_program, tuple(zip(inputs, AXES, strict=True)), outputs)


def _primal(plan, inputs):
    y, last, _ = _run_forward(plan, inputs, keep_starts=False)
    return y, last


def _scan_fwd(plan, inputs):
    y, last, starts = _run_forward(plan, inputs, keep_starts=True)
    return (y, last), (inputs, starts)


def _scan_bwd(plan, residuals, cotangents):
    inputs, starts = residuals
    gy, g_last = cotangents
    operands = (*zip(inputs, AXES, strict=True), (starts, "MKDS"), (gy, "MND"), (g_last, "MDS"))
    per_agent = (
        (inputs.x.dtype, "MND"),
        (inputs.dt.dtype, "MND"),
        (jnp.float32, "TMNS"),
        (jnp.float32, "TMNS"),
    )
    outputs = (
        *per_agent,
        (jnp.float32, "GDS"),
        (None if inputs.h0 is None else jnp.float32, "MDS"),
    )
    gx, gdt, gB, gC, gA, gh0 = plan.run(backward_program, operands, outputs)
    gB, gC = gB.sum(0).astype(inputs.B.dtype), gC.sum(0).astype(inputs.C.dtype)
    return (Inputs(gx, gdt, gB, gC, gA.sum(0), None, gh0),)


_scan = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_scan.defvjp(_scan_fwd, _scan_bwd)
