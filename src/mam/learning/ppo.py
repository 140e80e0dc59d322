"""Proximal policy optimisation: the loss, on plain arrays, and the objective."""

from dataclasses import dataclass, fields

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mam.config import PPOConfig
from mam.errors import UserError
from mam.learning.advantages import Advantages
from mam.learning.normalise import NormalisedPolicy
from mam.learning.objective import Batch, Losses, living_mean
from mam.learning.rollout import Rollout
from mam.learning.sharding import WHOLE, Shard
from mam.types import Evaluation, Policy


class PPOLoss(eqx.Module):
    """The loss and what it is made of: scalars, means over living agents."""

    loss: Float[Array, ""]
    policy_loss: Float[Array, ""]
    value_loss: Float[Array, ""]
    entropy: Float[Array, ""]
    approx_kl: Float[Array, ""]  # mean of (r − 1) − log r, never negative
    clip_fraction: Float[Array, ""]  # of ratios outside [1 − ε, 1 + ε]
    # Largest |r − 1|; zero before the first gradient step on a rollout
    ratio_deviation: Float[Array, ""]


def ppo_loss(
    new: Evaluation,
    old_log_prob: Float[Array, "*batch N"],
    old_value: Float[Array, "*batch N"],
    advantage: Float[Array, "*batch N"],
    target: Float[Array, "*batch N"],
    alive: Bool[Array, "*batch N"],
    *,
    clip_eps: float,
    ent_coef: float,
    vf_coef: float,
    shard: Shard = WHOLE,
) -> PPOLoss:
    """Compute the clipped PPO loss, with one ratio per agent that was alive.

        −E[min(r Â, clip(r, 1 ± ε) Â)] − c_H H + c_V · ½ E[max((v − R)², (v_clip − R)²)]

    Advantages are normalised over the living agents of the minibatch first.

    Args:
        new: the current parameters' view of the stored actions.
        old_log_prob: log-probabilities at the time of acting.
        old_value: values at the time of acting; v_clip stays within ε of them.
        advantage: Â, not yet normalised.
        target: R, the value targets.
        alive: agents to learn from.
        clip_eps: ε.
        ent_coef: c_H.
        vf_coef: c_V.
        shard: where the minibatch lies on several devices, this one's share. What returns is then
            its share of every mean, and the largest deviation of its own agents.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7 and 9; per-agent ratios after MAT
    (arXiv 2205.14953), eq. 5.
    """
    mean = living_mean(alive, shard)
    # 1. Normalised advantages.
    centred = advantage - shard.sum(mean(advantage))
    advantage = centred / (jnp.sqrt(shard.sum(mean(jnp.square(centred)))) + 1e-8)
    # 2. The policy. A dead agent's log-probabilities mean nothing: its ratio is set to 1 before it
    # can overflow.
    log_ratio = jnp.where(alive, new.log_prob - old_log_prob, 0.0)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps)
    policy_loss = -mean(jnp.minimum(ratio * advantage, clipped * advantage))
    # 3. The value.
    value_clipped = old_value + jnp.clip(new.value - old_value, -clip_eps, clip_eps)
    error = jnp.maximum(jnp.square(new.value - target), jnp.square(value_clipped - target))
    value_loss = 0.5 * mean(error)
    # 4. Their sum, and diagnostics.
    entropy = mean(new.entropy)
    return PPOLoss(
        loss=policy_loss - ent_coef * entropy + vf_coef * value_loss,
        policy_loss=policy_loss,
        value_loss=value_loss,
        entropy=entropy,
        approx_kl=mean(ratio - 1 - log_ratio),
        clip_fraction=mean(jnp.abs(ratio - 1) > clip_eps),
        ratio_deviation=jnp.max(jnp.abs(ratio - 1)),
    )


class PPOTargets(eqx.Module):
    """Values as of acting, and targets, in the network's units, [T, B, N]."""

    log_prob: Float[Array, "*batch N"]
    value: Float[Array, "*batch N"]
    advantage: Float[Array, "*batch N"]
    target: Float[Array, "*batch N"]


@dataclass(frozen=True)
class PPO:
    """Clipped PPO on the policy's own actions; see `ppo_loss`."""

    config: PPOConfig
    needs_values: bool = True

    def prepare(
        self, policy: NormalisedPolicy, rollout: Rollout, estimates: Advantages | None
    ) -> PPOTargets:
        """Return what the current parameters are compared with.

        Args:
            policy: as it acted; evaluates its own actions anew with `recompute_log_prob`, and puts
                values into the network's units.
            rollout: [T, B, …], with the log-probabilities and values of acting.
            estimates: advantages, which stay in units of reward until the loss normalises them, and
                value targets.

        Raises:
            UserError: for recorded actions, of whose probability nothing is known.
        """
        steps = rollout.transitions
        if steps.log_prob is None or steps.value is None or estimates is None:
            raise UserError(
                "PPO learns from its own actions: recorded ones have no log-probability"
            )
        log_prob = steps.log_prob
        if self.config.recompute_log_prob:
            memory = jax.tree.map(lambda x: x[0], rollout.memory)
            seen = (steps.observation, steps.action, steps.order, steps.reset)
            log_prob = policy.network.evaluate(memory, *seen).log_prob
        return PPOTargets(
            log_prob=log_prob,
            value=policy.normalise_value(steps.value),
            advantage=estimates.advantage,
            target=policy.normalise_value(estimates.target),
        )

    def loss(
        self,
        policy: Policy,
        evaluation: Evaluation,
        batch: Batch,
        targets: PPOTargets,
        shard: Shard,
    ) -> Losses:
        """Return `ppo_loss` of a minibatch.

        Args:
            policy: not read.
            evaluation: log π, entropy and v of the stored actions, [L, M, N].
            batch: says which agents were alive.
            targets: as of acting, for the same rows.
            shard: this device's share of the minibatch.

        Returns:
            The loss; its parts as means, and `ratio_deviation` as a maximum.
        """
        losses = ppo_loss(
            evaluation,
            targets.log_prob,
            targets.value,
            targets.advantage,
            targets.target,
            batch.observation.alive,
            clip_eps=self.config.clip_eps,
            ent_coef=self.config.ent_coef,
            vf_coef=self.config.vf_coef,
            shard=shard,
        )
        named = {field.name: getattr(losses, field.name) for field in fields(losses)}
        loss, deviation = named.pop("loss"), named.pop("ratio_deviation")
        return Losses(loss, named, {"ratio_deviation": deviation})
