"""The selective scan of `mam.kernels.selective_scan` on CPU, by the package `mam_native`.

The package keeps one state per chunk of agents, none for sequences of one chunk, and computes the
others again. How the work is cut depends on sizes only, not on the number of threads: a call gives
the same bits every time.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mam.kernels.native.library import LANES, MAX_BLOCKS, call, library

CHUNK = 16  # agents between two states that are kept: kChunk in native/src/cpp/kernels.h
MIN_TASKS = 8  # where there are fewer sequences, channels are cut, too
MAX_RANK = 16  # features of which step sizes are made: more are better multiplied by XLA


class ScanInputs(NamedTuple):
    """The inputs of the recurrence; real arrays are in float32."""

    x: Float[Array, "M N D"]
    dt: Float[Array, "M N D"] | Float[Array, "M N R"]  # step sizes, or what they are made of
    A: Float[Array, "S D"] | Float[Array, "1 D"]  # one rate for all states of a channel: Mamba-2
    B: Float[Array, "M N S"]
    C: Float[Array, "M N S"]
    D: Float[Array, "D"]
    # Where the state before agent i counts as zero (None: nowhere).
    reset: Bool[Array, "M N"] | None
    h0: Float[Array, "M S D"] | None  # h before the first agent (zeros if None)
    # Of a gated scan, Δ = min(softplus(W dt + b), DT_LIMIT):
    weight: Float[Array, "R+1 D"] | None = None  # the rows of W, then b
    gate: Float[Array, "M N D"] | None = None  # its SiLU multiplies the outputs
    alive: Bool[Array, "M N"] | None = None  # False where Δ = 0 (None: nowhere)


def native_outputs(inputs: ScanInputs, *, reverse: bool) -> Float[Array, "M N D"]:
    """Return the outputs with the skip connection; read from the last agent on if `reverse`."""
    return _scan(reverse, "y", inputs)


def native_final_state(inputs: ScanInputs, *, reverse: bool) -> Float[Array, "M S D"]:
    """Return the state after the last agent read, the first agent if `reverse`.

    It is a call of its own, which is not made where the state is not used: together with outputs it
    would be written always, and is as large as the inputs of S / 2 agents.
    """
    return _scan(reverse, "h", inputs)


def _run_forward(
    reverse: bool, output: str, inputs: ScanInputs, *, keep_starts: bool
) -> Sequence[Array]:
    """Return outputs ("y"), final states ("h"), states between chunks and scratch memory.

    Those that are not asked for are empty.
    """
    m, n, d = inputs.x.shape
    s = inputs.B.shape[-1]
    cut = _Cut.of(m, d)
    starts = (m, (n - 1) // CHUNK, s, d) if keep_starts else (0,)
    shapes = (
        *((m, n, d) if output == "y" else (0,), (m, s, d) if output == "h" else (0,)),
        *(starts, cut.scratch(inputs)),
    )
    return call("mam_native_scan", shapes, *inputs, **cut.attributes(), reverse=reverse)


def _primal(reverse: bool, output: str, inputs: ScanInputs) -> Array:
    y, last, *_ = _run_forward(reverse, output, inputs, keep_starts=False)
    return y if output == "y" else last


def _scan_fwd(reverse: bool, output: str, inputs: ScanInputs) -> tuple[Array, Any]:
    y, last, starts, _ = _run_forward(reverse, output, inputs, keep_starts=True)
    return y if output == "y" else last, (inputs, starts)


def _scan_bwd(reverse: bool, output: str, residuals: Any, gradient: Array) -> tuple[ScanInputs]:
    inputs, starts = residuals
    cut = _Cut.of(inputs.x.shape[0], inputs.x.shape[2])
    gradients = (gradient, None) if output == "y" else (None, gradient)
    x, dt, A, B, C, D, _, h0, weight, gate, _ = inputs
    shapes = (
        *(x.shape, dt.shape if weight is None else (cut.tiles, *dt.shape)),
        *(
            (cut.blocks, *A.shape),
            (cut.tiles, *B.shape),
            (cut.tiles, *C.shape),
            (cut.blocks, *D.shape),
        ),
        (0,) if h0 is None else h0.shape,
        (0,) if weight is None else (cut.blocks, *weight.shape),
        (0,) if gate is None else gate.shape,
        cut.scratch(inputs),
    )
    arguments = (*inputs, starts, *gradients)
    results = call(
        "mam_native_scan_backward", shapes, *arguments, **cut.attributes(), reverse=reverse
    )
    gx, gdt, gA, gB, gC, gD, gh0, g_weight, g_gate, _ = results
    g = ScanInputs(
        x=gx,
        dt=gdt if weight is None else _total(gdt),
        A=_total(gA),
        B=_total(gB),
        C=_total(gC),
        D=_total(gD),
        reset=None,
        h0=None if h0 is None else gh0,
        weight=None if weight is None else _total(g_weight),
        gate=None if gate is None else g_gate,
    )
    return (g,)


def _total(parts: Array) -> Array:
    """Sum over the first axis."""
    return jnp.sum(parts, axis=0) if parts.shape[0] != 1 else parts[0]


_scan = jax.custom_vjp(_primal, nondiff_argnums=(0, 1))
_scan.defvjp(_scan_fwd, _scan_bwd)


class _Cut(NamedTuple):
    """The cut of the work into tasks: blocks of sequences times tiles of channels."""

    blocks: int
    tiles: int

    @classmethod
    def of(cls, m: int, d: int) -> "_Cut":
        blocks = min(m, MAX_BLOCKS)
        wanted = -(-MIN_TASKS // max(blocks, 1))
        width = -(-math.ceil(d / wanted) // LANES) * LANES
        return cls(blocks, -(-d // width))

    def attributes(self) -> dict[str, np.int64]:
        """Return the cut as attributes of a kernel's call."""
        return {"blocks": np.int64(self.blocks), "tiles": np.int64(self.tiles)}

    def scratch(self, inputs: ScanInputs) -> tuple[int, int]:
        """Return the shape of the scratch memory: threads that may take part, floats for each."""
        workers = min(self.blocks * self.tiles, os.cpu_count() or 1)
        rank = 0 if inputs.weight is None else inputs.dt.shape[-1]
        return workers, library().scan_scratch(
            inputs.x.shape[-1], inputs.B.shape[-1], rank, self.tiles
        )
