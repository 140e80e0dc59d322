"""Mixers that come to mix as a teacher's do, on what the teacher's read: MOHAWK's first stages."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mam.errors import UserError
from mam.learning.advantages import Advantages
from mam.learning.normalise import NormalisedPolicy
from mam.learning.objective import Batch, Losses, living_mean
from mam.learning.rollout import Rollout
from mam.learning.sharding import Shard
from mam.networks.inside import Activations, activations, block_outputs, mixing_matrices
from mam.networks.sequence import SequencePolicy
from mam.types import Evaluation, Policy


def matrices(policy: SequencePolicy, read: Activations) -> tuple[Float[Array, "..."], ...]:
    """Return the rows of all mixers' matrices, [*batch, N, H, N]."""
    return tuple(jnp.swapaxes(x, -2, -3) for x in mixing_matrices(policy, read).values())


def hidden_states(policy: SequencePolicy, read: Activations) -> tuple[Float[Array, "..."], ...]:
    """Return what all blocks put out, as one head: [*batch, N, 1, E]."""
    return tuple(x[..., None, :] for x in block_outputs(policy, read))


class AlignmentTargets(eqx.Module):
    """What the teacher's blocks read, and what they make of it, [T, B, …]."""

    read: Activations
    made: tuple[Float[Array, "..."], ...]


@dataclass(frozen=True)
class Alignment:
    """The distance between what a student's blocks and a teacher's make of the same inputs.

        E[Σ_f (made_S − made_T)²]   averaged over blocks or mixers, and heads

    Source: Bick et al. 2024 (arXiv 2408.10189), §4.1 (`matrices`) and §4.2 (`hidden_states`).
    Difference: outputs are those of whole blocks, whose norms and MLP start as the teacher's.
    """

    name: str  # of the distance, in what is reported
    made: Callable[[SequencePolicy, Activations], tuple[Float[Array, "..."], ...]]
    teacher: NormalisedPolicy  # in the environment's units
    # [T, B, …], with observations in the environment's units, and the teacher's memory
    rollout: Rollout

    @property
    def needs_values(self) -> bool:
        """Say that there are none."""
        return False

    def prepare(
        self, policy: NormalisedPolicy, rollout: Rollout, estimates: Advantages | None
    ) -> AlignmentTargets:
        """Return what the teacher's blocks read and made.

        Args:
            policy: not read.
            rollout: not read, for it is in the policy's units.
            estimates: not read.

        Raises:
            UserError: if the teacher has no blocks, or they remember earlier steps.
        """
        steps = self.rollout.transitions
        memory = jax.tree.map(lambda x: x[0], self.rollout.memory)
        seen = self.teacher.statistics.normalise(steps.observation)
        network = self.teacher.network
        read = activations(network, memory, seen, steps.action, steps.order, steps.reset)
        targets = AlignmentTargets(read, self.made(cast(SequencePolicy, network), read))
        return jax.lax.stop_gradient(targets)

    def loss(
        self,
        policy: Policy,
        evaluation: Evaluation,
        batch: Batch,
        targets: AlignmentTargets,
        shard: Shard,
    ) -> Losses:
        """Return the distance.

        Args:
            policy: the student's network.
            evaluation: not read.
            batch: not read.
            targets: for the rows of the minibatch.
            shard: this device's share of it.

        Raises:
            UserError: if heads cannot be put beside each other.
        """
        mean = living_mean(targets.read.alive, shard)
        made = self.made(cast(SequencePolicy, policy), targets.read)
        pairs = zip(made, targets.made, strict=True)
        distances = [mean(_distance(one, other)) for one, other in pairs]
        loss = jnp.stack(distances).mean()
        return Losses(loss, {self.name: loss}, {})


def _distance(one: Array, other: Array) -> Float[Array, "*batch N"]:
    """Return the squared distance of agents' rows [*batch, N, H, F], the mean over heads.

    Where one has more heads, several of them are beside one of the other.
    """
    heads = (one.shape[-2], other.shape[-2])
    if max(heads) % min(heads):
        raise UserError(
            f"the student's mixers have {heads[0]} heads and the teacher's {heads[1]}: "
            "one number must be a multiple of the other"
        )
    one, other = (jnp.repeat(x, max(heads) // x.shape[-2], axis=-2) for x in (one, other))
    return jnp.sum(jnp.square(one - other), axis=-1).mean(axis=-1)
