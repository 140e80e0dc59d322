"""Memory: a recurrence along environment steps, for each agent by itself; a stage of every policy.

It stands between the embedding of what an agent sees and everything that mixes agents, so it
belongs to the agent and never to its place in the order of deciding.
"""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from mam.config import NetworkConfig
from mam.types import Action

Actions = Int[Array, "..."] | Float[Array, "T *batch N A"]  # of T steps


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

    def note(self, state: PyTree, action: Action) -> PyTree:
        """Return the state after a step, once it is known what the agents did at it.

        Args:
            state: after the step, as `step` returned it.
            action: the joint action at it; a memory that reads no actions stays as it is.
        """
        del action
        return state

    @abstractmethod
    def unroll(
        self,
        state: PyTree,
        x: Float[Array, "T *batch N E"],
        reset: Bool[Array, "T *batch"],
        action: Actions,
    ) -> tuple[PyTree, Float[Array, "T *batch N E"]]:
        """Return the state after T steps, and the outputs of all of them.

        Args:
            state: before the first step, without the time axis.
            x: the agents' rows at step t.
            reset: whether step t is the first of its episode.
            action: what the agents did at step t, for memories that read it later.
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
        self,
        state: PyTree,
        x: Float[Array, "*batch N E"],
        reset: Bool[Array, "*batch"],
        action: Action,
    ) -> tuple[PyTree, Float[Array, "*batch N E"]]:
        return state, x


def unroll_successors(
    recurrence: AbstractRecurrence,
    state: PyTree,
    x: Float[Array, "T *batch N E"],
    reset: Bool[Array, "T *batch"],
    action: Actions,
    successor: Float[Array, "T *batch N E"],
) -> Float[Array, "T *batch N E"]:
    """Read what followed every step, each from the state after it.

    No more than one such state exists at a time.

    Args:
        recurrence: of the policy.
        state: before the first step.
        x: what was read at step t.
        reset: whether an episode began at t.
        action: what the agents did at t.
        successor: what would be read next if the episode of t went on, whether it did or not.

    Returns:
        The outputs for `successor`.
    """
    if not jax.tree.leaves(state):
        return successor
    goes_on = jnp.zeros(reset.shape[1:], bool)

    def step(state, inputs):
        x, reset, action, successor = inputs
        state = recurrence.note(recurrence.step(state, x, reset)[0], action)
        return state, recurrence.step(state, successor, goes_on)[1]

    return lax.scan(step, state, (x, reset, action, successor))[1]
