"""What is made of all agents' observations: embedding, memory over time, and encoder.

A sequence policy has one, for its decoder and its values, or another one for its values.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from mam.networks.embed import ObservationEmbedding
from mam.networks.encoder import Encoder, EncoderMemory
from mam.networks.memory.base import AbstractRecurrence, unroll_successors
from mam.networks.order import order_agents, shifted_orders, take_agents
from mam.types import Action, Observation, Order, Reset

ReaderMemory = tuple[PyTree, EncoderMemory]  # every agent's own, and that of the mixers


class Reader(eqx.Module):
    """Observations to representations, one per agent, in the order of deciding.

    Orders are given wherever agents act; `order` is that in which values alone are computed.
    """

    embed: ObservationEmbedding
    memory: AbstractRecurrence
    encoder: Encoder
    order: str = eqx.field(static=True)  # name of an order
    order_scans: int = eqx.field(static=True)  # curves along which agents are encoded
    dtype: str = eqx.field(static=True)  # of the activations

    def init_memory(self, batch: tuple[int, ...], num_agents: int) -> ReaderMemory:
        """Return the memory before an episode.

        Args:
            batch: leading axes.
            num_agents: N.
        """
        return self.memory.init((*batch, num_agents)), self.encoder.init_memory(batch)

    def step(
        self, memory: ReaderMemory, obs: Observation, order: Order, reset: Reset
    ) -> tuple[ReaderMemory, Float[Array, "*batch N E"]]:
        """Read one environment step.

        Args:
            memory: after the step before; the agents' own is still to be told what they do at this
                one (`note`).
            obs: what is seen at the step.
            order: order[k] decides k-th.
            reset: whether the step is the first of its episode.
        """
        agents, x = self.memory.step(memory[0], self.embed(obs), reset)
        encoder, obs_rep = self._encode(memory[1], x, obs, order, reset)
        return (agents, encoder), obs_rep

    def note(self, memory: ReaderMemory, action: Action) -> ReaderMemory:
        """Return the memory after a step, once it is known what the agents did at it.

        Args:
            memory: after `step`.
            action: the joint action, by agent.
        """
        return self.memory.note(memory[0], action), memory[1]

    def unroll(
        self, memory: ReaderMemory, obs: Observation, action: Action, order: Order, reset: Reset
    ) -> Float[Array, "*batch N E"]:
        """Read steps in one pass.

        Args:
            memory: before the first step; if there is none, all leading axes are alike.
            obs: time first where there is memory.
            action: what the agents did, for memories that read it.
            order: order[k] decides k-th.
            reset: whether a step is the first of its episode.
        """
        _, x = self.memory.unroll(memory[0], self.embed(obs), reset, action)
        alive, scans = take_agents(obs.alive, order), self.scans(obs, order)
        return self.encoder.unroll(memory[1], self.in_order(x, order), alive, reset, scans)[1]

    def successor_values(
        self,
        memory: ReaderMemory,
        obs: Observation,
        action: Action,
        reset: Reset,
        successor: Observation,
    ) -> Float[Array, "*batch N"]:
        """Return the values of what followed every step; see `mam.types.Policy`."""
        x, next_x = self.embed(obs), self.embed(successor)
        next_x = unroll_successors(self.memory, memory[0], x, reset, action, next_x)
        if not jax.tree.leaves(memory[1]):
            return self._value(memory[1], next_x, successor, reset)[1]
        _, x = self.memory.unroll(memory[0], x, reset, action)
        goes_on = jnp.zeros(reset.shape[1:], bool)

        def step(encoder, inputs):
            x, obs, reset, next_x, successor = inputs
            encoder, _ = self._value(encoder, x, obs, reset)
            return encoder, self._value(encoder, next_x, successor, goes_on)[1]

        return lax.scan(step, memory[1], (x, obs, reset, next_x, successor))[1]

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

    def in_order(self, x: Float[Array, "*batch N E"], order: Order) -> Float[Array, "*batch N E"]:
        """Return what the encoder reads, in the order of deciding and in the activations' type.

        Args:
            x: the memory's outputs, by agent.
            order: order[k] decides k-th.
        """
        return take_agents(x if self.dtype == "float32" else x.astype(self.dtype), order)

    def _encode(
        self,
        memory: EncoderMemory,
        x: Float[Array, "*batch N E"],
        obs: Observation,
        order: Order,
        reset: Reset,
    ) -> tuple[EncoderMemory, Float[Array, "*batch N E"]]:
        alive, scans = take_agents(obs.alive, order), self.scans(obs, order)
        return self.encoder.step(memory, self.in_order(x, order), alive, reset, scans)

    def _value(
        self,
        memory: EncoderMemory,
        x: Float[Array, "*batch N E"],
        obs: Observation,
        reset: Reset,
    ) -> tuple[EncoderMemory, Float[Array, "*batch N"]]:
        order = order_agents(self.order, obs)
        memory, obs_rep = self._encode(memory, x, obs, order, reset)
        return memory, take_agents(self.encoder.values(obs_rep), jnp.argsort(order, axis=-1))
