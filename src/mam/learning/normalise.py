"""Observations and values in units of their running statistics: a policy around a policy.

The network inside sees features of mean 0 and deviation 1 and predicts (v − μ) / σ. Outside nothing
of this shows: observations go in as the environment gives them, values come out in units of reward.
Statistics change between rollouts only, so acting and evaluating agree within one.
"""

from dataclasses import fields, replace
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Shaped

from mam.config import NetworkConfig
from mam.learning.sharding import WHOLE, Shard
from mam.networks.policy import transfer_weights
from mam.types import (
    Action,
    Array,
    EnvSpec,
    Evaluation,
    ExportablePolicy,
    FollowingPolicy,
    Greedy,
    Keys,
    Memory,
    Observation,
    Order,
    Policy,
    PolicyOutput,
    Reset,
)

MAX_DEVIATIONS = 10.0  # where normalised features are clipped
OBSERVATION_HORIZON = 1000  # rollouts, after which older observations begin to fade
VALUE_HORIZON = 10  # the same of value targets, which change with the policy
FEATURE_FLOOR = 1e-8  # variances below are taken for this
# Small values stay as they are: scaled up, rare rewards would outweigh all else in the gradient
VALUE_FLOOR = 1.0


class Moments(eqx.Module):
    """Running mean and variance of features; one leading axis where there are several seeds."""

    count: Float[Array, "*seeds"]  # samples; 0: nothing was seen yet
    mean: Float[Array, "*seeds_features"]
    var: Float[Array, "*seeds_features"]
    floor: float = eqx.field(static=True)

    @classmethod
    def init(cls, *features: int, floor: float = FEATURE_FLOOR) -> "Moments":
        """Return mean 0 and variance 1, with which normalising changes nothing."""
        return cls(
            count=jnp.zeros(()), mean=jnp.zeros(features), var=jnp.ones(features), floor=floor
        )

    @property
    def deviation(self) -> Float[Array, "*features"]:
        """σ, the square root of the variance or of its floor."""
        return jnp.sqrt(jnp.maximum(self.var, self.floor))

    def normalise(self, x: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """Return (x − μ) / σ, for [*batch, *features]."""
        return (x - self.mean) / self.deviation

    def restore(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return x σ + μ, the inverse of `normalise`."""
        return x * self.deviation + self.mean

    def update(
        self,
        x: Shaped[Array, "..."],
        mask: Bool[Array, "*batch"],
        *,
        horizon: int,
        shard: Shard = WHOLE,
    ) -> "Moments":
        """Return the moments of all samples so far and those of a batch.

        Args:
            x: samples [*batch, *features]; those that are masked may be anything, NaN included.
            mask: which samples count.
            horizon: batches after which the oldest samples fade, each batch then weighing
                1 / horizon.
            shard: where the batch lies on several devices, this one's share of it; the result is
                the same on all.

        Source: Chan, Golub & LeVeque 1983, eq. 2.1 (moments of two samples merged). Everything is
        measured from the old mean, so that float32 suffices for features far from zero.
        """
        axes, counts = (
            tuple(range(mask.ndim)),
            mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim)),
        )
        size = shard.sum(mask.sum().astype(self.count.dtype))
        x = jnp.where(counts, x - self.mean, 0.0)
        shift = shard.sum(x.sum(axes)) / jnp.maximum(size, 1)
        var = shard.sum(jnp.square(jnp.where(counts, x - shift, 0.0)).sum(axes)) / jnp.maximum(
            size, 1
        )
        before = jnp.minimum(self.count, (horizon - 1) * mask.size * shard.num_shards)
        weight = size / jnp.maximum(before + size, 1)
        return Moments(
            count=before + size,
            mean=self.mean + weight * shift,
            var=(1 - weight) * self.var + weight * (var + (1 - weight) * jnp.square(shift)),
            floor=self.floor,
        )


class Statistics(eqx.Module):
    """Of what a network sees and predicts. What is None is left as it is; so are ids and images."""

    features: Moments | None = None  # of agents_view without ids, [O − ids], over living agents
    state: Moments | None = None  # of the global state, [G]
    values: Moments | None = None  # of value targets, [], over living agents; σ is at least 1

    @classmethod
    def init(cls, spec: EnvSpec, *, observations: bool, values: bool) -> "Statistics":
        """Return the statistics before any sample.

        Args:
            spec: sizes of the task.
            observations: whether features and the global state are normalised.
            values: whether values are.
        """
        num_features = spec.obs_dim - spec.id_dim
        return cls(
            features=Moments.init(num_features) if observations and num_features else None,
            state=Moments.init(spec.state_dim)
            if observations and spec.state_dim is not None
            else None,
            values=Moments.init(floor=VALUE_FLOOR) if values else None,
        )

    def taken_from(self, other: "Statistics") -> "Statistics":
        """Return another's statistics, of what both have any of.

        Where the other has none of values, these are learned as they are: then it is known that
        mean 0 and variance 1 are their units, and `update_values` will keep them.
        """
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        taken = Statistics(*(own if own is None or its is None else its for own, its in pairs))
        if taken.values is None or other.values is not None:
            return taken
        return replace(taken, values=replace(taken.values, count=jnp.ones_like(taken.values.count)))

    def normalise(self, obs: Observation) -> Observation:
        """Return the observation in the network's units."""
        view, state = obs.agents_view, obs.state
        if self.features is not None:
            ids, own = jnp.split(view, [view.shape[-1] - self.features.mean.shape[-1]], axis=-1)
            view = jnp.concatenate([ids, _clip(self.features.normalise(own))], axis=-1)
        if self.state is not None and state is not None:
            state = _clip(self.state.normalise(state))
        return replace(obs, agents_view=view, state=state)

    def update(self, obs: Observation, shard: Shard = WHOLE) -> "Statistics":
        """Return the statistics that include the observations of a rollout.

        Args:
            obs: [T, B, …].
            shard: where the rollout lies on several devices, this one's share.
        """
        features, state, how = (
            self.features,
            self.state,
            {"horizon": OBSERVATION_HORIZON, "shard": shard},
        )
        if features is not None:
            own = obs.agents_view[..., obs.agents_view.shape[-1] - features.mean.shape[-1] :]
            features = features.update(own, obs.alive, **how)
        if state is not None and obs.state is not None:
            state = state.update(obs.state, jnp.ones(obs.state.shape[:-1], bool), **how)
        return replace(self, features=features, state=state)


class NormalisedPolicy(eqx.Module):
    """A policy in the environment's units around a network in normalised ones."""

    network: Policy
    statistics: Statistics

    def init_memory(self, batch: tuple[int, ...] = ()) -> Memory:
        """Return the network's memory."""
        return self.network.init_memory(batch)

    def act(
        self, memory: Memory, obs: Observation, reset: Reset, key: Keys, *, greedy: Greedy = False
    ) -> tuple[Memory, PolicyOutput]:
        """Choose one joint action per batch element.

        Args:
            memory: the network's, after step t − 1.
            obs: in the environment's units, at step t.
            reset: whether t is the first step of an episode.
            key: decides what is sampled.
            greedy: take the most likely action instead of a sample.

        Returns:
            The network's memory after step t, and its output with values in units of reward.
        """
        memory, output = self.network.act(
            memory, self.statistics.normalise(obs), reset, key, greedy=greedy
        )
        return memory, replace(output, value=self.restore_value(output.value))

    def act_on_noise(
        self, memory: Memory, obs: Observation, reset: Reset, noise: Float[Array, "*batch N Z"]
    ) -> tuple[Memory, PolicyOutput]:
        """Choose the joint action that noise leads to; see `act`.

        Args:
            memory: the network's, after step t − 1.
            obs: in the environment's units, at step t.
            reset: whether t is the first step of an episode.
            noise: of every agent; zeros lead to the most likely action.
        """
        memory, output = cast(ExportablePolicy, self.network).act_on_noise(
            memory, self.statistics.normalise(obs), reset, noise
        )
        return memory, replace(output, value=self.restore_value(output.value))

    def evaluate(
        self, memory: Memory, obs: Observation, action: Action, order: Order, reset: Reset
    ) -> Evaluation:
        """Evaluate stored joint actions.

        Args:
            memory: the network's, before the first step.
            obs: in the environment's units, time first.
            action: as `act` returned it: actions have no other units.
            order: in which the agents decided.
            reset: whether a step was the first of its episode.

        Returns:
            Log-probability and entropy in nats, values in units of reward, [*batch, N].
        """
        evaluation = self.network.evaluate(
            memory, self.statistics.normalise(obs), action, order, reset
        )
        return replace(evaluation, value=self.restore_value(evaluation.value))

    def follow(
        self, memory: Memory, obs: Observation, action: Action, order: Order, reset: Reset
    ) -> Memory:
        """Return the network's memory after a step at which another acted.

        Args:
            memory: the network's, after step t − 1.
            obs: in the environment's units, at step t.
            action: the joint action at t.
            order: in which the agents decided.
            reset: whether t is the first step of an episode.
        """
        obs = self.statistics.normalise(obs)
        return cast(FollowingPolicy, self.network).follow(memory, obs, action, order, reset)

    def successor_values(
        self, memory: Memory, obs: Observation, action: Action, reset: Reset, successor: Observation
    ) -> Float[Array, "*batch N"]:
        """Return the values of every step's successor, in units of reward.

        Args:
            memory: the network's, before the first step.
            obs: in the environment's units, time first.
            action: the joint action at each step.
            reset: whether a step was the first of its episode.
            successor: what each action led to, in the environment's units.
        """
        obs, successor = self.statistics.normalise(obs), self.statistics.normalise(successor)
        return self.restore_value(
            self.network.successor_values(memory, obs, action, reset, successor)
        )

    def normalise_value(self, value: Float[Array, "*batch N"]) -> Float[Array, "*batch N"]:
        """Return values in the network's units."""
        moments = self.statistics.values
        return value if moments is None else moments.normalise(value)

    def restore_value(self, value: Float[Array, "*batch N"]) -> Float[Array, "*batch N"]:
        """Return values in units of reward."""
        moments = self.statistics.values
        return value if moments is None else moments.restore(value)

    def update_values(
        self, target: Float[Array, "*batch N"], alive: Bool[Array, "*batch N"], shard: Shard = WHOLE
    ) -> "NormalisedPolicy":
        """Return the policy with new value statistics, and a last layer that keeps its values.

            W' = W σ / σ';  b' = (b σ + μ − μ') / σ'

        Args:
            target: value targets of a rollout, in units of reward.
            alive: agents whose targets count.
            shard: where the rollout lies on several devices, this one's share.

        Source: van Hasselt et al. 2016 (arXiv 1602.07714), §2.1 (Pop-Art). Difference: at the first
        rollout nothing is learned yet that would have to be kept, and the network's values, near
        zero, start in the new units.
        """
        old = self.statistics.values
        if old is None:
            return self
        new = old.update(target, alive, horizon=VALUE_HORIZON, shard=shard)
        scale = jnp.where(old.count > 0, old.deviation / new.deviation, 1.0)
        shift = jnp.where(old.count > 0, (old.mean - new.mean) / new.deviation, 0.0)
        network = rescaled(self.network, scale, shift)
        return NormalisedPolicy(network, replace(self.statistics, values=new))


def rescaled(network: Policy, scale: Float[Array, ""], shift: Float[Array, ""]) -> Policy:
    """Return a network whose values are v · scale + shift, by its value layer.

    Args:
        network: with a `value_layer`.
        scale: of values.
        shift: of scaled values.
    """
    layer = cast(Any, network).value_layer
    return eqx.tree_at(
        lambda network: (network.value_layer.weight, network.value_layer.bias),
        network,
        (layer.weight * scale, layer.bias * scale + shift),
    )


def _clip(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.clip(x, -MAX_DEVIATIONS, MAX_DEVIATIONS)


def as_normalised(policy: Policy) -> NormalisedPolicy:
    """Return a policy as one that normalises, even if it normalises nothing."""
    return (
        policy if isinstance(policy, NormalisedPolicy) else NormalisedPolicy(policy, Statistics())
    )


def simplified(policy: NormalisedPolicy) -> Policy:
    """Return the network by itself if nothing is normalised; the inverse of `as_normalised`."""
    return policy if jax.tree.leaves(policy.statistics) else policy.network


def transfer_policy(
    policy: Policy, name: str, old: EnvSpec, new: EnvSpec, config: NetworkConfig
) -> Policy:
    """Return a policy for another task with the same weights, and the statistics that fit.

    Args:
        policy: the weights.
        name: of the policy.
        old: the task that it was trained on.
        new: the other task.
        config: of the network.

    Raises:
        UserError: if the weights do not fit.
    """
    whole = as_normalised(policy)
    network, statistics = transfer_weights(whole.network, name, old, new, config), whole.statistics
    if new.state_dim != old.state_dim:  # and yet the weights fit: they do not read it
        statistics = replace(statistics, state=None)
    return simplified(NormalisedPolicy(network, statistics))
