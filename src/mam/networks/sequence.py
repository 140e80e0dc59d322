"""Sequence policies: agents as a sequence, actions one after another. `mam` and `mat` differ in their mixers only."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mam.config import NetworkConfig
from mam.networks.actions import ActionKind, agent_noise, make_action_kind
from mam.networks.decoder import Decoder
from mam.networks.embed import ObservationEmbedding
from mam.networks.encoder import Encoded, Encoder
from mam.networks.mixers import MixerFamily
from mam.types import Action, EnvSpec, Evaluation, Memory, Observation, PolicyOutput


class SequencePolicy(eqx.Module):
    """An encoder over all agents' observations and a decoder that chooses their actions one after another.

    Joint policy: π(a | o) = Π_k π(a_{i_k} | o, a_{i_1}, …, a_{i_{k−1}}) with i_1, i_2, … the order of deciding:
    by index, the living first. Source: MAT (arXiv 2205.14953), MAM (arXiv 2410.19382). Differences: the order is
    an output of `act` and an input of `evaluate`; acting is recurrent and never recomputes earlier agents.
    """

    embed: ObservationEmbedding
    encoder: Encoder
    decoder: Decoder
    kind: ActionKind

    def __init__(self, spec: EnvSpec, layout: Sequence[MixerFamily], sizes: NetworkConfig, *, key: Key[Array, ""]):
        embed_key, encoder_key, decoder_key = jax.random.split(key, 3)
        self.embed = ObservationEmbedding(spec, sizes.d_model, key=embed_key)
        self.encoder = Encoder(layout, sizes, key=encoder_key)
        self.decoder = Decoder(spec, layout, sizes, key=decoder_key)
        self.kind = make_action_kind(spec)

    def init_memory(self, batch: tuple[int, ...] = ()) -> Memory:
        """Nothing is remembered across environment steps."""
        return ()

    def act(
        self,
        memory: Memory,
        obs: Observation,
        reset: Bool[Array, "*batch"],
        key: Key[Array, "*batch"],
        *,
        greedy: bool = False,
    ) -> tuple[Memory, PolicyOutput]:
        """Chooses one joint action per batch element; see `mam.types.Policy`."""
        num_agents, num_actions = obs.action_mask.shape[-2:]
        batch = obs.alive.shape[:-1]
        # 1. Everything that does not depend on the actions, for all agents at once, in the order of deciding.
        order = decision_order(obs.alive)
        encoded = self._encode(obs, order)
        mask = _rows(obs.action_mask, order)
        noise = jnp.zeros(mask.shape)
        if not greedy:
            noise = _rows(agent_noise(self.kind, key, num_agents, num_actions), order)
        # 2. One agent after another.
        xs = jax.tree.map(lambda x: jnp.moveaxis(x, -2, 0), (encoded.obs_rep, mask, noise))

        def decide(carry, inputs):
            state, token = carry
            obs_rep, mask, noise = inputs
            state, out = self.decoder.step(state, token, obs_rep)
            action = self.kind.choose(out, mask, noise)
            return (state, self.decoder.embed.token(action)), (action, out)

        start = (self.decoder.init_state(num_agents, batch), self.decoder.embed.start(batch))
        _, (action, out) = lax.scan(decide, start, xs)
        # 3. Log-probabilities after the loop, and everything back in the order of the agents.
        action, out = jnp.moveaxis(action, 0, len(batch)), jnp.moveaxis(out, 0, -2)
        log_prob = self.kind.log_prob(out, mask, action)
        by_agent = jnp.argsort(order, axis=-1)
        return memory, PolicyOutput(
            action=_rows(action, by_agent),
            log_prob=_rows(log_prob, by_agent),
            value=_rows(encoded.value, by_agent),
            order=order,
        )

    def evaluate(
        self,
        memory: Memory,
        obs: Observation,
        action: Action,
        order: Int[Array, "*batch N"],
        reset: Bool[Array, "*batch"],
    ) -> Evaluation:
        """Teacher-forced pass over stored joint actions; see `mam.types.Policy`."""
        encoded = self._encode(obs, order)
        action, mask = _rows(action, order), _rows(obs.action_mask, order)
        out = self.decoder(action, encoded.obs_rep)
        by_agent = jnp.argsort(order, axis=-1)
        return Evaluation(
            log_prob=_rows(self.kind.log_prob(out, mask, action), by_agent),
            entropy=_rows(self.kind.entropy(out, mask), by_agent),
            value=_rows(encoded.value, by_agent),
        )

    def value(self, memory: Memory, obs: Observation) -> Float[Array, "*batch N"]:
        """State value per agent, from the encoder alone."""
        order = decision_order(obs.alive)
        return _rows(self._encode(obs, order).value, jnp.argsort(order, axis=-1))

    def _encode(self, obs: Observation, order: Int[Array, "*batch N"]) -> Encoded:
        return self.encoder(_rows(self.embed(obs), order), _rows(obs.alive, order))


def decision_order(alive: Bool[Array, "*batch N"]) -> Int[Array, "*batch N"]:
    """Agents by index, the living first: order[k] decides k-th."""
    return jnp.argsort(~alive, axis=-1, stable=True).astype(jnp.int32)


def _rows(x: Array, index: Int[Array, "*batch N"]) -> Array:
    """Entries of [*batch, N] or rows of [*batch, N, F], taken along the agents."""
    if x.ndim == index.ndim:
        return jnp.take_along_axis(x, index, axis=-1)
    return jnp.take_along_axis(x, index[..., None], axis=-2)
