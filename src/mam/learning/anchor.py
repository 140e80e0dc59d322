"""Staying close to another policy: the one at the start of a run, or a teacher."""

from dataclasses import dataclass
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mam.learning.advantages import Advantages
from mam.learning.normalise import NormalisedPolicy
from mam.learning.objective import Batch, Losses, living_mean
from mam.learning.rollout import Rollout
from mam.learning.sharding import Shard
from mam.networks.actions import ActionDistribution
from mam.types import Evaluation, Policy


class OtherView(eqx.Module):
    """What the other policy makes of a rollout, [T, B, N, …]."""

    distribution: Float[Array, "*batch N Q"]
    value: Float[Array, "*batch N"] | None  # in the network's units, if it is to be learned


@dataclass(frozen=True)
class StayClose:
    """The divergence of a policy from another, along the same earlier agents' actions.

        E[KL(other ‖ policy)] + c_V · ½ E[(v − v_other)²]   over living agents

    Source: Rusu et al. 2015 (arXiv 1511.06295), eq. 3, for each agent given those before it.
    """

    name: str  # of the other, in what is reported
    other: NormalisedPolicy  # in the environment's units
    # [T, B, …], with observations in the environment's units, and the other's memory
    rollout: Rollout
    value_coef: float = 0.0  # c_V; with 0 the critic learns nothing

    @property
    def needs_values(self) -> bool:
        """Say that no returns are to be estimated."""
        return False

    def prepare(
        self, policy: NormalisedPolicy, rollout: Rollout, estimates: Advantages | None
    ) -> OtherView:
        """Return the other's distributions of the actions of a rollout, and its values.

        Args:
            policy: its normalisation puts values into the network's units.
            rollout: not read, for it is in the policy's units.
            estimates: not read.
        """
        steps = self.rollout.transitions
        memory = jax.tree.map(lambda x: x[0], self.rollout.memory)
        seen = (steps.observation, steps.action, steps.order, steps.reset)
        found = self.other.evaluate(memory, *seen)
        assert found.distribution is not None
        value = policy.normalise_value(found.value) if self.value_coef else None
        return jax.lax.stop_gradient(OtherView(found.distribution, value))

    def loss(
        self,
        policy: Policy,
        evaluation: Evaluation,
        batch: Batch,
        targets: OtherView,
        shard: Shard,
    ) -> Losses:
        """Return the divergence, as `start_kl` of one called start, and the value loss if any.

        Args:
            policy: not read.
            evaluation: of the policy.
            batch: says which agents were alive.
            targets: the other's view, for the same rows.
            shard: this device's share of the minibatch.
        """
        assert evaluation.distribution is not None
        seen = batch.observation
        distribution: ActionDistribution = cast(Any, self.other.network).distribution
        divergence = distribution.divergence(
            targets.distribution, evaluation.distribution, seen.action_mask
        )
        mean = living_mean(seen.alive, shard)
        loss = mean(divergence)
        means = {f"{self.name}_kl": loss}
        if targets.value is not None:
            value_loss = 0.5 * mean(jnp.square(evaluation.value - targets.value))
            means[f"{self.name}_value_loss"] = value_loss
            loss = loss + self.value_coef * value_loss
        return Losses(loss, means, {})
