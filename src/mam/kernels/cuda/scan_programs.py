"""The two programs of the selective scan, as one warp runs them on one tile of channels.

`plan` says how the sequences are cut (`mam.kernels.cuda.scan`). States are [block, S]: channels
times states.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from mam.kernels.cuda.launch import exp2, multiply_add

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


class Inputs(NamedTuple):
    """The inputs of the recurrence: arrays, or in a kernel references to blocks of them."""

    x: Any  # [M, N, D]
    dt: Any  # [M, N, D]
    B: Any  # [M, N, S]
    C: Any  # [M, N, S]
    A: Any  # [D, S]
    reset: Any  # [M, N], 1 where the state before an agent counts as zero, else 0; or None
    h0: Any  # [M, D, S] or None


AXES = Inputs("MND", "MND", "MNS", "MNS", "DS", "MN", "MDS")


class _Agent(NamedTuple):
    """One agent's inputs in a kernel."""

    x: Any  # [block]
    dt: Any  # [block]
    B: Any  # [1, S]
    C: Any  # [1, S]
    reset: Any  # a number or None


def forward_program(*refs, plan):
    """Run the recurrence along a program's sequences; keep the state before each whole chunk."""
    inputs, (y, last, starts) = Inputs(*refs[: len(AXES)]), refs[len(AXES) :]
    A = inputs.A[...] * LOG2_E

    def forward_chunk(row, h, first, count):
        places = plan.places(first, count)
        # All are read before the first is used: then memory is waited for once per chunk.
        agents = [_read(inputs, row, place) for place in places]
        for place, agent in zip(places, agents, strict=True):
            h = _advance(plan, A, _zero_if_reset(agent, h), agent)
            y[row, place] = jnp.sum(h * agent.C, axis=1).astype(y.dtype)
        return h

    def sequence(row, _):
        def chunk(k, h):
            if starts is not None:
                starts[row, k] = h
            return forward_chunk(row, h, plan.head + k * plan.chunk, plan.chunk)

        h = forward_chunk(row, _state(inputs.h0, row, A), 0, plan.head)
        h = lax.fori_loop(0, plan.chunks, chunk, h) if plan.chunks else h
        if last is not None:
            last[row] = h

    lax.fori_loop(0, plan.rows, sequence, None)


def backward_program(*refs, plan):
    """Compute the gradients, chunk by chunk from the last one.

    The equations are those of `mam.kernels.selective_scan._recurrence_bwd`.
    """
    inputs = Inputs(*refs[: len(AXES)])
    starts, gy, g_last, gx, gdt, gB, gC, gA, gh0 = refs[len(AXES) :]
    A = inputs.A[...] * LOG2_E

    def backward_chunk(row, start, first, count, carry):
        later, sum_A = carry  # a_{i+1} G_{i+1}, and the gradient of A so far
        places = plan.places(first, count)
        # 1. The states before each agent; with the ones after them, gC.
        h, before = start, []
        for place, agent, g in [
            (place, _read(inputs, row, place), _wide(gy, row, place)) for place in places
        ]:
            before.append(_zero_if_reset(agent, h))
            h = _advance(plan, A, before[-1], agent)
            gC[row, place] = jnp.sum(g[:, None] * h, axis=0)
        # 2. Back. The inputs are read again, from the cache: there are not registers for them and
        #    the states. And with the same Δ as above, the compiler would not compute the decays
        #    again but hold them, too.
        for place, h in zip(reversed(places), reversed(before), strict=True):
            agent, g = _read(inputs, row, place), _wide(gy, row, place)
            G = multiply_add(g[:, None], agent.C, later, interpret=plan.interpret)
            gB[row, place] = jnp.sum(G * (agent.dt * agent.x)[:, None], axis=0)
            gu = jnp.sum(G * agent.B, axis=1)
            later = _decay(plan, A, agent) * G
            aGh = later * h
            gx[row, place] = (gu * agent.dt).astype(gx.dtype)
            gdt[row, place] = (gu * agent.x + jnp.sum(aGh * A, axis=1) * LN_2).astype(gdt.dtype)
            sum_A = multiply_add(aGh, agent.dt[:, None], sum_A, interpret=plan.interpret)
            later = _zero_if_reset(agent, later)
        return later, sum_A

    def sequence(row, sum_A):
        def chunk(k, carry):
            k = plan.chunks - 1 - k
            return backward_chunk(
                row, starts[row, k], plan.head + k * plan.chunk, plan.chunk, carry
            )

        carry = _state(g_last, row, A), sum_A
        carry = lax.fori_loop(0, plan.chunks, chunk, carry) if plan.chunks else carry
        later, sum_A = backward_chunk(row, _state(inputs.h0, row, A), 0, plan.head, carry)
        if gh0 is not None:
            gh0[row] = later
        return sum_A

    gA[...] = lax.fori_loop(0, plan.rows, sequence, jnp.zeros_like(A))


def _wide(ref, row, place):
    return ref[row, place].astype(jnp.float32)


def _read(inputs, row, place):
    x, dt, B, C = (_wide(ref, row, place) for ref in inputs[:4])
    return _Agent(
        x, dt, B[None], C[None], None if inputs.reset is None else inputs.reset[row, place]
    )


def _state(ref, row, A):
    return jnp.zeros_like(A) if ref is None else ref[row]


def _decay(plan, A, agent):
    """Return exp(Δ A), given A log2(e): [block, S]."""
    return exp2(agent.dt[:, None] * A, interpret=plan.interpret)


def _zero_if_reset(agent, state):
    """Choose the state or, where the agent is reset, zeros; no product, as a state may be NaN."""
    return state if agent.reset is None else jnp.where(agent.reset != 0, 0.0, state)


def _advance(plan, A, h, agent):
    u = (agent.dt * agent.x)[:, None] * agent.B
    return multiply_add(_decay(plan, A, agent), h, u, interpret=plan.interpret)
