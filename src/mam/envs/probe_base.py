"""The base of all probes."""

import abc
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from mam.types import Environment, Observation


class CueState(eqx.Module):
    """The answer that is asked of each agent, and how far the episode has come."""

    cue: Int[Array, "N"] | Int[Array, "N K"]
    step_count: Int[Array, ""]


@dataclass(frozen=True)
class Probe(Environment, abc.ABC):
    """A tiny task with known best and random returns; all agents are alive."""

    num_agents: int

    @property
    @abc.abstractmethod
    def optimal_return(self) -> float:
        """Expected return of the best policy without memory (of a `MemoryProbe`: with)."""

    @property
    @abc.abstractmethod
    def random_return(self) -> float:
        """Expected return of uniformly random legal actions."""

    def _draw_cue(self, key: Key[Array, ""]) -> Int[Array, "N"]:
        return jax.random.randint(key, (self.num_agents,), 0, self.spec.num_actions)

    def _observe(self, view: Float[Array, "N O"]) -> Observation:
        action_mask = jnp.ones((self.num_agents, self.spec.num_actions), bool)
        return Observation(view, action_mask, alive=jnp.ones(self.num_agents, bool))

    def _blank(self) -> Observation:
        return self._observe(jnp.ones((self.num_agents, 1)))
