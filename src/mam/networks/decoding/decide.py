"""Choosing all agents' actions: one agent after another, or as the fixed point of whole passes.

Every agent's noise is drawn beforehand, so the joint action is a function of it and both ways
compute the same one. Arrays are in the order of deciding: agent k reads the actions of agents
before it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from mam.kernels.native.library import by_platform, use_native
from mam.kernels.selective_scan import has_cuda
from mam.networks.actions import ActionDistribution, Token
from mam.networks.chunks import cut_agents, join_agents
from mam.networks.decoder import Context, Decoder, DecoderState, Embedded, Past
from mam.networks.decoding.cuda import decode_kernel, kernel_supports
from mam.networks.decoding.native import native_decode, native_supports
from mam.types import Action, AgentAction


@dataclass(frozen=True)
class Decoding:
    """The way in which a policy decodes; all yield the same actions, the kernel up to precision."""

    method: Literal["sequential", "fixed_point", "kernel"] = "sequential"
    window: int | None = None  # agents in one fixed point; all of them if None
    # Over a window, before its agents decide one after another; no limit if None.
    max_passes: int | None = None


class DecodeInputs(eqx.Module):
    """The inputs of decoding besides earlier actions, for some agents: [*batch, M, …]."""

    context: Context
    mask: Bool[Array, "*batch M A"]
    noise: Float[Array, "*batch M Z"]


class Decision(eqx.Module):
    """A joint action, the network's outputs for it, and its cost in passes."""

    action: Action
    out: Float[Array, "*batch M P"]
    passes: Float[Array, "*batch"]  # over the agents; a step for one agent is 1 / M of a pass
    memory: tuple[DecoderState, ...] = ()  # the decoder's after the step


class DecodeCarry(eqx.Module):
    """The carry of decoding: the decoder's state after earlier agents, and the last one's token."""

    state: tuple[DecoderState, ...]
    token: Token


@dataclass(frozen=True)
class _DecodeContext:
    """The constants of decoding: the decoder, the distribution, the embedding."""

    decoder: Decoder
    distribution: ActionDistribution
    embed: Callable[[Token], Embedded]

    def token(self, action: AgentAction) -> Token:
        """Return what the next agent reads of an action."""
        return self.decoder.embed.pad(self.distribution.token(action))


def decide(
    decoder: Decoder,
    distribution: ActionDistribution,
    inputs: DecodeInputs,
    decoding: Decoding,
    past: Past | None = None,
) -> Decision:
    """Choose one joint action per batch element.

    Args:
        decoder: gives each agent's outputs.
        distribution: over one agent's actions.
        inputs: inputs of all agents, in the order of deciding.
        decoding: the method, and its limits.
        past: what the decoder remembers; None: the step is the first of its episode.
    """
    *batch, num_agents, _ = inputs.mask.shape
    dtype = inputs.context.obs_rep.dtype
    fixed = _DecodeContext(decoder, distribution, decoder.embedder(dtype))
    size = num_agents if decoding.window is None else min(decoding.window, num_agents)
    capacity = num_agents + -num_agents % size
    start = DecodeCarry(
        state=decoder.init_state(capacity, tuple(batch), dtype)
        if past is None
        else decoder.start_step(past, capacity, dtype),
        token=decoder.embed.start(tuple(batch)),
    )
    if decoding.method == "fixed_point":
        return _in_windows(fixed, start, inputs, size, decoding.max_passes or size)
    return _in_order(fixed, start, inputs, kernel=decoding.method == "kernel")


def _in_windows(
    fixed: _DecodeContext, start: DecodeCarry, inputs: DecodeInputs, size: int, max_passes: int
) -> Decision:
    """Decide by fixed points of equal size; agents that fill up the last one are dropped."""
    *batch, num_agents, _ = inputs.mask.shape
    axis = len(batch)
    windows = cut_agents(inputs, size, axis=axis)
    real = (jnp.arange(num_agents + -num_agents % size) < num_agents).reshape(-1, size)

    def window(carry, inputs):
        inputs, real = inputs
        return _fixed_point(fixed, carry, inputs, real, max_passes)

    if len(real) == 1:
        last, decisions = window(start, jax.tree.map(lambda v: v[0], (windows, real)))
        decisions = jax.tree.map(lambda v: v[None], decisions)
    else:
        last, decisions = lax.scan(window, start, (windows, real))
    action, out = join_agents((decisions.action, decisions.out), num_agents, axis=axis)
    return Decision(
        action=action,
        out=out,
        passes=jnp.mean(decisions.passes, axis=0),
        memory=fixed.decoder.end_step(last.state),
    )


def _one_by_one(
    fixed: _DecodeContext, carry: DecodeCarry, inputs: DecodeInputs
) -> tuple[DecodeCarry, Decision]:
    axis = inputs.mask.ndim - 2

    def agent(carry: DecodeCarry, inputs: DecodeInputs):
        state, out = fixed.decoder.step(carry.state, fixed.embed(carry.token), inputs.context)
        action = fixed.distribution.sample_from_noise(out, inputs.mask, inputs.noise)
        return DecodeCarry(state=state, token=fixed.token(action)), (action, out)

    agents_first = jax.tree.map(lambda v: jnp.moveaxis(v, axis, 0), inputs)
    carry, (action, out) = lax.scan(agent, carry, agents_first)
    decision = Decision(
        action=jnp.moveaxis(action, 0, axis),
        out=jnp.moveaxis(out, 0, axis),
        passes=jnp.ones(inputs.mask.shape[:-2]),
    )
    return carry, decision


def _in_order(
    fixed: _DecodeContext, start: DecodeCarry, inputs: DecodeInputs, *, kernel: bool
) -> Decision:
    """Decide for one agent after another: in a loop, or in one call of fused code.

    Fused code is used where it takes the decoder: on CPU native code, if installed; on CUDA a
    kernel, if asked for.
    """

    def loop(inputs: DecodeInputs) -> Decision:
        last, decision = _one_by_one(fixed, start, inputs)
        return replace(decision, memory=fixed.decoder.end_step(last.state))

    def in_one_call(
        decode: Callable[[Decoder, DecodeInputs], tuple[Action, Array]],
    ) -> Callable[[DecodeInputs], Decision]:
        def call(inputs: DecodeInputs) -> Decision:
            action, out = decode(fixed.decoder, inputs)
            return Decision(
                action=action,
                out=out,
                passes=jnp.ones(inputs.mask.shape[:-2]),
                memory=fixed.decoder.end_step(start.state),  # no mixer that is fused has any
            )

        return call

    if use_native() and native_supports(fixed.decoder, inputs):
        return in_one_call(native_decode)(inputs)
    if kernel and has_cuda() and kernel_supports(fixed.decoder):
        return by_platform(inputs, cuda=in_one_call(decode_kernel), default=loop)
    return loop(inputs)


class _Attempt(eqx.Module):
    """A joint action, and the one that follows when agents read it as the actions before theirs."""

    read: Action
    action: Action
    out: Float[Array, "*batch M P"]
    state: tuple[DecoderState, ...]
    passes: Float[Array, ""]


def _fixed_point(
    fixed: _DecodeContext,
    carry: DecodeCarry,
    inputs: DecodeInputs,
    real: Bool[Array, "M"],
    max_passes: int,
) -> tuple[DecodeCarry, Decision]:
    """Pass over all agents of a window until what they read is what they do.

    Agent k reads agents before it only, so the first k agents are right after k passes, and M
    passes always suffice; coupling decides how many are needed. The whole batch waits for its
    slowest element.
    """
    *batch, size, _ = inputs.mask.shape
    distribution = fixed.distribution

    def attempt(read: Action, passes: Float[Array, ""]) -> _Attempt:
        tokens = fixed.decoder.embed.shift_right(distribution.token(read), first=carry.token)
        state, out = fixed.decoder.unroll(carry.state, fixed.embed(tokens), inputs.context)
        action = distribution.sample_from_noise(out, inputs.mask, inputs.noise)
        return _Attempt(read, action, out, state, passes + 1)

    def settled(last: _Attempt) -> Bool[Array, ""]:
        moved = ~distribution.equal(last.read, last.action) & real
        return ~jnp.any(moved[..., :-1])  # no agent of the window reads its last one

    # The first guess: what each agent would do if it were the only one. It mixes nothing, and costs
    # little beside a pass.
    alone = jax.tree.map(lambda v: jnp.expand_dims(v, len(batch) + 1), inputs.context)
    start = fixed.embed(fixed.decoder.embed.start((*batch, size, 1)))
    out = fixed.decoder.unroll(None, start, alone)[1][..., 0, :]
    guess = distribution.sample_from_noise(out, inputs.mask, inputs.noise)
    first = attempt(guess, jnp.zeros(()))
    last = lax.while_loop(
        lambda last: ~settled(last) & (last.passes < max_passes),
        lambda last: attempt(last.action, last.passes),
        first,
    )

    def found() -> tuple[DecodeCarry, Decision]:
        token = fixed.token(jnp.take(last.action, size - 1, axis=len(batch)))
        passes = jnp.broadcast_to(last.passes, tuple(batch))
        return DecodeCarry(state=last.state, token=token), Decision(last.action, last.out, passes)

    def given_up() -> tuple[DecodeCarry, Decision]:
        after, decision = _one_by_one(fixed, carry, inputs)
        return after, eqx.tree_at(lambda d: d.passes, decision, decision.passes + last.passes)

    if max_passes >= size:
        return found()
    return lax.cond(settled(last), found, given_up)
