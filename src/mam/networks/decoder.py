"""The decoder: from earlier actions and the observation representation to an agent's output."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float, Key

from mam.config import NetworkConfig
from mam.networks.actions import ActionDistribution, Token
from mam.networks.blocks import DecoderBlock, DecoderState
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
    """The decoder's reading of the observations, computed before the first agent acts."""

    obs_rep: Float[Array, "*batch E"]
    blocks: tuple[MixerInputs, ...]


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
        self, tokens: Token, obs_rep: Float[Array, "*batch N E"]
    ) -> Float[Array, "*batch N P"]:
        """Return the outputs for every agent given the tokens before it (teacher-forced).

        Args:
            tokens: of the stored actions, in the order of deciding.
            obs_rep: the observation representation, in the same order.
        """
        embedded = self.embedder(obs_rep.dtype)(self.embed.shift_right(tokens))
        return self.unroll(None, embedded, self.read(obs_rep))[1]

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
        """The blocks that fused decoders run in place of the mixers; None if one is unknown."""
        mixers = [mixer for block in self.blocks for mixer in (block.mixer, block.cross)]
        known = [mixer.fused for mixer in mixers if mixer.fused is not None]
        return known if len(known) == len(mixers) else None

    def init_state(
        self, num_agents: int, batch: tuple[int, ...], dtype
    ) -> tuple[DecoderState, ...]:
        """Return the state of every block before the first agent decides.

        Args:
            num_agents: N, the most agents that the states will take.
            batch: leading axes.
            dtype: of what the blocks read.
        """
        return tuple(block.init_state(num_agents, batch, dtype) for block in self.blocks)

    def step(
        self, state: tuple[DecoderState, ...], embedded: Embedded, context: Context
    ) -> tuple[tuple[DecoderState, ...], Float[Array, "*batch P"]]:
        """Return the outputs for the next agent (autoregressive), and the state after it.

        Args:
            state: after the agents that have decided.
            embedded: by `embedder`, the action of the last of them or the start token.
            context: what `read` gave, of the next agent alone.
        """
        return self._run(state, embedded, context, single=True)

    def unroll(
        self, state: tuple[DecoderState, ...] | None, embedded: Embedded, context: Context
    ) -> tuple[tuple[DecoderState, ...], Float[Array, "*batch M P"]]:
        """Return the outputs for the next M agents (parallel), and the state after them.

        Args:
            state: after the agents before them; None: there are none.
            embedded: by `embedder`, the action before each of them.
            context: what `read` gave, of the M agents.
        """
        return self._run(state, embedded, context, single=False)

    def _run(self, state, embedded, context, *, single):
        (x, inputs), states = embedded, []
        for index, block in enumerate(self.blocks):
            run = partial(DecoderBlock.__call__, single=single)
            run = jax.checkpoint(run) if self.remat and not single else run
            inputs = block.mixer.project(x) if index else inputs
            new, x = run(
                block, state and state[index], x, inputs, context.obs_rep, context.blocks[index]
            )
            states.append(new)
        return tuple(states), self.head(x)
