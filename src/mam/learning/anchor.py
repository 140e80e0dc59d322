"""Staying close to another policy: the one at the start of a run, or a teacher."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mam.learning.advantages import Advantages
from mam.learning.normalise import NormalisedPolicy
from mam.learning.objective import Batch, Losses, living_mean
from mam.learning.rollout import Rollout
from mam.learning.sharding import Shard
from mam.networks.actions import ActionDistribution
from mam.types import Evaluation


@dataclass(frozen=True)
class StayClose:
    """The divergence of a policy from another, along the same earlier agents' actions.

        E[KL(other ‖ policy)]  over living agents

    Source: Rusu et al. 2015 (arXiv 1511.06295), eq. 3, for each agent given those before it.
    """

    other: NormalisedPolicy  # in the environment's units
    distribution: ActionDistribution  # of an agent's actions
    rollout: Rollout  # [T, B, …], with observations in the environment's units

    @property
    def needs_values(self) -> bool:
        """Say that there are none."""
        return False

    def prepare(
        self, policy: NormalisedPolicy, rollout: Rollout, estimates: Advantages | None
    ) -> Float[Array, "T B N Q"]:
        """Return the other's distributions of the actions of a rollout.

        Args:
            policy: not read.
            rollout: not read, for it is in the policy's units. With memory, the other goes on from
                what the policy remembered before the first step.
            estimates: not read.
        """
        steps = self.rollout.transitions
        memory = jax.tree.map(lambda x: x[0], self.rollout.memory)
        seen = (steps.observation, steps.action, steps.order, steps.reset)
        found = self.other.evaluate(memory, *seen).distribution
        assert found is not None
        return jax.lax.stop_gradient(found)

    def loss(
        self, evaluation: Evaluation, batch: Batch, targets: Float[Array, "L M N Q"], shard: Shard
    ) -> Losses:
        """Return the divergence, `start_kl`.

        Args:
            evaluation: of the policy.
            batch: says which agents were alive.
            targets: the other's distributions, for the same rows.
            shard: this device's share of the minibatch.
        """
        assert evaluation.distribution is not None
        seen = batch.observation
        divergence = self.distribution.divergence(
            targets, evaluation.distribution, seen.action_mask
        )
        loss = living_mean(seen.alive, shard)(jnp.where(seen.alive, divergence, 0.0))
        return Losses(loss, {"start_kl": loss}, {})
