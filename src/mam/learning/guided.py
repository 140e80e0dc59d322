"""A policy that learns from another one: both watch every step, and either acts."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mam.learning.rollout import Rollout
from mam.networks.order import decision_order
from mam.types import (
    Action,
    Evaluation,
    FollowingPolicy,
    Greedy,
    Keys,
    Memory,
    Observation,
    Order,
    PolicyOutput,
    Reset,
)


class GuidedMemory(eqx.Module):
    """The memories of both, of what was done, by whichever of them."""

    student: Memory
    teacher: Memory


class Guided(eqx.Module):
    """A student that acts, and a teacher that acts in its place at a share of the steps.

    Source: Ross et al. 2011 (arXiv 1011.0686), alg. 3.1 (DAgger), whose β is `share`. Difference:
    what was seen before the last update is forgotten.
    """

    student: FollowingPolicy
    teacher: FollowingPolicy
    share: Float[Array, "*seeds"] | None  # of the steps; None: the student always acts

    def init_memory(self, batch: tuple[int, ...] = ()) -> GuidedMemory:
        """Return the memories before an episode, for leading axes `batch`."""
        return GuidedMemory(self.student.init_memory(batch), self.teacher.init_memory(batch))

    def act(
        self,
        memory: GuidedMemory,
        obs: Observation,
        reset: Reset,
        key: Keys,
        *,
        greedy: Greedy = False,
    ) -> tuple[GuidedMemory, PolicyOutput]:
        """Choose one joint action per environment.

        Args:
            memory: of both, after step t − 1.
            obs: what is seen at step t, [B, …].
            reset: whether t is the first step of an episode.
            key: one per environment; decides who acts, too.
            greedy: take the most likely actions.

        Returns:
            The memories after step t; the action, and the student's value. The log-probability is
            of what the student would have done.
        """
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(key)
        after, output = self.student.act(memory.student, obs, reset, keys[:, 0], greedy=greedy)
        place = jnp.argsort(output.order, axis=-1)  # independent agents' is that of the dead, too
        output = replace(output, order=decision_order(obs.alive, place))
        if self.share is not None:
            taught = jax.vmap(jax.random.uniform)(keys[:, 1]) < self.share
            _, other = self.teacher.act(memory.teacher, obs, reset, keys[:, 2], greedy=greedy)
            taught = taught.reshape(-1, *[1] * (output.action.ndim - 1))
            output = replace(output, action=jnp.where(taught, other.action, output.action))
        done = (obs, output.action, output.order, reset)
        if self.share is not None:
            after = self.student.follow(memory.student, *done)
        return GuidedMemory(after, self.teacher.follow(memory.teacher, *done)), output

    def evaluate(
        self, memory: GuidedMemory, obs: Observation, action: Action, order: Order, reset: Reset
    ) -> Evaluation:
        """Evaluate stored joint actions as the student does; see `mam.types.Policy`."""
        return self.student.evaluate(memory.student, obs, action, order, reset)

    def successor_values(
        self,
        memory: GuidedMemory,
        obs: Observation,
        action: Action,
        reset: Reset,
        successor: Observation,
    ) -> Float[Array, "*batch N"]:
        """Return the student's values of what followed every step; see `mam.types.Policy`."""
        return self.student.successor_values(memory.student, obs, action, reset, successor)


def seen_by(rollout: Rollout) -> tuple[Rollout, Rollout]:
    """Return a guided policy's rollout as the student and as the teacher remember it."""
    memory: GuidedMemory = rollout.memory
    return replace(rollout, memory=memory.student), replace(rollout, memory=memory.teacher)
