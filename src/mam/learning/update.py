"""Learning from one rollout: epochs × minibatches of gradient steps."""

from dataclasses import replace
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mam.config import PPOConfig
from mam.errors import UserError
from mam.learning.advantages import Advantages
from mam.learning.nonfinite import FINE, bad_leaves, first_bad, is_bad, leaf_names
from mam.learning.ppo import PPOLoss, ppo_loss
from mam.learning.sharding import WHOLE, Shard
from mam.types import Action, Memory, Observation, Policy, Transition


class Batch(eqx.Module):
    """What gradient steps read: the learner's part of the transitions, and the advantages.

    [L, M, …]: M sequences of L steps, of which a minibatch draws some; memory, that before the first of
    them, is [1, M, …].
    """

    observation: Observation
    reset: Bool[Array, "L M"]
    memory: Memory
    action: Action
    order: Int[Array, "L M N"]
    log_prob: Float[Array, "L M N"]
    value: Float[Array, "L M N"]
    advantage: Float[Array, "L M N"]
    target: Float[Array, "L M N"]

    @property
    def num_sequences(self) -> int:
        """M."""
        return self.reset.shape[1]


def make_batch(transitions: Transition, advantages: Advantages, shard: Shard = WHOLE) -> Batch:
    """Cuts a rollout [T, B, …] into what is learned from in one piece; from several devices it comes together here.

    A policy with memory learns from B sequences of T steps, one without from each of the T · B steps on its own.
    """
    batch = Batch(
        observation=transitions.observation,
        reset=transitions.reset,
        memory=jax.tree.map(lambda x: x[:1], transitions.memory),
        action=transitions.action,
        order=transitions.order,
        log_prob=transitions.log_prob,
        value=transitions.value,
        advantage=advantages.advantage,
        target=advantages.target,
    )
    batch = shard.gather(batch, axis=1)
    if jax.tree.leaves(batch.memory):
        return batch
    return jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch)


def make_optimiser(ppo: PPOConfig) -> optax.GradientTransformation:
    """Adam behind a limit on the global gradient norm; the learning rate is part of its state (`learning_rate`)."""
    adam = optax.inject_hyperparams(optax.adam, static_args=("b1", "b2", "eps", "eps_root"))
    return optax.chain(optax.clip_by_global_norm(ppo.max_grad_norm), adam(learning_rate=ppo.lr, eps=1e-5))


class UpdateMetrics(eqx.Module):
    """Means over the gradient steps of an update, and where it started."""

    losses: PPOLoss
    grad_norm: Float[Array, ""]  # before clipping
    first_ratio_deviation: Float[Array, ""]  # of the first minibatch: 0 up to rounding, else acting ≠ evaluating
    bad: Int[Array, ""]  # which of `update_names` was the first that was not finite, or FINE


def update_names(policy: Policy) -> list[str]:
    """What is watched in an update, in the order in which it is computed."""
    return ["loss", *leaf_names(policy, "gradient of"), *leaf_names(policy, "updated")]


def update(
    policy: Policy,
    opt_state: optax.OptState,
    batch: Batch,
    key: Key[Array, ""],
    optimiser: optax.GradientTransformation,
    ppo: PPOConfig,
    shard: Shard = WHOLE,
    lr_scale: Float[Array, ""] | float = 1.0,
) -> tuple[Policy, optax.OptState, UpdateMetrics]:
    """Takes num_epochs × num_minibatches gradient steps; each epoch visits every sequence of the batch once.

    All of them are taken with lr_scale times the learning rate in the optimiser's state.
    Where there are several devices, all of them have the whole batch, and each computes its share of every minibatch.

    Raises:
        UserError: if the sequences cannot be dealt evenly to the minibatches, or a minibatch to the devices.
    """
    size = batch.num_sequences
    if size % (ppo.num_minibatches * shard.num_shards):
        whole = jax.tree.leaves(batch.memory)
        why = "a policy with memory learns from whole rollouts: " if whole else ""
        what = f"ppo.num_envs = {size}" if whole else f"the {size} steps of a rollout"
        devices = f" × {shard.num_shards} devices" if shard.num_shards > 1 else ""
        raise UserError(f"{why}ppo.num_minibatches{devices} must divide {what}, got {ppo.num_minibatches}{devices}")

    def loss_fn(policy: Policy, rows: Batch) -> tuple[Float[Array, ""], PPOLoss]:
        memory = jax.tree.map(lambda x: x[0], rows.memory)
        new = policy.evaluate(memory, rows.observation, rows.action, rows.order, rows.reset)
        losses = ppo_loss(
            new,
            rows.log_prob,
            rows.value,
            rows.advantage,
            rows.target,
            rows.observation.alive,
            clip_eps=ppo.clip_eps,
            ent_coef=ppo.ent_coef,
            vf_coef=ppo.vf_coef,
            shard=shard,
        )
        return losses.loss, losses

    def gradient_step(carry, index: Int[Array, "M"]):
        policy, opt_state, bad = carry
        index = shard.part(index)
        rows = jax.tree.map(lambda x: x[:, index], batch)
        grads, shares = jax.grad(loss_fn, has_aux=True)(policy, rows)
        grads, losses = shard.sum((grads, shares))
        losses = replace(losses, ratio_deviation=shard.max(shares.ratio_deviation))
        updates, opt_state = optimiser.update(grads, opt_state, policy)
        policy = cast(Policy, optax.apply_updates(cast(Any, policy), optax.tree.scale(lr_scale, updates)))
        found = first_bad([is_bad(losses.loss), *bad_leaves(grads), *bad_leaves(policy)])
        return (policy, opt_state, jnp.where(bad == FINE, found, bad)), (losses, optax.tree.norm(grads))

    keys = jax.random.split(key, ppo.num_epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, size))(keys)
    minibatches = order.reshape(ppo.num_epochs * ppo.num_minibatches, -1)
    carry = (policy, opt_state, jnp.int32(FINE))
    (policy, opt_state, bad), (losses, grad_norm) = lax.scan(gradient_step, carry, minibatches)
    metrics = UpdateMetrics(
        losses=jax.tree.map(jnp.mean, losses),
        grad_norm=grad_norm.mean(),
        first_ratio_deviation=losses.ratio_deviation[0],
        bad=bad,
    )
    return policy, opt_state, metrics
