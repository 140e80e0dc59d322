"""Behaviour cloning: recorded actions, learned as if they were the policy's own."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from mam.learning.advantages import Advantages
from mam.learning.normalise import NormalisedPolicy
from mam.learning.objective import Batch, Losses, living_mean
from mam.learning.rollout import Rollout
from mam.learning.sharding import Shard
from mam.types import Evaluation, Policy


@dataclass(frozen=True)
class BehaviourCloning:
    """Behaviour cloning of joint actions, with teacher forcing.

        −E[log π(a | o)] + c_V · ½ E[(v − R)²]   over living agents

    R are λ-returns of the recorded rewards, bootstrapped from the critic itself.

    Source: Pomerleau 1991 (behaviour cloning); the autoregressive joint policy as in MAT
    (arXiv 2205.14953), eq. 5.
    """

    value_coef: float = 0.0  # c_V; with 0 the critic learns nothing, and rewards are not read

    @property
    def needs_values(self) -> bool:
        """Say whether there are returns to predict."""
        return self.value_coef > 0

    def prepare(
        self, policy: NormalisedPolicy, rollout: Rollout, estimates: Advantages | None
    ) -> Float[Array, "T B N"] | None:
        """Return R, the value targets, if the critic is to predict them.

        Args:
            policy: its normalisation puts R into the network's units.
            rollout: not read: actions are cloned as they were recorded.
            estimates: R in units of reward, [T, B, N]; None if `value_coef` is 0.
        """
        return None if estimates is None else policy.normalise_value(estimates.target)

    def loss(
        self,
        policy: Policy,
        evaluation: Evaluation,
        batch: Batch,
        targets: Float[Array, "L M N"] | None,
        shard: Shard,
    ) -> Losses:
        """Return −log π of the recorded actions, and the value loss if there is one.

        Args:
            policy: not read.
            evaluation: log π and v of M sequences of L steps, [L, M, N].
            batch: says which agents were alive; nothing is learned from the dead.
            targets: R for the same rows, as `prepare` returned it.
            shard: this device's share of the minibatch.

        Returns:
            The loss, and `cloning_loss` and `cloning_value_loss` as means.
        """
        mean = living_mean(batch.observation.alive, shard)
        loss = -mean(evaluation.log_prob)
        means = {"cloning_loss": loss}
        if self.needs_values and targets is not None:
            means["cloning_value_loss"] = 0.5 * mean(jnp.square(evaluation.value - targets))
            loss = loss + self.value_coef * means["cloning_value_loss"]
        return Losses(loss, means, {})
