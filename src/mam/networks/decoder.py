"""The decoder: from earlier actions and the observation representation to an agent's output."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key

from mam.config import NetworkConfig
from mam.networks.actions import ActionDistribution, Token
from mam.networks.blocks import DecoderBlock, DecoderState
from mam.networks.embed import ActionEmbedding
from mam.networks.heads import Head
from mam.networks.layers import lookup
from mam.networks.mixers.base import MixerInputs
from mam.networks.mixers.registry import MixerFamily

# Tokens [*batch, E], and what the first block's mixer reads of them.
Embedded = tuple[Float[Array, "..."], MixerInputs]


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
