"""Sequence policies: agents as a sequence, actions one after another. `mam` and `mat` differ in their mixers only."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mam.config import NetworkConfig
from mam.errors import unknown_name
from mam.networks.decoder import Decoder
from mam.networks.encoder import Encoded, Encoder
from mam.networks.heads import entropy_of, log_prob_of, mask_logits
from mam.networks.mixers import MIXERS
from mam.types import EnvSpec, Evaluation, Memory, Observation, Policy, PolicyOutput


class SequencePolicy(eqx.Module):
    """An encoder over all agents' observations and a decoder that chooses their actions one after another.

    Joint policy: π(a | o) = Π_k π(a_{i_k} | o, a_{i_1}, …, a_{i_{k−1}}) with i_1, i_2, … the order of deciding:
    by index, the living first. Source: MAT (arXiv 2205.14953), MAM (arXiv 2410.19382). Differences: the order is
    an output of `act` and an input of `evaluate`; acting is recurrent and never recomputes earlier agents.
    """

    encoder: Encoder
    decoder: Decoder

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
        mask = _gather(obs.action_mask, order)
        shape = obs.action_mask.shape
        noise = jnp.zeros(shape) if greedy else _gather(agent_gumbel(key, num_agents, num_actions), order)
        # 2. One agent after another: argmax(logits + Gumbel noise) is a sample from softmax(logits).
        xs = jax.tree.map(lambda x: jnp.moveaxis(x, -2, 0), (encoded.obs_rep, mask, noise))

        def decide(carry, inputs):
            state, previous = carry
            obs_rep, mask, noise = inputs
            state, logits = self.decoder.step(state, previous, obs_rep)
            logits = mask_logits(logits, mask)
            action = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
            return (state, action), (action, logits)

        start = jnp.full(batch, self.decoder.start_token, jnp.int32)
        _, (action, logits) = lax.scan(decide, (self.decoder.init_state(num_agents, batch), start), xs)
        # 3. Log-probabilities after the loop, and everything back in the order of the agents.
        action, logits = jnp.moveaxis(action, 0, -1), jnp.moveaxis(logits, 0, -2)
        by_agent = jnp.argsort(order, axis=-1)
        action, log_prob, value = (
            jnp.take_along_axis(x, by_agent, axis=-1) for x in (action, log_prob_of(logits, action), encoded.value)
        )
        return memory, PolicyOutput(action=action, log_prob=log_prob, value=value, order=order)

    def evaluate(
        self,
        memory: Memory,
        obs: Observation,
        action: Int[Array, "*batch N"],
        order: Int[Array, "*batch N"],
        reset: Bool[Array, "*batch"],
    ) -> Evaluation:
        """Teacher-forced pass over stored joint actions; see `mam.types.Policy`."""
        encoded = self._encode(obs, order)
        action = jnp.take_along_axis(action, order, axis=-1)
        logits = mask_logits(self.decoder(action, encoded.obs_rep), _gather(obs.action_mask, order))
        by_agent = jnp.argsort(order, axis=-1)
        log_prob, entropy, value = (
            jnp.take_along_axis(x, by_agent, axis=-1)
            for x in (log_prob_of(logits, action), entropy_of(logits), encoded.value)
        )
        return Evaluation(log_prob=log_prob, entropy=entropy, value=value)

    def value(self, memory: Memory, obs: Observation) -> Float[Array, "*batch N"]:
        """State value per agent, from the encoder alone."""
        order = decision_order(obs.alive)
        value = self._encode(obs, order).value
        return jnp.take_along_axis(value, jnp.argsort(order, axis=-1), axis=-1)

    def _encode(self, obs: Observation, order: Int[Array, "*batch N"]) -> Encoded:
        return self.encoder(_gather(obs.agents_view, order), jnp.take_along_axis(obs.alive, order, axis=-1))


def decision_order(alive: Bool[Array, "*batch N"]) -> Int[Array, "*batch N"]:
    """Agents by index, the living first: order[k] decides k-th."""
    return jnp.argsort(~alive, axis=-1, stable=True).astype(jnp.int32)


def agent_gumbel(key: Key[Array, "*batch"], num_agents: int, num_actions: int) -> Float[Array, "*batch N A"]:
    """Gumbel noise keyed by the agent, never by its place in the order."""

    def one(key, agent):
        return jax.random.gumbel(jax.random.fold_in(key, agent), (num_actions,))

    noise = jax.vmap(lambda k: jax.vmap(lambda agent: one(k, agent))(jnp.arange(num_agents)))(key.reshape(-1))
    return noise.reshape(*key.shape, num_agents, num_actions)


def _gather(x, order):
    """Rows of [*batch, N, F] in the order of deciding."""
    return jnp.take_along_axis(x, order[..., None], axis=-2)


# The mixer of every block, by policy name.
POLICIES = {"mam": "mamba", "mat": "attention"}


def make_policy(name: str, spec: EnvSpec, sizes: NetworkConfig, *, key: Key[Array, ""]) -> Policy:
    """Builds a named policy for the sizes of a task.

    Raises:
        UserError: if there is no policy of this name.
    """
    if name not in POLICIES:
        raise unknown_name("policy", name, POLICIES, see="mam list")
    layout = [MIXERS[POLICIES[name]]] * sizes.num_blocks
    encoder_key, decoder_key = jax.random.split(key)
    return SequencePolicy(
        encoder=Encoder(spec.obs_dim, layout, sizes, key=encoder_key),
        decoder=Decoder(spec.num_actions, layout, sizes, key=decoder_key),
    )
