"""The decoder: from earlier actions and the observation representation to an agent's output."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Bool, Float, Key

from mam.config import NetworkConfig
from mam.networks.actions import ActionDistribution, Token
from mam.networks.blocks import DecoderBlock, DecoderState, Run
from mam.networks.heads import Head
from mam.networks.layers import HIDDEN_GAIN, LayerNorm, lookup
from mam.networks.mixers.base import MixerInputs
from mam.networks.mixers.registry import MixerFamily

# Tokens [*batch, E], and what the first block's mixer reads of them.
Embedded = tuple[Float[Array, "..."], MixerInputs]


class ActionEmbedding(eqx.Module):
    """LN(GELU(token W)), W a table of V = token_dim + 1 rows: a bias-free dense layer (MAT, §3).

    Its tokens are the distribution's with a feature more, the last, which only the start token has:
    that is what the first agent reads. Where tokens are one-hot, indices of rows stand for them.
    """

    table: Float[Array, "V E"]
    norm: LayerNorm
    indexed: bool = eqx.field(static=True)

    def __init__(self, distribution: ActionDistribution, d_model: int, *, key: Key[Array, ""]):
        self.table = initializers.orthogonal(HIDDEN_GAIN)(
            key, (distribution.token_dim + 1, d_model)
        )
        self.norm = LayerNorm(d_model)
        self.indexed = distribution.indexed

    def start(self, batch: tuple[int, ...]) -> Token:
        """Return the start token, for leading axes `batch`."""
        last = self.table.shape[0] - 1
        if self.indexed:
            return jnp.full(batch, last, jnp.int32)
        return jnp.broadcast_to(jnp.zeros(last + 1).at[last].set(1.0), (*batch, last + 1))

    def pad(self, token: Token) -> Token:
        """Return the distribution's token with what tells it from the start token."""
        return (
            token
            if self.indexed
            else jnp.concatenate([token, jnp.zeros_like(token[..., :1])], axis=-1)
        )

    def shift_right(self, tokens: Token, first: Token | None = None) -> Token:
        """Return what each agent reads, the token of the agent before it (teacher forcing).

        Args:
            tokens: the distribution's, of all agents in the order of deciding.
            first: what the first of them reads; the start token if None.
        """
        axis = -1 if self.indexed else -2
        tokens = self.pad(tokens)
        first = self.start(tokens.shape[: tokens.ndim + axis]) if first is None else first
        return jnp.concatenate(
            [
                jnp.expand_dims(first, axis),
                jnp.take(tokens, jnp.arange(tokens.shape[axis] - 1), axis=axis),
            ],
            axis=axis,
        )

    def __call__(self, token: Token) -> Float[Array, "... E"]:
        if self.indexed:
            return lookup(self.rows(), token)
        return self.norm(jax.nn.gelu(token @ self.table))

    def rows(self) -> Float[Array, "V E"]:
        """Return the embeddings of all tokens that are indices."""
        return self.norm(jax.nn.gelu(self.table))


class Context(eqx.Module):
    """What the decoder reads of the observations, computed before the first agent acts."""

    obs_rep: Float[Array, "*batch E"]
    blocks: tuple[MixerInputs, ...]


class Past(eqx.Module):
    """What a decoder knows at the beginning of environment steps."""

    memory: tuple[DecoderState, ...]  # of every block, after the step before
    alive: Bool[Array, "*batch N"]  # the agents of the steps, the dead last
    reset: Bool[Array, "*batch"]  # whether a step is the first of its episode


class Decoder(eqx.Module):
    """The embedded action before, then the blocks; a head makes logits or means (MAT, §3).

    Every layer has two equal forms, for one agent and for several at once: `step` decides,
    `unroll` learns.
    """

    embed: ActionEmbedding
    blocks: tuple[DecoderBlock, ...]
    head: Head
    remat: bool = eqx.field(static=True)

    def __init__(
        self,
        distribution: ActionDistribution,
        layout: Sequence[MixerFamily],
        cross_layout: Sequence[MixerFamily],
        config: NetworkConfig,
        *,
        key: Key[Array, ""],
    ):
        table_key, head_key, *block_keys = jax.random.split(key, 2 + len(layout))
        self.embed = ActionEmbedding(distribution, config.d_model, key=table_key)
        self.blocks = tuple(
            DecoderBlock(mixers, cross_mixers, config, key=k)
            for mixers, cross_mixers, k in zip(layout, cross_layout, block_keys, strict=True)
        )
        self.head = Head(config.d_model, distribution.num_outputs, key=head_key)
        self.remat = config.remat

    def __call__(
        self, tokens: Token, obs_rep: Float[Array, "*batch N E"], past: Past | None = None
    ) -> Float[Array, "*batch N P"]:
        """Return the outputs for every agent given the tokens before it (teacher-forced).

        Args:
            tokens: of the stored actions, in the order of deciding.
            obs_rep: the observation representation, in the same order.
            past: where there is memory, that before the first step; axes are time first. None: all
                steps are first ones.
        """
        embedded = self.embedder(obs_rep.dtype)(self.embed.shift_right(tokens))
        context = self.read(obs_rep)
        if past is None:
            return self.unroll(None, embedded, context)[1]

        def steps(mixer, memory, inputs, context):
            return mixer.unroll_steps(memory, inputs, context, past.alive, past.reset)

        return self._run(past.memory, embedded, context, steps, remat=self.remat)[1]

    def read(self, obs_rep: Float[Array, "*batch E"]) -> Context:
        """Compute everything that does not depend on actions."""
        return Context(
            obs_rep=obs_rep,
            blocks=tuple(block.cross.project_context(obs_rep) for block in self.blocks),
        )

    def embedder(self, dtype) -> Callable[[Token], Embedded]:
        """Return the embedding of tokens, made once for all the agents that use it.

        Of indices there are few: all are embedded here, and projected, once per action and not per
        agent.
        """
        project = self.blocks[0].mixer.project
        if not self.embed.indexed:

            def embed(token: Token) -> Embedded:
                x = self.embed(token).astype(dtype)
                return x, project(x)

            return embed
        rows = self.embed.rows().astype(dtype)
        table = (rows, project(rows))
        return lambda token: lookup(table, token)

    @property
    def fused(self) -> list[Any] | None:
        """What fused decoders run in place of the mixers, in order; None if one is unknown."""
        mixers = [mixer for block in self.blocks for mixer in (block.mixer, block.cross)]
        known = [mixer.fused for mixer in mixers if mixer.fused is not None]
        return known if len(known) == len(mixers) else None

    def init_state(
        self, num_agents: int, batch: tuple[int, ...], dtype
    ) -> tuple[DecoderState, ...]:
        """Return the state before the first agent; see `DecoderBlock.init_state`."""
        return tuple(block.init_state(num_agents, batch, dtype) for block in self.blocks)

    def init_memory(self, batch: tuple[int, ...]) -> tuple[DecoderState, ...]:
        """Return the memory before an episode, for leading axes `batch`."""
        return tuple(block.init_memory(batch) for block in self.blocks)

    def start_step(self, past: Past, num_agents: int, dtype) -> tuple[DecoderState, ...]:
        """Return the state before the first agent; see `AbstractCausalMixer.start_step`."""
        return tuple(
            block.start_step(memory, num_agents, past.alive, past.reset, dtype)
            for block, memory in zip(self.blocks, past.memory, strict=True)
        )

    def end_step(self, state: tuple[DecoderState, ...]) -> tuple[DecoderState, ...]:
        """Return the memory after a step, given the state after its agents."""
        return tuple(block.end_step(own) for block, own in zip(self.blocks, state, strict=True))

    def step(
        self, state: tuple[DecoderState, ...], embedded: Embedded, context: Context
    ) -> tuple[tuple[DecoderState, ...], Float[Array, "*batch P"]]:
        """Return the outputs for the next agent (autoregressive), and the state after it.

        Args:
            state: after the agents that have decided.
            embedded: by `embedder`, the action of the last of them or the start token.
            context: what `read` gave, of the next agent alone.
        """

        def step(mixer, state, inputs, context):
            return mixer.step(state, inputs, context)

        return self._run(state, embedded, context, step, remat=False)

    def unroll(
        self, state: tuple[DecoderState, ...] | None, embedded: Embedded, context: Context
    ) -> tuple[tuple[DecoderState, ...], Float[Array, "*batch M P"]]:
        """Return the outputs for the next M agents (parallel), and the state after them.

        Args:
            state: after the agents before them; None: there are none.
            embedded: by `embedder`, the action before each of them.
            context: what `read` gave, of the M agents.
        """

        def unroll(mixer, state, inputs, context):
            return mixer.unroll(state, inputs, context)

        return self._run(state, embedded, context, unroll, remat=self.remat)

    def _run(self, state, embedded, context: Context, run: Run, *, remat: bool):
        (x, inputs), states = embedded, []
        for index, block in enumerate(self.blocks):
            call = partial(DecoderBlock.__call__, run=run)
            call = jax.checkpoint(call) if remat else call
            inputs = block.mixer.project(x) if index else inputs
            new, x = call(
                block, state and state[index], x, inputs, context.obs_rep, context.blocks[index]
            )
            states.append(new)
        return tuple(states), self.head(x)
