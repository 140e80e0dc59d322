"""What a mixer is: a sequence layer along the agent axis. The only thing in which MAM and MAT differ."""

from abc import abstractmethod

import equinox as eqx
from jaxtyping import Array, Bool, Float, PyTree

MixerState = PyTree


class AbstractMixer(eqx.Module):
    """Mixes agents. Any mixer may serve the encoder."""

    @abstractmethod
    def __call__(
        self,
        x: Float[Array, "*batch N E"],
        context: Float[Array, "*batch N E"] | None = None,
        *,
        alive: Bool[Array, "*batch N"] | None = None,
    ) -> Float[Array, "*batch N E"]:
        """Mixes all agents at once.

        Args:
            x: the agents, in the order in which they decide.
            context: a second sequence, for mixers that read one (the decoder's cross mixers).
            alive: agents that exist; the dead must come last. They change nothing for the others, and their
                own outputs mean nothing. None: all are alive.
        """


class AbstractCausalMixer(AbstractMixer):
    """A mixer in which no agent sees a later one, with a recurrent form equal to the parallel one."""

    @abstractmethod
    def init_state(self, num_agents: int, batch: tuple[int, ...] = ()) -> MixerState:
        """The state before the first of `num_agents` agents, with leading axes `batch`."""

    @abstractmethod
    def step(
        self, state: MixerState, x: Float[Array, "*batch E"], context: Float[Array, "*batch E"] | None = None
    ) -> tuple[MixerState, Float[Array, "*batch E"]]:
        """The next agent's output, and the state after it."""


def required(context: Array | None) -> Array:
    """The second sequence of a mixer that cannot do without one."""
    if context is None:
        raise ValueError("this mixer reads a second sequence: pass context")
    return context
