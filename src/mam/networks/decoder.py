"""The decoder: from the actions chosen so far and the observation representation to the next agent's logits."""

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


class Decoder(eqx.Module):
    """x = LN(GELU(embed(previous action))), then the blocks; a head makes logits of the result (MAT, §3).

    The embedding is a table of num_actions + 1 rows, which equals a bias-free dense layer on a one-hot of the
    action; the last row is the start token.
    """

    action_table: Float[Array, "A+1 E"]
    norm: LayerNorm
    blocks: tuple[DecoderBlock, ...]
    head: Head

    def __init__(self, num_actions: int, layout: Sequence[MixerFamily], sizes: NetworkConfig, *, key: Key[Array, ""]):
        table_key, head_key, *block_keys = jax.random.split(key, 2 + len(layout))
        self.action_table = initializers.orthogonal(HIDDEN_GAIN)(table_key, (num_actions + 1, sizes.d_model))
        self.norm = LayerNorm(sizes.d_model)
        self.blocks = tuple(DecoderBlock(mixers, sizes, key=k) for mixers, k in zip(layout, block_keys, strict=True))
        self.head = Head(sizes.d_model, num_actions, key=head_key)

    @property
    def start_token(self) -> int:
        """What the first agent reads in place of a previous action."""
        return self.action_table.shape[0] - 1

    def _embed(self, previous: Int[Array, "*batch"]) -> Float[Array, "*batch E"]:
        return self.norm(jax.nn.gelu(self.action_table))[previous]  # A + 1 rows are normalised, not one per token

    def __call__(
        self, action: Int[Array, "*batch N"], obs_rep: Float[Array, "*batch N E"]
    ) -> Float[Array, "*batch N A"]:
        """Teacher-forced: logits of every agent given the actions before it, in the order of deciding."""
        start = jnp.full_like(action[..., :1], self.start_token)
        x = self._embed(jnp.concatenate([start, action[..., :-1]], axis=-1))
        for block in self.blocks:
            x = block(x, obs_rep)
        return self.head(x)

    def init_state(self, num_agents: int, batch: tuple[int, ...] = ()) -> tuple[DecoderState, ...]:
        return tuple(block.init_state(num_agents, batch) for block in self.blocks)

    def step(
        self, state: tuple[DecoderState, ...], previous: Int[Array, "*batch"], obs_rep: Float[Array, "*batch E"]
    ) -> tuple[tuple[DecoderState, ...], Float[Array, "*batch A"]]:
        """Autoregressive: the next agent's logits given the previous agent's action (or `start_token`)."""
        x = self._embed(previous)
        states = []
        for block, block_state in zip(self.blocks, state, strict=True):
            block_state, x = block.step(block_state, x, obs_rep)
            states.append(block_state)
        return tuple(states), self.head(x)
