"""The decoder: from the actions chosen so far and the observation representation to the next agent's output."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float, Int, Key

from mam.config import NetworkConfig
from mam.networks.blocks import DecoderBlock, DecoderState
from mam.networks.heads import Head
from mam.networks.layers import HIDDEN_GAIN, LayerNorm
from mam.networks.mixers import MixerFamily
from mam.types import Action, AgentAction, EnvSpec

Token = Int[Array, "..."] | Float[Array, "... K"]  # what an agent reads of the action before its own; K = A + 1


class ActionEmbedding(eqx.Module):
    """LN(GELU(token W)), W a table of num_actions + 1 rows: a bias-free dense layer (MAT, §3).

    A token is the action before: one-hot, for which the index stands, or its components; the last row of the
    table is the start token's, which the first agent reads.
    """

    table: Float[Array, "K E"]
    norm: LayerNorm
    continuous: bool = eqx.field(static=True)

    def __init__(self, spec: EnvSpec, d_model: int, *, key: Key[Array, ""]):
        self.table = initializers.orthogonal(HIDDEN_GAIN)(key, (spec.num_actions + 1, d_model))
        self.norm = LayerNorm(d_model)
        self.continuous = spec.continuous

    def start(self, batch: tuple[int, ...]) -> Token:
        """The start token."""
        last = self.table.shape[0] - 1
        if self.continuous:
            return jnp.broadcast_to(jnp.zeros(last + 1).at[last].set(1.0), (*batch, last + 1))
        return jnp.full(batch, last, jnp.int32)

    def token(self, action: AgentAction) -> Token:
        """The token that stands for an action."""
        return jnp.concatenate([action, jnp.zeros_like(action[..., :1])], axis=-1) if self.continuous else action

    def previous(self, action: Action) -> Token:
        """Teacher-forced: what each of the agents reads, given all their actions in the order of deciding."""
        axis = -2 if self.continuous else -1
        tokens = self.token(action)
        start = jnp.expand_dims(self.start(tokens.shape[: tokens.ndim + axis]), axis)
        return jnp.concatenate([start, jnp.take(tokens, jnp.arange(tokens.shape[axis] - 1), axis=axis)], axis=axis)

    def __call__(self, token: Token) -> Float[Array, "... E"]:
        if self.continuous:
            return self.norm(jax.nn.gelu(token @ self.table))
        return self.norm(jax.nn.gelu(self.table))[token]  # A + 1 rows are normalised, not one per token


class Decoder(eqx.Module):
    """The embedded action before, then the blocks; a head makes logits, or means, of the result (MAT, §3)."""

    embed: ActionEmbedding
    blocks: tuple[DecoderBlock, ...]
    head: Head

    def __init__(self, spec: EnvSpec, layout: Sequence[MixerFamily], sizes: NetworkConfig, *, key: Key[Array, ""]):
        table_key, head_key, *block_keys = jax.random.split(key, 2 + len(layout))
        self.embed = ActionEmbedding(spec, sizes.d_model, key=table_key)
        self.blocks = tuple(DecoderBlock(mixers, sizes, key=k) for mixers, k in zip(layout, block_keys, strict=True))
        self.head = Head(sizes.d_model, spec.num_actions, key=head_key)

    def __call__(self, action: Action, obs_rep: Float[Array, "*batch N E"]) -> Float[Array, "*batch N A"]:
        """Teacher-forced: the output for every agent given the actions before it, in the order of deciding."""
        x = self.embed(self.embed.previous(action))
        for block in self.blocks:
            x = block(x, obs_rep)
        return self.head(x)

    def init_state(self, num_agents: int, batch: tuple[int, ...] = ()) -> tuple[DecoderState, ...]:
        return tuple(block.init_state(num_agents, batch) for block in self.blocks)

    def step(
        self, state: tuple[DecoderState, ...], previous: Token, obs_rep: Float[Array, "*batch E"]
    ) -> tuple[tuple[DecoderState, ...], Float[Array, "*batch A"]]:
        """Autoregressive: the output for the next agent given the token of the action before."""
        x = self.embed(previous)
        states = []
        for block, block_state in zip(self.blocks, state, strict=True):
            block_state, x = block.step(block_state, x, obs_rep)
            states.append(block_state)
        return tuple(states), self.head(x)
