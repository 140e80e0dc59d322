"""Sequence policies: agents as a sequence, actions one after another.

`mam` and `mat` differ in their mixers only.
"""

from dataclasses import dataclass, replace
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

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
from mam.networks.memory.base import AbstractRecurrence
from mam.networks.memory.registry import make_memory
from mam.networks.mixers.registry import MixerFamily, families_of
from mam.networks.order import check_order, order_agents, take_agents
from mam.networks.reader import Reader, ReaderMemory
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
    critic: ReaderMemory = ((), ())  # of the one that reads for values alone


# Of the key of the weights: small numbers make keys that splits make.
CRITIC = 2**31 - 1


class SequencePolicy(eqx.Module):
    """An encoder over all agents' observations, and a decoder that chooses actions one by one.

    Joint policy: π(a | o) = Π_k π(a_{i_k} | o, a_{i_1}, …, a_{i_{k−1}}) with i_1, i_2, … the order
    of deciding, the living first (`mam.networks.order`).

    Source: MAT (arXiv 2205.14953), MAM (arXiv 2410.19382). Differences: the order is an output of
    `act` and an input of `evaluate`; acting is recurrent and never recomputes earlier agents;
    values may have an embedding, a memory and an encoder of their own (`network.critic`).
    """

    embed: ObservationEmbedding
    memory: AbstractRecurrence
    encoder: Encoder
    decoder: Decoder
    distribution: ActionDistribution
    critic_reader: Reader | None  # None where values are read from the encoder of the policy
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
        separate = config.critic == "separate"
        self.embed = ObservationEmbedding(spec, config, key=embed_key)
        self.encoder = Encoder(layout.encoder, config, valued=not separate, key=encoder_key)
        self.distribution = make_distribution(spec)
        self.memory = make_memory(config, self.distribution, key=memory_key)
        self.decoder = Decoder(
            self.distribution, layout.decoder, layout.cross, config, key=decoder_key
        )
        self.num_agents = spec.num_agents
        self.decoding = decoding
        self.dtype = config.dtype
        self.order, self.order_scans = config.order, config.encoder.order_scans
        self.critic_reader = None
        if separate:
            critic_key = jax.random.fold_in(key, CRITIC)
            embed_key, encoder_key, memory_key = jax.random.split(critic_key, 3)
            self.critic_reader = replace(
                self.reader,
                embed=ObservationEmbedding(spec, config, key=embed_key),
                memory=make_memory(config, self.distribution, key=memory_key),
                encoder=Encoder(layout.encoder, config, key=encoder_key),
            )

    @property
    def reader(self) -> Reader:
        """What reads the observations for the decoder, and for the values unless another does."""
        return Reader(
            self.embed, self.memory, self.encoder, self.order, self.order_scans, self.dtype
        )

    @property
    def value_layer(self) -> Dense:
        """The value head's last layer."""
        return cast(Head, (self.critic_reader or self).encoder.value_head).out

    @property
    def critic(self) -> Head | Reader | None:
        """The part that values alone depend on."""
        return self.encoder.value_head if self.critic_reader is None else self.critic_reader

    def init_memory(self, batch: tuple[int, ...] = ()) -> Memory:
        """Return the memory before an episode; see `mam.types.Policy`."""
        agents, encoder = self.reader.init_memory(batch, self.num_agents)
        critic = self.critic_reader
        return SequenceMemory(
            agents=agents,
            encoder=encoder,
            decoder=self.decoder.init_memory(batch),
            critic=critic.init_memory(batch, self.num_agents) if critic else ((), ()),
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
        own, obs_rep = self.reader.step((memory.agents, memory.encoder), obs, order, reset)
        critic, value = self.values(memory.critic, obs_rep, obs, order, reset)
        past = Past(memory.decoder, take_agents(obs.alive, order), reset)
        mask = take_agents(obs.action_mask, order)
        inputs = DecodeInputs(self.decoder.read(obs_rep), mask, take_agents(noise, order))
        # 2. The actions.
        decision = decide(self.decoder, self.distribution, inputs, self.decoding, past)
        # 3. Their log-probabilities, and everything back in the order of the agents.
        log_prob = self.distribution.log_prob(decision.out, mask, decision.action)
        by_agent = jnp.argsort(order, axis=-1)
        action = take_agents(decision.action, by_agent)
        memory = self._noted(own, critic, decision.memory, action)
        return memory, PolicyOutput(
            action=action,
            log_prob=take_agents(log_prob, by_agent),
            value=take_agents(value, by_agent),
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
        steps = (obs, action, order, reset)
        obs_rep = self.reader.unroll((memory.agents, memory.encoder), *steps)
        if self.critic_reader is None:
            value = self.encoder.values(obs_rep)
        else:
            critic = self.critic_reader
            value = critic.encoder.values(critic.unroll(memory.critic, *steps))
        past = Past(memory.decoder, take_agents(obs.alive, order), reset)
        action, mask = take_agents(action, order), take_agents(obs.action_mask, order)
        out = self.decoder(self.distribution.token(action), obs_rep, past)
        by_agent = jnp.argsort(order, axis=-1)
        return Evaluation(
            log_prob=take_agents(self.distribution.log_prob(out, mask, action), by_agent),
            entropy=take_agents(self.distribution.entropy(out, mask), by_agent),
            value=take_agents(value, by_agent),
            distribution=take_agents(self.distribution.parameters(out, mask), by_agent),
        )

    def follow(
        self, memory: Memory, obs: Observation, action: Action, order: Order, reset: Reset
    ) -> Memory:
        """Return the memory after a step at which another acted; see `FollowingPolicy`."""
        own, obs_rep = self.reader.step((memory.agents, memory.encoder), obs, order, reset)
        critic, _ = self.values(memory.critic, obs_rep, obs, order, reset)
        past = Past(memory.decoder, take_agents(obs.alive, order), reset)
        token = self.distribution.token(take_agents(action, order))
        return self._noted(own, critic, self.decoder.follow(token, obs_rep, past), action)

    def successor_values(
        self, memory: Memory, obs: Observation, action: Action, reset: Reset, successor: Observation
    ) -> Float[Array, "*batch N"]:
        """Return the values of what followed every step; see `mam.types.Policy`."""
        critic, own = self.critic_reader, memory.critic
        if critic is None:
            critic, own = self.reader, (memory.agents, memory.encoder)
        return critic.successor_values(own, obs, action, reset, successor)

    def values(
        self,
        memory: ReaderMemory,
        obs_rep: Float[Array, "*batch N E"],
        obs: Observation,
        order: Order,
        reset: Reset,
    ) -> tuple[ReaderMemory, Float[Array, "*batch N"]]:
        """Return the critic's memory after a step, and the values in the order of deciding.

        Args:
            memory: of the critic, if it is separate.
            obs_rep: what the decoder reads, as `reader` returned it.
            obs: what is seen at the step.
            order: order[k] decides k-th.
            reset: whether the step is the first of its episode.
        """
        if self.critic_reader is None:
            return memory, self.encoder.values(obs_rep)
        memory, obs_rep = self.critic_reader.step(memory, obs, order, reset)
        return memory, self.critic_reader.encoder.values(obs_rep)

    def _noted(
        self,
        own: ReaderMemory,
        critic: ReaderMemory,
        decoder: tuple[DecoderState, ...],
        action: Action,
    ) -> SequenceMemory:
        """Return the memory after a step, once it is known what the agents did at it."""
        if self.critic_reader is not None:
            critic = self.critic_reader.note(critic, action)
        return SequenceMemory(*self.reader.note(own, action), decoder, critic)
