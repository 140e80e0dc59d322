"""Learning from one rollout: epochs × minibatches of gradient steps."""

from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mam.advantages import Advantages
from mam.config import PPOConfig
from mam.errors import UserError
from mam.losses import PPOLoss, ppo_loss
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


def make_batch(transitions: Transition, advantages: Advantages) -> Batch:
    """Cuts a rollout [T, B, …] into what is learned from in one piece.

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
    if jax.tree.leaves(batch.memory):
        return batch
    return jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch)


def make_optimiser(ppo: PPOConfig) -> optax.GradientTransformation:
    """Adam with a constant learning rate behind a limit on the global gradient norm."""
    return optax.chain(optax.clip_by_global_norm(ppo.max_grad_norm), optax.adam(ppo.lr, eps=1e-5))


class UpdateMetrics(eqx.Module):
    """Means over the gradient steps of an update, and where it started."""

    losses: PPOLoss
    grad_norm: Float[Array, ""]  # before clipping
    first_ratio_deviation: Float[Array, ""]  # of the first minibatch: 0 up to rounding, else acting ≠ evaluating


def update(
    policy: Policy,
    opt_state: optax.OptState,
    batch: Batch,
    key: Key[Array, ""],
    optimiser: optax.GradientTransformation,
    ppo: PPOConfig,
) -> tuple[Policy, optax.OptState, UpdateMetrics]:
    """Takes num_epochs × num_minibatches gradient steps; each epoch visits every sequence of the batch once.

    Raises:
        UserError: if the sequences cannot be dealt evenly to the minibatches.
    """
    size = batch.num_sequences
    if size % ppo.num_minibatches:
        raise UserError(
            f"a policy with memory learns from whole rollouts: ppo.num_minibatches must divide "
            f"ppo.num_envs = {size}, got {ppo.num_minibatches}"
        )

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
        )
        return losses.loss, losses

    def gradient_step(carry, index: Int[Array, "M"]):
        policy, opt_state = carry
        rows = jax.tree.map(lambda x: x[:, index], batch)
        grads, losses = jax.grad(loss_fn, has_aux=True)(policy, rows)
        updates, opt_state = optimiser.update(grads, opt_state, policy)
        policy = cast(Policy, optax.apply_updates(cast(Any, policy), updates))
        return (policy, opt_state), (losses, optax.tree.norm(grads))

    keys = jax.random.split(key, ppo.num_epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, size))(keys)
    minibatches = order.reshape(ppo.num_epochs * ppo.num_minibatches, -1)
    (policy, opt_state), (losses, grad_norm) = lax.scan(gradient_step, (policy, opt_state), minibatches)
    metrics = UpdateMetrics(
        losses=jax.tree.map(jnp.mean, losses),
        grad_norm=grad_norm.mean(),
        first_ratio_deviation=losses.ratio_deviation[0],
    )
    return policy, opt_state, metrics
