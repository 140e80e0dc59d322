"""What is learned from a rollout, as a value: PPO, behaviour cloning, or several such."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from mam.learning.advantages import Advantages
from mam.learning.normalise import NormalisedPolicy
from mam.learning.rollout import Rollout
from mam.learning.sharding import WHOLE, Shard
from mam.networks.clock import at_step, count_steps, counts_of
from mam.types import Action, Evaluation, Memory, Observation, Policy


class Batch(eqx.Module):
    """The part of a rollout that gradient steps read, in the network's units.

    Arrays are [L, M, …]: M sequences of L steps, of which a minibatch draws some. Memory is that
    before the first step of each, [1, M, …].
    """

    observation: Observation
    reset: Bool[Array, "L M"]
    memory: Memory
    action: Action
    order: Int[Array, "L M N"]
    targets: PyTree[Shaped[Array, "L M ..."]]  # what the objective made of the rest

    @property
    def num_sequences(self) -> int:
        """The number of sequences, M."""
        return self.reset.shape[1]


class Losses(eqx.Module):
    """A loss and what is reported beside it; of several devices this one's share."""

    loss: Float[Array, ""]
    means: dict[str, Float[Array, ""]]
    maxima: dict[str, Float[Array, ""]]


@runtime_checkable
class Objective(Protocol):
    """A loss on the actions of a rollout, and what it needs to know of them."""

    @property
    def needs_values(self) -> bool:
        """Say whether returns are to be estimated, and their normalisation kept up."""
        ...

    def prepare(
        self, policy: NormalisedPolicy, rollout: Rollout, estimates: Advantages | None
    ) -> PyTree[Shaped[Array, "T B ..."]]:
        """Return what the loss reads besides the policy's view of the actions.

        It is in the network's units.

        Args:
            policy: as it acted, with the normalisation that is learned in.
            rollout: [T, B, …], with observations in the network's units and values in those of
                reward.
            estimates: advantages and value targets in units of reward, if they are needed.
        """
        ...

    def loss(
        self, policy: Policy, evaluation: Evaluation, batch: Batch, targets: PyTree, shard: Shard
    ) -> Losses:
        """Return the loss of a minibatch.

        Args:
            policy: the network, with the current parameters.
            evaluation: its view of the minibatch's actions.
            batch: the minibatch.
            targets: what `prepare` returned, for these rows.
            shard: where the minibatch lies on several devices, this one's share.
        """
        ...


class _Several(ABC):
    """What objectives on the same rollouts have in common."""

    @property
    @abstractmethod
    def objectives(self) -> Sequence[Objective]:
        """Return the terms, without weights."""
        ...

    @property
    def needs_values(self) -> bool:
        """Say whether a term needs values."""
        return any(objective.needs_values for objective in self.objectives)

    def prepare(
        self, policy: NormalisedPolicy, rollout: Rollout, estimates: Advantages | None
    ) -> list[PyTree]:
        """Return what each term reads, in the order of the terms.

        Args:
            policy: as it acted.
            rollout: [T, B, …], the same for all terms.
            estimates: in units of reward; there, for all terms, as soon as one needs them.

        Raises:
            UserError: as the terms do.
        """
        return [term.prepare(policy, rollout, estimates) for term in self.objectives]


@dataclass(frozen=True)
class WeightedSum(_Several):
    """Several objectives at once, on the same rollouts."""

    terms: tuple[tuple[float | Float[Array, ""], Objective], ...]

    @property
    def objectives(self) -> Sequence[Objective]:
        """Return them without their weights."""
        return [objective for _, objective in self.terms]

    def loss(
        self,
        policy: Policy,
        evaluation: Evaluation,
        batch: Batch,
        targets: Sequence[PyTree],
        shard: Shard,
    ) -> Losses:
        """Return Σ weight · loss, and what each term reports under its own names.

        Args:
            policy: the network.
            evaluation: computed once for all terms.
            batch: the minibatch.
            targets: one entry per term, as `prepare` returned them.
            shard: this device's share of the minibatch.
        """
        found = [
            (weight, objective.loss(policy, evaluation, batch, own, shard))
            for (weight, objective), own in zip(self.terms, targets, strict=True)
        ]
        total = sum((weight * losses.loss for weight, losses in found), jnp.zeros(()))
        means = {name: x for _, losses in found for name, x in losses.means.items()}
        return Losses(
            total, means, {name: x for _, losses in found for name, x in losses.maxima.items()}
        )


@dataclass(frozen=True)
class InTurn(_Several):
    """One of several objectives at a time: of the others no loss is computed.

    They report infinity, which stands for no number.
    """

    terms: tuple[Objective, ...]
    index: Int[Array, ""]  # of the one that counts, the same for all seeds

    @property
    def objectives(self) -> Sequence[Objective]:
        """Return the terms."""
        return self.terms

    def loss(
        self,
        policy: Policy,
        evaluation: Evaluation,
        batch: Batch,
        targets: Sequence[PyTree],
        shard: Shard,
    ) -> Losses:
        """Return the loss of the term that counts, and what it reports.

        Args:
            policy: the network.
            evaluation: for whichever term reads it.
            batch: the minibatch.
            targets: one entry per term, as `prepare` returned them.
            shard: this device's share of the minibatch.
        """
        losses = [
            partial(objective.loss, policy, evaluation, batch, own, shard)
            for objective, own in zip(self.terms, targets, strict=True)
        ]
        blank = [
            jax.tree.map(lambda x: jnp.full(x.shape, jnp.inf, x.dtype), jax.eval_shape(loss))
            for loss in losses
        ]
        means = {name: x for one in blank for name, x in one.means.items()}
        maxima = {name: x for one in blank for name, x in one.maxima.items()}

        def alone(loss: Callable[[], Losses]) -> Losses:
            own = loss()
            return Losses(own.loss.astype(jnp.float32), means | own.means, maxima | own.maxima)

        return lax.switch(self.index, [partial(alone, loss) for loss in losses])


@jax.custom_batching.custom_vmap
def same_for_all(x: Int[Array, ""]) -> Int[Array, ""]:
    """Return x, which whatever is vectorised over (seeds) has in common: a switch stays one."""
    return x


@same_for_all.def_vmap
def _first_of_all(axis_size: int, in_batched: list[bool], x: Array) -> tuple[Array, bool]:
    return (x[0] if in_batched[0] else x), False


class OtherRows(eqx.Module):
    """What a policy is to be evaluated on, [T, B, …], and what the objective made of the rest."""

    observation: Observation  # in the network's units
    action: Action
    order: Int[Array, "*batch N"]
    reset: Bool[Array, "*batch"]
    num_steps: Float[Array, "*batch"] | None  # of the episode before; None if memory does not count
    targets: PyTree[Shaped[Array, "..."]]


@dataclass(frozen=True)
class OnOther:
    """An objective on a rollout of its own, beside terms that read the policy's.

    It has as many steps, in windows at whose start memory knows no more than how many there were.
    """

    objective: Objective  # one that needs no values
    rollout: Rollout  # [L, M, …], with observations in the environment's units

    @property
    def needs_values(self) -> bool:
        """Say that no returns are to be estimated."""
        return False

    def prepare(
        self, policy: NormalisedPolicy, rollout: Rollout, estimates: Advantages | None
    ) -> OtherRows:
        """Return the steps of the other rollout in the places of the policy's, [T, B, …].

        Args:
            policy: its normalisation puts observations into the network's units.
            rollout: the policy's; says no more than how many steps there are.
            estimates: not read, for they are of the policy's rollout.
        """
        steps = self.rollout.transitions
        observation = policy.statistics.normalise(steps.observation)
        scaled = replace(self.rollout, transitions=replace(steps, observation=observation))
        targets = self.objective.prepare(policy, scaled, None)
        length, (_, num_envs) = steps.reset.shape[0], rollout.transitions.reset.shape

        def placed(x: Array) -> Array:
            x = jnp.swapaxes(x.reshape(length, -1, num_envs, *x.shape[2:]), 0, 1)
            return x.reshape(-1, *x.shape[2:])

        counts = counts_of(self.rollout.memory)
        before = count_steps(counts[0][0], steps.reset) if counts else None
        rows = OtherRows(observation, steps.action, steps.order, steps.reset, before, targets)
        return jax.tree.map(placed, rows)

    def loss(
        self, policy: Policy, evaluation: Evaluation, batch: Batch, targets: OtherRows, shard: Shard
    ) -> Losses:
        """Return the objective's loss on the other rollout.

        Args:
            policy: the network, which is evaluated once more.
            evaluation: not read, for it is of the policy's own rollout.
            batch: the same.
            targets: the other rollout's steps, for as many rows.
            shard: this device's share of the minibatch.
        """
        seen = (targets.observation, targets.action, targets.order, targets.reset)
        memory = policy.init_memory(targets.reset.shape[1:])
        if targets.num_steps is not None:
            memory = at_step(memory, targets.num_steps[0])
        rows = Batch(targets.observation, targets.reset, (), targets.action, targets.order, ())
        own = policy.evaluate(memory, *seen)
        return self.objective.loss(policy, own, rows, targets.targets, shard)


def living_mean(
    alive: Bool[Array, "*batch N"], shard: Shard = WHOLE
) -> Callable[[Shaped[Array, "*batch N"]], Float[Array, ""]]:
    """Return the mean over the living agents of a minibatch, as a function.

    Args:
        alive: which agents count; what is in the others' rows, NaN included, is not read.
        shard: where the minibatch lies on several devices, this one's share. A mean is then this
            device's share of it.
    """
    count = jnp.maximum(shard.sum(alive.sum()), 1)
    return lambda x: jnp.sum(jnp.where(alive, x, 0.0)) / count


def make_batch(rollout: Rollout, targets: PyTree, shard: Shard = WHOLE) -> Batch:
    """Cut a rollout into sequences, and gather it where it lies on several devices.

    A policy with memory learns from T / L · B sequences of L steps, one without from each step on
    its own.

    Args:
        rollout: [T, B, …], with observations in the network's units.
        targets: what the objective made of it, [T, B, N].
        shard: where the rollout lies on several devices, this one's share.
    """
    transitions = rollout.transitions
    batch = Batch(
        observation=transitions.observation,
        reset=transitions.reset,
        memory=(),
        action=transitions.action,
        order=transitions.order,
        targets=targets,
    )
    batch, memory = shard.gather((batch, rollout.memory), axis=1)
    kept = jax.tree.leaves(memory)
    length = batch.reset.shape[0] // kept[0].shape[0] if kept else 1

    def cut(x: Array) -> Array:
        x = jnp.swapaxes(x.reshape(-1, length, *x.shape[1:]), 0, 1)
        return x.reshape(length, -1, *x.shape[3:])

    memory = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), memory)
    return replace(jax.tree.map(cut, batch), memory=memory)
