"""What agents did at the step before, read beside what they see."""

from dataclasses import replace

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from mam.networks.actions import ActionDistribution, Token
from mam.networks.embed import ActionEmbedding
from mam.networks.memory.base import AbstractRecurrence
from mam.types import Action


class LastActionState(eqx.Module):
    """The recurrence's own, and the agents' tokens of the step before."""

    recurrence: PyTree
    token: Token


class LastAction(AbstractRecurrence):
    """Adds the embedding of an agent's last action to what the recurrence reads of the agent.

    At the first step of an episode that is the start token's.
    """

    recurrence: AbstractRecurrence
    embed: ActionEmbedding
    distribution: ActionDistribution

    def __init__(
        self,
        recurrence: AbstractRecurrence,
        distribution: ActionDistribution,
        d_model: int,
        *,
        key: Key[Array, ""],
    ):
        self.recurrence, self.distribution = recurrence, distribution
        self.embed = ActionEmbedding(distribution, d_model, key=key)

    def init(self, shape):
        return LastActionState(self.recurrence.init(shape), self.embed.start(shape))

    def step(self, state, x, reset):
        inner, y = self.recurrence.step(
            state.recurrence, x + self._embed(state.token, reset), reset
        )
        return replace(state, recurrence=inner), y

    def note(self, state, action):
        return replace(state, token=self._token(action))

    def unroll(self, state, x, reset, action):
        done = self._token(action)
        before = jnp.concatenate([state.token[None], done[:-1]])
        inner, y = self.recurrence.unroll(
            state.recurrence, x + self._embed(before, reset), reset, action
        )
        return LastActionState(inner, done[-1]), y

    def _token(self, action: Action) -> Token:
        return self.embed.pad(self.distribution.token(action))

    def _embed(self, token: Token, reset: Bool[Array, "*batch"]) -> Float[Array, "*batch N E"]:
        first = reset[..., None] if self.embed.indexed else reset[..., None, None]
        return self.embed(jnp.where(first, self.embed.start(()), token))
