"""Learning from one rollout: epochs × minibatches of gradient steps."""

from dataclasses import replace
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from mam.config import PPOConfig
from mam.errors import UserError
from mam.learning.nonfinite import (
    NO_FAULT,
    first_nonfinite,
    is_nonfinite,
    leaf_names,
    nonfinite_leaves,
)
from mam.learning.objective import Batch, Losses, Objective
from mam.learning.sharding import WHOLE, Shard
from mam.types import Policy


def make_optimiser(ppo: PPOConfig) -> optax.GradientTransformation:
    """Make Adam behind a limit on the global gradient norm.

    The learning rate is part of its state (`learning_rate`).
    """
    adam = optax.inject_hyperparams(optax.adam, static_args=("b1", "b2", "eps", "eps_root"))
    return optax.chain(
        optax.clip_by_global_norm(ppo.max_grad_norm), adam(learning_rate=ppo.lr, eps=1e-5)
    )


class UpdateMetrics(eqx.Module):
    """Means over the gradient steps of an update, and where it started."""

    losses: dict[str, Float[Array, ""]]
    grad_norm: Float[Array, ""]  # before clipping
    # Maxima of the first minibatch: for PPO's ratios 0 up to rounding, else acting ≠ evaluating.
    first: dict[str, Float[Array, ""]]
    bad: Int[Array, ""]  # which of `update_names` was the first that was not finite, or NO_FAULT

    @property
    def values(self) -> dict[str, Float[Array, ""]]:
        """The numbers by the names under which they are reported."""
        first = {f"first_{name}": x for name, x in self.first.items()}
        return {**self.losses, "grad_norm": self.grad_norm, **first}


def update_names(policy: Policy) -> list[str]:
    """List what is watched in an update, in the order in which it is computed."""
    return ["loss", *leaf_names(policy, "gradient of"), *leaf_names(policy, "updated")]


def update(
    policy: Policy,
    opt_state: optax.OptState,
    batch: Batch,
    key: Key[Array, ""],
    optimiser: optax.GradientTransformation,
    objective: Objective,
    config: PPOConfig,
    shard: Shard = WHOLE,
    lr_scale: Float[Array, ""] | float = 1.0,
    frozen: PyTree[Bool[Array, ""]] | None = None,
) -> tuple[Policy, optax.OptState, UpdateMetrics]:
    """Take num_epochs × num_minibatches gradient steps.

    Each epoch visits every sequence of the batch once.

    Where there are several devices, all of them have the whole batch, and each computes its share
    of every minibatch.

    Args:
        policy: the network.
        opt_state: the optimiser's state.
        batch: what is learned from.
        key: decides which sequences are in which minibatch.
        optimiser: takes the steps.
        objective: the loss.
        config: numbers of epochs and minibatches.
        shard: this device's share of every minibatch.
        lr_scale: multiplies the learning rate in the optimiser's state.
        frozen: which parameters stay as they are; none if None. The optimiser's state goes on, so
            that they take steps of the usual size as soon as they are free.

    Returns:
        The network and the optimiser's state after the steps, and means over these.

    Raises:
        UserError: if the sequences cannot be dealt evenly to the minibatches, or a minibatch to the
            devices.
    """

    def gradient_step(carry, index: Int[Array, "M"]):
        policy, opt_state, bad = carry
        index = shard.local_slice(index)
        rows = jax.tree.map(lambda x: x[:, index], batch)
        grads, losses = _gradient(policy, rows, objective, shard)
        updates, opt_state = optimiser.update(grads, opt_state, policy)
        updates = optax.tree.scale(lr_scale, updates)
        if frozen is not None:  # after Adam, whose moments go on
            updates = jax.tree.map(lambda still, x: jnp.where(still, 0.0, x), frozen, updates)
        policy = cast(Policy, optax.apply_updates(cast(Any, policy), updates))
        flags = [is_nonfinite(losses.loss), *nonfinite_leaves(grads), *nonfinite_leaves(policy)]
        bad = jnp.where(bad == NO_FAULT, first_nonfinite(flags), bad)
        return (policy, opt_state, bad), (losses, optax.tree.norm(grads))

    minibatches = _deal(batch, key, config, shard)
    carry = (policy, opt_state, jnp.int32(NO_FAULT))
    (policy, opt_state, bad), (losses, grad_norm) = lax.scan(gradient_step, carry, minibatches)
    metrics = UpdateMetrics(
        losses=jax.tree.map(jnp.mean, {"loss": losses.loss, **losses.means, **losses.maxima}),
        grad_norm=grad_norm.mean(),
        first={name: x[0] for name, x in losses.maxima.items()},
        bad=bad,
    )
    return policy, opt_state, metrics


def _gradient(
    policy: Policy, rows: Batch, objective: Objective, shard: Shard
) -> tuple[PyTree, Losses]:
    """Return the gradient of the loss of a minibatch, and the losses, over all devices."""

    def loss_fn(policy: Policy) -> tuple[Float[Array, ""], Losses]:
        memory = jax.tree.map(lambda x: x[0], rows.memory)
        new = policy.evaluate(memory, rows.observation, rows.action, rows.order, rows.reset)
        losses = objective.loss(policy, new, rows, rows.targets, shard)
        return losses.loss, losses

    grads, shares = jax.grad(loss_fn, has_aux=True)(policy)
    grads, losses = shard.sum((grads, shares))
    return grads, replace(losses, maxima=shard.max(shares.maxima))


def check_minibatches(size: int, length: int | None, config: PPOConfig, shard: Shard) -> None:
    """Refuse minibatches that would not be of one size.

    Args:
        size: sequences of a rollout.
        length: their steps, for a policy with memory; None: single steps.
        config: says how many minibatches there are.
        shard: over how many devices each is spread.
    """
    if size % (config.num_minibatches * shard.num_shards):
        why = f"a policy with memory learns from sequences of {length} steps: " if length else ""
        what = f"the {size} {'sequences' if length else 'steps'} of a rollout"
        devices = f" × {shard.num_shards} devices" if shard.num_shards > 1 else ""
        raise UserError(
            f"{why}ppo.num_minibatches{devices} must divide {what}, "
            f"got {config.num_minibatches}{devices}"
        )


def _deal(batch: Batch, key: Key[Array, ""], config: PPOConfig, shard: Shard) -> Int[Array, "K M"]:
    """Deal the sequences, in an order drawn for each epoch, to the minibatches of all epochs."""
    size, length = batch.num_sequences, batch.reset.shape[0]
    check_minibatches(size, length if jax.tree.leaves(batch.memory) else None, config, shard)
    keys = jax.random.split(key, config.num_epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, size))(keys)
    return order.reshape(config.num_epochs * config.num_minibatches, -1)
