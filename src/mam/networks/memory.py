"""Memory: a recurrence along environment steps, for each agent by itself; a stage of every policy.

It stands between the embedding of what an agent sees and everything that mixes agents, so it
belongs to the agent and never to its place in the order of deciding. What it adds to a policy is
decided here and by name (`MEMORIES`).
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key, PyTree

from mam.config import NetworkConfig
from mam.errors import unknown_name
from mam.networks.layers import Dense


class AbstractRecurrence(eqx.Module):
    """Reads one row per agent and environment step; what it keeps between two steps is its state.

    `unroll` is `step` after `step`, in one pass. Where `reset` is True an episode begins: the state
    before it, whatever is in it, has no part in what follows.
    """

    @abstractmethod
    def init(self, shape: tuple[int, ...]) -> PyTree:
        """Return the state before an episode; () if nothing is remembered.

        Args:
            shape: [*batch, N], leading axes and agents.
        """

    @abstractmethod
    def step(
        self, state: PyTree, x: Float[Array, "*batch N E"], reset: Bool[Array, "*batch"]
    ) -> tuple[PyTree, Float[Array, "*batch N E"]]:
        """Return the state after one step, and its output.

        Args:
            state: before the step.
            x: the agents' rows.
            reset: whether the step is the first of its episode.
        """

    @abstractmethod
    def unroll(
        self, state: PyTree, x: Float[Array, "T *batch N E"], reset: Bool[Array, "T *batch"]
    ) -> tuple[PyTree, Float[Array, "T *batch N E"]]:
        """Return the state after T steps, and the outputs of all of them.

        Args:
            state: before the first step, without the time axis.
            x: the agents' rows at step t.
            reset: whether step t is the first of its episode.
        """


class NoMemory(AbstractRecurrence):
    """Passes everything on; leading axes are all alike."""

    def __init__(self, config: NetworkConfig, *, key: Key[Array, ""]):
        del config, key

    def init(self, shape: tuple[int, ...]) -> PyTree:
        return ()

    def step(
        self, state: PyTree, x: Float[Array, "*batch N E"], reset: Bool[Array, "*batch"]
    ) -> tuple[PyTree, Float[Array, "*batch N E"]]:
        return state, x

    def unroll(
        self, state: PyTree, x: Float[Array, "*batch N E"], reset: Bool[Array, "*batch"]
    ) -> tuple[PyTree, Float[Array, "*batch N E"]]:
        return state, x


class GRU(AbstractRecurrence):
    """A gated recurrent unit; the state is the output as well.

    r, z = σ(W x + U h + b);  n = tanh(W x + b + r ⊙ (U h + c));  h' = (1 − z) ⊙ n + z ⊙ h

    Source: Cho et al. 2014 (arXiv 1406.1078).
    """

    inputs: Dense  # of r, z and n side by side
    hidden: Dense
    new_bias: Float[Array, "E"]

    def __init__(self, config: NetworkConfig, *, key: Key[Array, ""]):
        input_key, hidden_key = jax.random.split(key)
        d_model = config.d_model
        self.inputs = Dense(d_model, 3 * d_model, key=input_key, gain=1.0)
        self.hidden = Dense(d_model, 3 * d_model, key=hidden_key, gain=1.0, bias=False)
        self.new_bias = jnp.zeros(d_model)

    def init(self, shape: tuple[int, ...]) -> Float[Array, "*batch N E"]:
        return jnp.zeros((*shape, self.new_bias.shape[0]), self.new_bias.dtype)

    def step(
        self,
        state: Float[Array, "*batch N E"],
        x: Float[Array, "*batch N E"],
        reset: Bool[Array, "*batch"],
    ) -> tuple[Float[Array, "*batch N E"], Float[Array, "*batch N E"]]:
        state = self._advance(state, self.inputs(x), reset)
        return state, state

    def unroll(
        self,
        state: Float[Array, "*batch N E"],
        x: Float[Array, "T *batch N E"],
        reset: Bool[Array, "T *batch"],
    ) -> tuple[Float[Array, "*batch N E"], Float[Array, "T *batch N E"]]:
        """Return the last state and all outputs; the inputs' share of the gates is one product."""

        def step(state, inputs):
            state = self._advance(state, *inputs)
            return state, state

        return lax.scan(step, state, (self.inputs(x), reset))

    def _advance(self, hidden, gates, reset):
        hidden = jnp.where(reset[..., None, None], 0.0, hidden)
        reset_x, update_x, new_x = jnp.split(gates, 3, axis=-1)
        reset_h, update_h, new_h = jnp.split(self.hidden(hidden), 3, axis=-1)
        update = jax.nn.sigmoid(update_x + update_h)
        new = jnp.tanh(new_x + jax.nn.sigmoid(reset_x + reset_h) * (new_h + self.new_bias))
        return (1 - update) * new + update * hidden


def unroll_successors(
    recurrence: AbstractRecurrence,
    state: PyTree,
    x: Float[Array, "T *batch N E"],
    reset: Bool[Array, "T *batch"],
    successor: Float[Array, "T *batch N E"],
) -> Float[Array, "T *batch N E"]:
    """Read what followed every step, each from the state after it.

    No more than one such state exists at a time.

    Args:
        recurrence: of the policy.
        state: before the first step.
        x: what was read at step t.
        reset: whether an episode began at t.
        successor: what would be read next if the episode of t went on, whether it did or not.

    Returns:
        The outputs for `successor`.
    """
    if not jax.tree.leaves(state):
        return successor
    goes_on = jnp.zeros(reset.shape[1:], bool)

    def step(state, inputs):
        x, reset, successor = inputs
        state, _ = recurrence.step(state, x, reset)
        return state, recurrence.step(state, successor, goes_on)[1]

    return lax.scan(step, state, (x, reset, successor))[1]


@dataclass(frozen=True)
class MemoryKind:
    """A line of the list, and how the recurrence is built: `build(config, key=key)`."""

    description: str
    build: Callable[..., AbstractRecurrence]


MEMORIES = {
    "none": MemoryKind("an environment step knows nothing of those before it", NoMemory),
    "gru": MemoryKind("a gated recurrent unit", GRU),
}


def make_memory(config: NetworkConfig, *, key: Key[Array, ""]) -> AbstractRecurrence:
    """Build the recurrence that `config.memory` names; `NoMemory` if it names none.

    Args:
        config: of the network.
        key: of the weights.

    Raises:
        UserError: if there is no memory of this name.
    """
    name = config.memory or "none"
    if name not in MEMORIES:
        raise unknown_name("network.memory", name, MEMORIES, see="mam list")
    return MEMORIES[name].build(config, key=key)
