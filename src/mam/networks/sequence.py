"""Sequence policies: agents as a sequence, actions one after another.

`mam` and `mat` differ in their mixers only.
"""

from dataclasses import dataclass, replace
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from mam.config import NetworkConfig
from mam.errors import UserError
from mam.networks.actions import ActionDistribution, agent_noise, make_distribution
from mam.networks.blocks import DecoderState
from mam.networks.decoder import Decoder, Past
from mam.networks.decoding.decide import DecodeInputs, Decoding, decide
from mam.networks.embed import ObservationEmbedding
from mam.networks.encoder import Encoder, EncoderMemory
from mam.networks.heads import Head
from mam.networks.layers import Dense
from mam.networks.memory.base import AbstractRecurrence, unroll_successors
from mam.networks.memory.registry import make_memory
from mam.networks.mixers.registry import MixerFamily, families_of
from mam.networks.order import check_order, order_agents, shifted_orders, take_agents
from mam.networks.tower import Tower, make_critic
from mam.types import (
    Action,
    EnvSpec,
    Evaluation,
    Greedy,
    Keys,
    Memory,
    Observation,
    Order,
    PolicyOutput,
    Reset,
)


@dataclass(frozen=True)
class Layout:
    """The mixers of every block."""

    encoder: tuple[MixerFamily, ...]
    decoder: tuple[MixerFamily, ...]
    cross: tuple[MixerFamily, ...]  # of the decoder's blocks

    @classmethod
    def of(cls, letter: str, config: NetworkConfig) -> "Layout":
        """Return the layouts of the configuration, or `num_blocks` times one letter.

        Args:
            letter: of the family of mixers that the policy is named after.
            config: of the networks, with their layouts if any.

        Raises:
            UserError: for a letter of no mixer, or a decoder whose layouts differ in length.
        """
        own = letter * config.num_blocks
        decoder = config.decoder.layout or own
        cross = config.decoder.cross or decoder
        if len(cross) != len(decoder):
            raise UserError(
                f"network.decoder.cross must have a letter for each of the decoder's "
                f"{len(decoder)} blocks, got {cross!r}"
            )
        return cls(
            encoder=families_of(config.encoder.layout or own, "network.encoder.layout"),
            decoder=families_of(decoder, "network.decoder.layout"),
            cross=families_of(cross, "network.decoder.cross"),
        )

    @property
    def remembers(self) -> bool:
        """Whether a mixer remembers earlier environment steps."""
        return any(family.remembers for family in self.encoder + self.decoder + self.cross)


class SequenceMemory(eqx.Module):
    """The memories of a sequence policy: every agent's own, and those of the mixers."""

    agents: PyTree
    encoder: EncoderMemory
    decoder: tuple[DecoderState, ...]
    critic: PyTree = ()  # every agent's, of a critic of its own


# Of the key of the weights: small numbers make keys that splits make.
CRITIC = 2**31 - 1


class SequencePolicy(eqx.Module):
    """An encoder over all agents' observations, and a decoder that chooses actions one by one.

    Joint policy: π(a | o) = Π_k π(a_{i_k} | o, a_{i_1}, …, a_{i_{k−1}}) with i_1, i_2, … the order
    of deciding, the living first (`mam.networks.order`).

    Source: MAT (arXiv 2205.14953), MAM (arXiv 2410.19382). Differences: the order is an output of
    `act` and an input of `evaluate`; acting is recurrent and never recomputes earlier agents;
    there may be a network for values alone (`network.critic`).
    """

    embed: ObservationEmbedding
    memory: AbstractRecurrence
    encoder: Encoder
    decoder: Decoder
    distribution: ActionDistribution
    tower: Tower | None  # reads values; None if the encoder's head does
    num_agents: int = eqx.field(static=True)
    decoding: Decoding = eqx.field(static=True)
    dtype: str = eqx.field(static=True)  # of the activations
    order: str = eqx.field(static=True)  # name of the order in which agents decide
    order_scans: int = eqx.field(static=True)  # curves along which they are encoded

    def __init__(
        self,
        spec: EnvSpec,
        layout: Layout,
        config: NetworkConfig,
        decoding: Decoding,
        *,
        key: Key[Array, ""],
    ):
        check_order(config.order, spec)
        if config.encoder.order_scans > 1 and layout.remembers:
            raise UserError(
                "network.encoder.order_scans must be 1 where mixers remember earlier steps, "
                f"got {config.encoder.order_scans}"
            )
        embed_key, encoder_key, decoder_key, memory_key = jax.random.split(key, 4)
        self.embed = ObservationEmbedding(spec, config, key=embed_key)
        shared = config.critic in ("auto", "shared")
        self.encoder = Encoder(layout.encoder, config, valued=shared, key=encoder_key)
        self.distribution = make_distribution(spec)
        self.memory = make_memory(config, self.distribution, key=memory_key)
        self.decoder = Decoder(
            self.distribution, layout.decoder, layout.cross, config, key=decoder_key
        )
        self.tower = None
        if not shared:
            view_key, tower_key = jax.random.split(jax.random.fold_in(key, CRITIC))
            self.tower = make_critic(
                config, spec, self.distribution, view_key=view_key, key=tower_key
            )
        self.num_agents = spec.num_agents
        self.decoding = decoding
        self.dtype = config.dtype
        self.order, self.order_scans = config.order, config.encoder.order_scans

    @property
    def value_layer(self) -> Dense:
        """The value head's last layer."""
        head = self.encoder.value_head if self.tower is None else self.tower.head
        return cast(Head, head).out

    @property
    def critic(self) -> Head | Tower | None:
        """The part that values alone depend on."""
        return self.encoder.value_head if self.tower is None else self.tower

    def init_memory(self, batch: tuple[int, ...] = ()) -> Memory:
        """Return the memory before an episode; see `mam.types.Policy`."""
        return SequenceMemory(
            agents=self.memory.init((*batch, self.num_agents)),
            encoder=self.encoder.init_memory(batch),
            decoder=self.decoder.init_memory(batch),
            critic=() if self.tower is None else self.tower.memory.init((*batch, self.num_agents)),
        )

    def act(
        self, memory: Memory, obs: Observation, reset: Reset, key: Keys, *, greedy: Greedy = False
    ) -> tuple[Memory, PolicyOutput]:
        """Choose one joint action per batch element, agent after agent in the order of its name.

        Args:
            memory: of every agent and of the mixers that have one, after step t − 1.
            obs: what is seen at step t; the dead decide last, and nobody reads their rows.
            reset: whether t is the first step of an episode.
            key: gives every agent noise of its own, whenever it decides.
            greedy: leave out the noise, and that of a random order.

        Returns:
            The memory after step t, and the joint action, by agent.
        """
        noise = agent_noise(self.distribution, key, obs.alive.shape[-1])
        noise = jnp.where(greedy, 0.0, noise)
        return self._act(memory, obs, reset, noise, order_agents(self.order, obs, key, greedy))

    def act_on_noise(
        self, memory: Memory, obs: Observation, reset: Reset, noise: Float[Array, "*batch N Z"]
    ) -> tuple[Memory, PolicyOutput]:
        """Choose the joint action that noise leads to, the most likely one if it is zero.

        Args:
            memory: after step t − 1.
            obs: what is seen at step t.
            reset: whether t is the first step of an episode.
            noise: of every agent, as `draw_noise` of the distribution draws it. No order is drawn:
                that of a random one is by index.
        """
        return self._act(memory, obs, reset, noise, order_agents(self.order, obs))

    def _act(
        self,
        memory: Memory,
        obs: Observation,
        reset: Reset,
        noise: Float[Array, "*batch N Z"],
        order: Order,
    ) -> tuple[Memory, PolicyOutput]:
        # 1. Everything that does not depend on the actions, for all agents at once, in the order of
        #    deciding.
        agents, x = self.memory.step(memory.agents, self.embed(obs), reset)
        encoder, obs_rep = self.encode(memory.encoder, x, obs, order, reset)
        past = Past(memory.decoder, take_agents(obs.alive, order), reset)
        mask = take_agents(obs.action_mask, order)
        inputs = DecodeInputs(self.decoder.read(obs_rep), mask, take_agents(noise, order))
        # 2. The actions.
        decision = decide(self.decoder, self.distribution, inputs, self.decoding, past)
        # 3. Their log-probabilities, and everything back in the order of the agents.
        log_prob = self.distribution.log_prob(decision.out, mask, decision.action)
        by_agent = jnp.argsort(order, axis=-1)
        action = take_agents(decision.action, by_agent)
        # 4. Values.
        critic, value = self.values(memory.critic, obs_rep, obs, order, reset)
        if self.tower is not None:
            critic = self.tower.memory.note(critic, action)
        agents = self.memory.note(agents, action)
        memory = SequenceMemory(agents, encoder, decision.memory, critic)
        return memory, PolicyOutput(
            action=action,
            log_prob=take_agents(log_prob, by_agent),
            value=value,
            order=order,
            metrics={"decode_passes": decision.passes}
            if self.decoding.method == "fixed_point"
            else {},
        )

    def evaluate(
        self, memory: Memory, obs: Observation, action: Action, order: Order, reset: Reset
    ) -> Evaluation:
        """Evaluate stored joint actions in one teacher-forced pass.

        Args:
            memory: before the first step; if there is none, all leading axes are alike.
            obs: time first where there is memory.
            action: each agent reads those of the agents before it in `order`.
            order: as of acting, or any other.
            reset: whether a step was the first of its episode.
        """
        _, x = self.memory.unroll(memory.agents, self.embed(obs), reset, action)
        alive = take_agents(obs.alive, order)
        scans = self.scans(obs, order)
        x = self.in_order(x, order)
        _, obs_rep = self.encoder.unroll(memory.encoder, x, alive, reset, scans)
        if self.tower is None:
            value = self._shared_values(obs_rep, order)
        else:
            value = self.tower.unroll(memory.critic, obs, reset, action)[..., 0]
        action, mask = take_agents(action, order), take_agents(obs.action_mask, order)
        past = Past(memory.decoder, alive, reset)
        out = self.decoder(self.distribution.token(action), obs_rep, past)
        by_agent = jnp.argsort(order, axis=-1)
        return Evaluation(
            log_prob=take_agents(self.distribution.log_prob(out, mask, action), by_agent),
            entropy=take_agents(self.distribution.entropy(out, mask), by_agent),
            value=value,
            distribution=take_agents(self.distribution.parameters(out, mask), by_agent),
        )

    def follow(
        self, memory: Memory, obs: Observation, action: Action, order: Order, reset: Reset
    ) -> Memory:
        """Return the memory after a step at which another acted; see `FollowingPolicy`."""
        agents, x = self.memory.step(memory.agents, self.embed(obs), reset)
        agents, critic = self.memory.note(agents, action), memory.critic
        if self.tower is not None:
            critic = self.tower.follow(critic, obs, action, reset)
        if not jax.tree.leaves((memory.encoder, memory.decoder)):
            return replace(memory, agents=agents, critic=critic)
        encoder, obs_rep = self.encode(memory.encoder, x, obs, order, reset)
        past = Past(memory.decoder, take_agents(obs.alive, order), reset)
        token = self.distribution.token(take_agents(action, order))
        decoder = self.decoder.follow(token, obs_rep, past)
        return SequenceMemory(agents, encoder, decoder, critic)

    def successor_values(
        self, memory: Memory, obs: Observation, action: Action, reset: Reset, successor: Observation
    ) -> Float[Array, "*batch N"]:
        """Return the values of what followed every step; see `mam.types.Policy`."""
        if self.tower is not None:
            return self.tower.successors(memory.critic, obs, action, reset, successor)[..., 0]
        x, next_x = self.embed(obs), self.embed(successor)
        next_x = unroll_successors(self.memory, memory.agents, x, reset, action, next_x)
        if not jax.tree.leaves(memory.encoder):
            return self._value(memory.encoder, next_x, successor, reset)[1]
        _, x = self.memory.unroll(memory.agents, x, reset, action)
        goes_on = jnp.zeros(reset.shape[1:], bool)

        def step(encoder, inputs):
            x, obs, reset, next_x, successor = inputs
            encoder, _ = self._value(encoder, x, obs, reset)
            return encoder, self._value(encoder, next_x, successor, goes_on)[1]

        return lax.scan(step, memory.encoder, (x, obs, reset, next_x, successor))[1]

    def values(
        self,
        memory: PyTree,
        obs_rep: Float[Array, "*batch N E"],
        obs: Observation,
        order: Order,
        reset: Reset,
    ) -> tuple[PyTree, Float[Array, "*batch N"]]:
        """Return the critic's memory after one step, before it notes actions, and the values.

        Args:
            memory: the critic's before the step; () if it has none.
            obs_rep: as `encode` returns it.
            obs: what is seen at the step.
            order: order[k] decides k-th.
            reset: whether the step is the first of its episode.
        """
        if self.tower is None:
            return memory, self._shared_values(obs_rep, order)
        memory, value = self.tower.step(memory, obs, reset)
        return memory, value[..., 0]

    def encode(
        self,
        memory: EncoderMemory,
        x: Float[Array, "*batch N E"],
        obs: Observation,
        order: Order,
        reset: Reset,
    ) -> tuple[EncoderMemory, Float[Array, "*batch N E"]]:
        """Return the representations of one step in the order of deciding.

        Args:
            memory: the encoder's before the step.
            x: the memory's outputs, by agent.
            obs: who is alive, and where agents are.
            order: order[k] decides k-th.
            reset: whether the step is the first of its episode.

        Returns:
            The encoder's memory after the step, and what it makes of it.
        """
        alive, scans = take_agents(obs.alive, order), self.scans(obs, order)
        return self.encoder.step(memory, self.in_order(x, order), alive, reset, scans)

    def scans(self, obs: Observation, order: Order) -> tuple[Order, ...]:
        """Return the encoder's further orders, of places in the order of deciding.

        Args:
            obs: says where agents are.
            order: order[k] decides k-th.
        """
        place = jnp.argsort(order, axis=-1)
        return tuple(
            take_agents(place, other) for other in shifted_orders(self.order_scans - 1, obs)
        )

    def in_order(self, x: Float[Array, "*batch N E"], order: Int[Array, "*batch N"]) -> Array:
        """Return what the encoder reads, in the order of deciding and in the activations' type.

        Args:
            x: rows by agent.
            order: order[k] decides k-th.
        """
        return take_agents(x if self.dtype == "float32" else x.astype(self.dtype), order)

    def _value(
        self,
        memory: EncoderMemory,
        x: Float[Array, "*batch N E"],
        obs: Observation,
        reset: Reset,
    ) -> tuple[EncoderMemory, Float[Array, "*batch N"]]:
        order = order_agents(self.order, obs)
        memory, obs_rep = self.encode(memory, x, obs, order, reset)
        return memory, self._shared_values(obs_rep, order)

    def _shared_values(
        self, obs_rep: Float[Array, "*batch N E"], order: Order
    ) -> Float[Array, "*batch N"]:
        """Return the values that the encoder's head reads, by agent."""
        return take_agents(self.encoder.values(obs_rep), jnp.argsort(order, axis=-1))
