"""The decoder: from earlier actions and the observation representation to an agent's output."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Key

from mam.config import NetworkConfig
from mam.networks.actions import ActionDistribution, Token
from mam.networks.blocks import DecoderBlock, DecoderState, Run
from mam.networks.chunks import cut_agents, hand_on, join_agents
from mam.networks.embed import ActionEmbedding
from mam.networks.heads import Head
from mam.networks.layers import lookup
from mam.networks.mixers.base import MixerInputs, required
from mam.networks.mixers.registry import MixerFamily
from mam.networks.mixers.spread import num_shares

# Tokens [*batch, E], and what the first block's mixer reads of them.
Embedded = tuple[Float[Array, "..."], MixerInputs]


class Context(eqx.Module):
    """The decoder's reading of the observations, computed before the first agent acts."""

    obs_rep: Float[Array, "*batch E"]
    blocks: tuple[MixerInputs, ...]


class Past(eqx.Module):
    """The knowledge of a decoder at the beginning of environment steps."""

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
    chunk: int | None = eqx.field(static=True)  # agents at a time in learning; all if None

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
        mixers = [mixer for block in self.blocks for mixer in (block.mixer, block.cross)]
        is_linear = all(mixer.has_constant_state for mixer in mixers)
        self.chunk = config.agent_chunk if is_linear else None

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
        tokens, embed = self.embed.shift_right(tokens), self.embedder(obs_rep.dtype)
        remembers = past is not None and jax.tree.leaves(past.memory)
        if self.chunk and self.chunk < obs_rep.shape[-2] and not remembers and num_shares() == 1:
            return self._in_chunks(tokens, obs_rep, embed)
        embedded, context = embed(tokens), self.read(obs_rep)
        if past is None:
            return self.unroll(None, embedded, context)[1]

        def steps(mixer, memory, inputs, context):
            return mixer.unroll_steps(memory, inputs, context, past.alive, past.reset)

        return self._run(past.memory, embedded, context, steps, remat=self.remat)[1]

    def _in_chunks(
        self, tokens: Token, obs_rep: Array, embed: Callable[[Token], Embedded]
    ) -> Array:
        """Run chunk after chunk of the agents, from the embedding to the outputs."""
        *batch, num_agents, _ = obs_rep.shape
        axis, state = len(batch), self.init_state(num_agents, tuple(batch), obs_rep.dtype)

        def run(state, chunk):
            tokens, obs_rep = chunk
            return self.unroll(state, embed(tokens), self.read(obs_rep))

        chunks = cut_agents((tokens, obs_rep), required(self.chunk), axis=axis)
        return join_agents(hand_on(run, state, chunks)[1], num_agents, axis=axis)

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

    def init_memory(self, batch: tuple[int, ...]) -> tuple[DecoderState, ...]:
        """Return the memory before an episode, for leading axes `batch`."""
        return tuple(block.init_memory(batch) for block in self.blocks)

    def start_step(self, past: Past, num_agents: int, dtype) -> tuple[DecoderState, ...]:
        """Return the state of every block before the first agent decides, in its episode.

        Args:
            past: memories after the step before, and who is alive at this one.
            num_agents: N, the most agents that the states will take.
            dtype: of what the blocks read.
        """
        return tuple(
            block.start_step(memory, num_agents, past.alive, past.reset, dtype)
            for block, memory in zip(self.blocks, past.memory, strict=True)
        )

    def end_step(self, state: tuple[DecoderState, ...]) -> tuple[DecoderState, ...]:
        """Return the memory after a step, given the state after its agents."""
        return tuple(block.end_step(own) for block, own in zip(self.blocks, state, strict=True))

    def follow(
        self, tokens: Token, obs_rep: Float[Array, "*batch N E"], past: Past
    ) -> tuple[DecoderState, ...]:
        """Return the memory of every block after an environment step with given actions.

        Args:
            tokens: of the actions, in the order of deciding.
            obs_rep: the observation representation, in the same order.
            past: what is known at the beginning of the step.
        """
        dtype = obs_rep.dtype
        embedded = self.embedder(dtype)(self.embed.shift_right(tokens))
        state = self.start_step(past, obs_rep.shape[-2], dtype)
        return self.end_step(self.unroll(state, embedded, self.read(obs_rep))[0])

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
