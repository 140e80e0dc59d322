"""Choosing all agents' actions: one agent after another, or as the fixed point of whole passes.

Every agent's noise is drawn beforehand, so the joint action is a function of it and both ways
compute the same one. Arrays are in the order of deciding: agent k reads the actions of agents
before it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from mam.kernels.native.library import use_native
from mam.kernels.selective_scan import has_cuda
from mam.networks.actions import ActionDistribution, Token
from mam.networks.decoder import Context, Decoder, DecoderState, Embedded
from mam.networks.decoding.cuda import decode_kernel, kernel_supports
from mam.networks.decoding.native import native_decode, native_supports
from mam.types import Action, AgentAction


@dataclass(frozen=True)
class Decoding:
    """How a sequence policy acts; all ways yield the same actions, the kernel up to precision."""

    method: Literal["sequential", "fixed_point", "kernel"] = "sequential"
    window: int | None = None  # agents in one fixed point; all of them if None
    # Over a window, before its agents decide one after another; no limit if None.
    max_passes: int | None = None


class Ahead(eqx.Module):
    """The inputs of decoding besides earlier actions, for some agents: [*batch, M, …]."""

    context: Context
    mask: Bool[Array, "*batch M A"]
    noise: Float[Array, "*batch M Z"]


class Decision(eqx.Module):
    """A joint action, the network's outputs for it, and its cost in passes."""

    action: Action
    out: Float[Array, "*batch M P"]
    passes: Float[Array, "*batch"]  # over the agents; a step for one agent is 1 / M of a pass


class Progress(eqx.Module):
    """The carry of decoding: the decoder's state after earlier agents, and the last one's token."""

    state: tuple[DecoderState, ...]
    token: Token


@dataclass(frozen=True)
class _Chooser:
    """What decoding reads and does not change: the decoder, the distribution, the embedding."""

    decoder: Decoder
    distribution: ActionDistribution
    embed: Callable[[Token], Embedded]

    def token(self, action: AgentAction) -> Token:
        """Return what the next agent reads of an action."""
        return self.decoder.embed.pad(self.distribution.token(action))


def decide(
    decoder: Decoder, distribution: ActionDistribution, ahead: Ahead, decoding: Decoding
) -> Decision:
    """Choose one joint action per batch element.

    Args:
        decoder: gives each agent's outputs.
        distribution: over one agent's actions.
        ahead: inputs of all agents, in the order of deciding.
        decoding: the method, and its limits.
    """
    *batch, num_agents, _ = ahead.mask.shape
    dtype = ahead.context.obs_rep.dtype
    chooser = _Chooser(decoder, distribution, decoder.embedder(dtype))
    size = num_agents if decoding.window is None else min(decoding.window, num_agents)
    start = Progress(
        state=decoder.init_state(num_agents + -num_agents % size, tuple(batch), dtype),
        token=decoder.embed.start(tuple(batch)),
    )
    if decoding.method == "fixed_point":
        return _in_windows(chooser, start, ahead, size, decoding.max_passes or size)
    return _in_order(chooser, start, ahead, kernel=decoding.method == "kernel")


def _in_windows(
    chooser: _Chooser, start: Progress, ahead: Ahead, size: int, max_passes: int
) -> Decision:
    """Decide by fixed points of equal size; agents that fill up the last one are dropped."""
    *batch, num_agents, _ = ahead.mask.shape
    axis = len(batch)
    windows = jax.tree.map(
        lambda v: jnp.moveaxis(
            _padded(v, axis, size).reshape(*batch, -1, size, *v.shape[axis + 1 :]), axis, 0
        ),
        ahead,
    )
    real = (jnp.arange(num_agents + -num_agents % size) < num_agents).reshape(-1, size)

    def window(progress, inputs):
        ahead, real = inputs
        return _fixed_point(chooser, progress, ahead, real, max_passes)

    _, decisions = lax.scan(window, start, (windows, real))
    action, out = (
        jnp.moveaxis(v, 0, axis).reshape(*batch, -1, *v.shape[axis + 2 :])[
            (slice(None),) * axis + (slice(num_agents),)
        ]
        for v in (decisions.action, decisions.out)
    )
    return Decision(action=action, out=out, passes=jnp.mean(decisions.passes, axis=0))


def _padded(v: Array, axis: int, size: int) -> Array:
    return jnp.pad(v, [(0, -v.shape[axis] % size if i == axis else 0) for i in range(v.ndim)])


def _one_by_one(chooser: _Chooser, progress: Progress, ahead: Ahead) -> tuple[Progress, Decision]:
    axis = ahead.mask.ndim - 2

    def agent(progress: Progress, ahead: Ahead):
        state, out = chooser.decoder.advance(
            progress.state, chooser.embed(progress.token), ahead.context
        )
        action = chooser.distribution.sample_from_noise(out, ahead.mask, ahead.noise)
        return Progress(state=state, token=chooser.token(action)), (action, out)

    agents_first = jax.tree.map(lambda v: jnp.moveaxis(v, axis, 0), ahead)
    progress, (action, out) = lax.scan(agent, progress, agents_first)
    decision = Decision(
        action=jnp.moveaxis(action, 0, axis),
        out=jnp.moveaxis(out, 0, axis),
        passes=jnp.ones(ahead.mask.shape[:-2]),
    )
    return progress, decision


def _in_order(chooser: _Chooser, start: Progress, ahead: Ahead, *, kernel: bool) -> Decision:
    """Decide for one agent after another: in a loop, or in one call of fused code.

    Fused code is used where it takes the decoder: on CPU native code, if installed; on CUDA a
    kernel, if asked for.
    """

    def loop(ahead: Ahead) -> Decision:
        return _one_by_one(chooser, start, ahead)[1]

    def in_one_call(
        decode: Callable[[Decoder, Ahead], tuple[Action, Array]],
    ) -> Callable[[Ahead], Decision]:
        def call(ahead: Ahead) -> Decision:
            action, out = decode(chooser.decoder, ahead)
            return Decision(action=action, out=out, passes=jnp.ones(ahead.mask.shape[:-2]))

        return call

    calls = {}
    if use_native() and native_supports(chooser.decoder, ahead):
        calls["cpu"] = in_one_call(native_decode)
    if kernel and has_cuda() and kernel_supports(chooser.decoder):
        calls["cuda"] = in_one_call(decode_kernel)
    return lax.platform_dependent(ahead, **calls, default=loop) if calls else loop(ahead)


class _Attempt(eqx.Module):
    """A joint action, and the one that follows when agents read it as the actions before theirs."""

    read: Action
    action: Action
    out: Float[Array, "*batch M P"]
    state: tuple[DecoderState, ...]
    passes: Float[Array, ""]


def _fixed_point(
    chooser: _Chooser, progress: Progress, ahead: Ahead, real: Bool[Array, "M"], max_passes: int
) -> tuple[Progress, Decision]:
    """Pass over all agents of a window until what they read is what they do.

    Agent k reads agents before it only, so the first k agents are right after k passes, and M
    passes always suffice; coupling decides how many are needed. The whole batch waits for its
    slowest element.
    """
    *batch, size, _ = ahead.mask.shape
    distribution = chooser.distribution

    def attempt(read: Action, passes: Float[Array, ""]) -> _Attempt:
        tokens = chooser.decoder.embed.shift_right(distribution.token(read), first=progress.token)
        state, out = chooser.decoder.extend(progress.state, chooser.embed(tokens), ahead.context)
        action = distribution.sample_from_noise(out, ahead.mask, ahead.noise)
        return _Attempt(read, action, out, state, passes + 1)

    def settled(last: _Attempt) -> Bool[Array, ""]:
        moved = ~distribution.equal(last.read, last.action) & real
        return ~jnp.any(moved[..., :-1])  # no agent of the window reads its last one

    # The first guess: what would be chosen without any preference.
    indifferent = jnp.zeros((*batch, size, distribution.num_outputs), ahead.noise.dtype)
    first = attempt(
        distribution.sample_from_noise(indifferent, ahead.mask, ahead.noise), jnp.zeros(())
    )
    last = lax.while_loop(
        lambda last: ~settled(last) & (last.passes < max_passes),
        lambda last: attempt(last.action, last.passes),
        first,
    )

    def found() -> tuple[Progress, Decision]:
        token = chooser.token(jnp.take(last.action, size - 1, axis=len(batch)))
        passes = jnp.broadcast_to(last.passes, tuple(batch))
        return Progress(state=last.state, token=token), Decision(last.action, last.out, passes)

    def given_up() -> tuple[Progress, Decision]:
        after, decision = _one_by_one(chooser, progress, ahead)
        return after, eqx.tree_at(lambda d: d.passes, decision, decision.passes + last.passes)

    if max_passes >= size:
        return found()
    return lax.cond(settled(last), found, given_up)
