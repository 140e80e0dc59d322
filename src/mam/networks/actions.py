"""Distributions over one agent's actions: one choice, several choices, or a vector of real numbers.

A distribution owns every shape that depends on the kind of action: what the network puts out for
it, the noise it is sampled from, and what later agents read of it. Masks apply here alone: an
illegal choice has probability zero, a component that is not in use is zero and counts for nothing.
Noise is handed in, so that it can belong to the agent.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import ClassVar, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mam.types import AgentAction, EnvSpec

ILLEGAL = -1e9  # exp(ILLEGAL − any logit) is exactly zero, and unlike −inf it has a gradient
LARGEST = 1 - 1e-6  # of a continuous action's components, where atanh is still finite and sensible

Token = Int[Array, "..."] | Float[Array, "... _"]  # an index, or features


@runtime_checkable
class ActionDistribution(Protocol):
    """A distribution over one agent's actions, for any leading axes.

    `outputs` are the network's, [*batch, num_outputs]; `mask` is [*batch, A], True = legal; an
    action is [*batch], or [*batch, K] or [*batch, A] where it has components.
    """

    indexed: ClassVar[bool]  # tokens are one-hot, and therefore given as indices

    @property
    def num_outputs(self) -> int:
        """Numbers that the network puts out for an agent."""
        ...

    @property
    def token_dim(self) -> int:
        """Features of a token."""
        ...

    def token(self, action: AgentAction) -> Token:
        """Return what a decoder embeds of an action: features [*batch, token_dim], or indices."""
        ...

    def draw_noise(self, key: Key[Array, ""]) -> Float[Array, "..."]:
        """Draw what makes `sample_from_noise` a random sample."""
        ...

    def sample_from_noise(
        self,
        outputs: Float[Array, "*batch P"],
        mask: Bool[Array, "*batch A"],
        noise: Float[Array, "*batch Z"],
    ) -> AgentAction:
        """Return the action that the noise leads to.

        Args:
            outputs: of the network.
            mask: legal choices, or components in use.
            noise: drawn by `draw_noise`; zeros lead to the mode.
        """
        ...

    def equal(self, one: AgentAction, other: AgentAction) -> Bool[Array, "*batch"]:
        """Say whether two actions are the same, in all components and up to rounding.

        Args:
            one: by one way of computing it.
            other: by another, such as a pass over all agents at once in place of a loop.
        """
        ...

    def log_prob(
        self, outputs: Float[Array, "*batch P"], mask: Bool[Array, "*batch A"], action: AgentAction
    ) -> Float[Array, "*batch"]:
        """Return the log-probability (density) of an action, in nats.

        Args:
            outputs: of the network.
            mask: legal choices, or components in use.
            action: one that the mask allows.
        """
        ...

    def entropy(
        self, outputs: Float[Array, "*batch P"], mask: Bool[Array, "*batch A"]
    ) -> Float[Array, "*batch"]:
        """Return the entropy, in nats, of all components together.

        Args:
            outputs: of the network.
            mask: legal choices, or components in use: the others add nothing, and no gradient.
        """
        ...

    def parameters(
        self, outputs: Float[Array, "*batch P"], mask: Bool[Array, "*batch A"]
    ) -> Float[Array, "*batch Q"]:
        """Return the numbers that decide the distribution, by themselves.

        Args:
            outputs: of the network.
            mask: legal choices, or components in use.
        """
        ...

    def mode(
        self, parameters: Float[Array, "*batch Q"], mask: Bool[Array, "*batch A"]
    ) -> AgentAction:
        """Return the most likely action; of several choices, of each.

        Args:
            parameters: as `parameters` returned them.
            mask: legal choices, or components in use.
        """
        ...

    def divergence(
        self,
        one: Float[Array, "*batch Q"],
        other: Float[Array, "*batch Q"],
        mask: Bool[Array, "*batch A"],
    ) -> Float[Array, "*batch"]:
        """Return KL(one ‖ other), in nats, of all components together.

        Args:
            one: parameters of the distribution that the expectation is over.
            other: those of the other.
            mask: legal choices, or components in use, of both.
        """
        ...


def mask_logits(
    logits: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]
) -> Float[Array, "*batch A"]:
    """Return `logits`, `ILLEGAL` where `mask` is False: the rule by which every decoder masks."""
    return jnp.where(mask, logits, ILLEGAL)


def mask_noise(
    noise: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]
) -> Float[Array, "*batch A"]:
    """Return the scores of choices before their logits are added, later, by `add_logits`.

    Args:
        noise: drawn by `ActionDistribution.draw_noise`.
        mask: legal choices; the others score `ILLEGAL` plus noise.
    """
    return mask_logits(jnp.zeros_like(noise), mask) + noise


def add_logits(scores: Float[Array, "..."], logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return mask_logits(logits, mask) + noise, given `scores` = mask_noise(noise, mask)."""
    return jnp.where(scores > ILLEGAL / 2, logits + scores, scores)


def _choice_divergence(
    one: Float[Array, "*batch A"], other: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]
) -> Float[Array, "*batch"]:
    """Return Σ p (log p − log q) over legal choices, of log-probabilities."""
    return jnp.sum(jnp.where(mask, jnp.exp(one) * (one - other), 0.0), axis=-1)


class Categorical(eqx.Module):
    """One of A choices; the network's outputs are logits."""

    num_outputs: int = eqx.field(static=True)
    indexed: ClassVar[bool] = True

    @property
    def token_dim(self) -> int:
        return self.num_outputs

    def token(self, action: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        return action

    def draw_noise(self, key: Key[Array, ""]) -> Float[Array, "A"]:
        """Draw Gumbel noise: argmax(logits + noise) is a sample from softmax(logits)."""
        return jax.random.gumbel(key, (self.num_outputs,))

    def sample_from_noise(
        self,
        outputs: Float[Array, "*batch A"],
        mask: Bool[Array, "*batch A"],
        noise: Float[Array, "*batch A"],
    ) -> Int[Array, "*batch"]:
        return jnp.argmax(mask_logits(outputs, mask) + noise, axis=-1).astype(jnp.int32)

    def equal(
        self, one: Int[Array, "*batch"], other: Int[Array, "*batch"]
    ) -> Bool[Array, "*batch"]:
        return one == other

    def log_prob(
        self,
        outputs: Float[Array, "*batch A"],
        mask: Bool[Array, "*batch A"],
        action: Int[Array, "*batch"],
    ) -> Float[Array, "*batch"]:
        return jnp.take_along_axis(
            jax.nn.log_softmax(mask_logits(outputs, mask)), action[..., None], axis=-1
        )[..., 0]

    def entropy(
        self, outputs: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]
    ) -> Float[Array, "*batch"]:
        """Return the entropy; an illegal action contributes nothing, in value and in gradient."""
        log_probs = jax.nn.log_softmax(mask_logits(outputs, mask))
        return -jnp.sum(jnp.where(mask, jnp.exp(log_probs) * log_probs, 0.0), axis=-1)

    def parameters(
        self, outputs: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]
    ) -> Float[Array, "*batch A"]:
        """Return log-probabilities."""
        return jax.nn.log_softmax(mask_logits(outputs, mask))

    def mode(
        self, parameters: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]
    ) -> Int[Array, "*batch"]:
        return jnp.argmax(mask_logits(parameters, mask), axis=-1).astype(jnp.int32)

    def divergence(
        self,
        one: Float[Array, "*batch A"],
        other: Float[Array, "*batch A"],
        mask: Bool[Array, "*batch A"],
    ) -> Float[Array, "*batch"]:
        return _choice_divergence(one, other, mask)


class MultiCategorical(eqx.Module):
    """One choice in each of K independent components; outputs are their logits side by side.

    log π(a) = Σ_k log π_k(a_k),  H(π) = Σ_k H(π_k)

    Each π_k is a `Categorical` over its slice of outputs and mask.
    """

    sizes: tuple[int, ...] = eqx.field(static=True)  # choices of each component; Σ sizes = A
    indexed: ClassVar[bool] = False

    @property
    def num_outputs(self) -> int:
        return sum(self.sizes)

    @property
    def token_dim(self) -> int:
        return self.num_outputs

    def token(self, action: Int[Array, "*batch K"]) -> Float[Array, "*batch A"]:
        """Return one-hot choices, side by side."""
        return jnp.concatenate(
            [jax.nn.one_hot(action[..., k], size) for k, size in enumerate(self.sizes)], axis=-1
        )

    def draw_noise(self, key: Key[Array, ""]) -> Float[Array, "A"]:
        return jax.random.gumbel(key, (self.num_outputs,))

    def sample_from_noise(
        self,
        outputs: Float[Array, "*batch A"],
        mask: Bool[Array, "*batch A"],
        noise: Float[Array, "*batch A"],
    ) -> Int[Array, "*batch K"]:
        choices = [
            one.sample_from_noise(*parts) for one, *parts in self._components(outputs, mask, noise)
        ]
        return jnp.stack(choices, axis=-1)

    def equal(
        self, one: Int[Array, "*batch K"], other: Int[Array, "*batch K"]
    ) -> Bool[Array, "*batch"]:
        return jnp.all(one == other, axis=-1)

    def log_prob(
        self,
        outputs: Float[Array, "*batch A"],
        mask: Bool[Array, "*batch A"],
        action: Int[Array, "*batch K"],
    ) -> Float[Array, "*batch"]:
        components = enumerate(self._components(outputs, mask))
        log_probs = [one.log_prob(*parts, action[..., k]) for k, (one, *parts) in components]
        return jnp.sum(jnp.stack(log_probs, axis=-1), axis=-1)

    def entropy(
        self, outputs: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]
    ) -> Float[Array, "*batch"]:
        entropies = [one.entropy(*parts) for one, *parts in self._components(outputs, mask)]
        return jnp.sum(jnp.stack(entropies, axis=-1), axis=-1)

    def parameters(
        self, outputs: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]
    ) -> Float[Array, "*batch A"]:
        """Return each component's log-probabilities, side by side."""
        parts = [one.parameters(*arrays) for one, *arrays in self._components(outputs, mask)]
        return jnp.concatenate(parts, axis=-1)

    def mode(
        self, parameters: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]
    ) -> Int[Array, "*batch K"]:
        parts = [one.mode(*arrays) for one, *arrays in self._components(parameters, mask)]
        return jnp.stack(parts, axis=-1)

    def divergence(
        self,
        one: Float[Array, "*batch A"],
        other: Float[Array, "*batch A"],
        mask: Bool[Array, "*batch A"],
    ) -> Float[Array, "*batch"]:
        return _choice_divergence(one, other, mask)

    def _components(self, *arrays: Array) -> Iterator[tuple]:
        """Yield each component's distribution and its slice of every array."""
        for size, stop in zip(self.sizes, accumulate(self.sizes), strict=True):
            yield Categorical(size), *(x[..., stop - size : stop] for x in arrays)


# Nodes and weights of ∫ f(x) N(x; 0, 1) dx ≈ Σ w f(x): exact for polynomials up to degree 31.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(16)
_NODES, _WEIGHTS = _NODES.astype(np.float32), (_WEIGHTS / _WEIGHTS.sum()).astype(np.float32)


class TanhNormal(eqx.Module):
    """A real number in (−1, 1) per component: tanh of a normal variable; outputs are its means.

    The standard deviations, softplus(log_std), do not depend on the observation; log_std starts
    at 0.

        log π(a) = Σ_j log N(x_j; μ_j, σ_j) − log(1 − a_j²),  x = atanh(a)
        H(π)     = Σ_j ½ log(2πe σ_j²) + E[log(1 − tanh² x_j)]

    Source: Haarnoja et al. 2018 (arXiv 1812.05905), app. C. Difference: the expectation, which has
    no closed form, is a Gauss–Hermite sum of 16 terms in place of one sample. It is exact to 2e-5
    for σ ≤ 1 (3e-3 at σ = 2), and takes no noise and no key.
    """

    log_std: Float[Array, "A"]
    indexed: ClassVar[bool] = False

    def __init__(self, num_actions: int):
        self.log_std = jnp.zeros(num_actions)

    @property
    def num_outputs(self) -> int:
        return self.log_std.shape[-1]

    @property
    def token_dim(self) -> int:
        return self.num_outputs

    def token(self, action: Float[Array, "*batch A"]) -> Float[Array, "*batch A"]:
        return action

    def draw_noise(self, key: Key[Array, ""]) -> Float[Array, "A"]:
        return jax.random.normal(key, (self.num_outputs,))

    def sample_from_noise(
        self,
        outputs: Float[Array, "*batch A"],
        mask: Bool[Array, "*batch A"],
        noise: Float[Array, "*batch A"],
    ) -> Float[Array, "*batch A"]:
        action = jnp.tanh(outputs + jax.nn.softplus(self.log_std) * noise)
        return jnp.where(mask, jnp.clip(action, -LARGEST, LARGEST), 0.0)

    def equal(
        self, one: Float[Array, "*batch A"], other: Float[Array, "*batch A"]
    ) -> Bool[Array, "*batch"]:
        return jnp.all(jnp.abs(one - other) <= 8 * jnp.finfo(one.dtype).eps, axis=-1)

    def log_prob(
        self,
        outputs: Float[Array, "*batch A"],
        mask: Bool[Array, "*batch A"],
        action: Float[Array, "*batch A"],
    ) -> Float[Array, "*batch"]:
        std, x = jax.nn.softplus(self.log_std), jnp.arctanh(action)
        log_normal = (
            -0.5 * jnp.square((x - outputs) / std) - jnp.log(std) - 0.5 * jnp.log(2 * jnp.pi)
        )
        return jnp.sum(jnp.where(mask, log_normal - _log_slope(x), 0.0), axis=-1)

    def entropy(
        self, outputs: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]
    ) -> Float[Array, "*batch"]:
        std = jax.nn.softplus(self.log_std)
        log_slope = _log_slope(outputs[..., None] + std[:, None] * _NODES) @ _WEIGHTS
        entropy = 0.5 * jnp.log(2 * jnp.pi * jnp.e * jnp.square(std)) + log_slope
        return jnp.sum(jnp.where(mask, entropy, 0.0), axis=-1)

    def parameters(
        self, outputs: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]
    ) -> Float[Array, "*batch Q"]:
        """Return the means of the normal variables and, behind them, their log_std."""
        return jnp.concatenate([outputs, jnp.broadcast_to(self.log_std, outputs.shape)], axis=-1)

    def mode(
        self, parameters: Float[Array, "*batch Q"], mask: Bool[Array, "*batch A"]
    ) -> Float[Array, "*batch A"]:
        """Return tanh of the mean, the median, which is what acting greedily takes."""
        return jnp.where(mask, jnp.tanh(parameters[..., : self.num_outputs]), 0.0)

    def divergence(
        self,
        one: Float[Array, "*batch Q"],
        other: Float[Array, "*batch Q"],
        mask: Bool[Array, "*batch A"],
    ) -> Float[Array, "*batch"]:
        """Return that of the normal variables, which tanh does not change."""
        (mean, std), (mean_q, std_q) = (jnp.split(x, 2, axis=-1) for x in (one, other))
        std, std_q = jax.nn.softplus(std), jax.nn.softplus(std_q)
        squares = (jnp.square(std) + jnp.square(mean - mean_q)) / jnp.square(std_q)
        each = jnp.log(std_q / std) + 0.5 * (squares - 1)
        return jnp.sum(jnp.where(mask, each, 0.0), axis=-1)


def _log_slope(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return log(1 − tanh² x), the logarithm of tanh's slope, without cancellation."""
    return 2 * (jnp.log(2.0) - x - jax.nn.softplus(-2 * x))


def make_distribution(spec: EnvSpec) -> ActionDistribution:
    """Return the distribution over the actions that a task takes."""
    if spec.continuous:
        return TanhNormal(spec.num_actions)
    if spec.action_components is not None:
        return MultiCategorical(spec.action_components)
    return Categorical(spec.num_actions)


def agent_noise(
    distribution: ActionDistribution, key: Key[Array, "*batch"], num_agents: int
) -> Array:
    """Draw noise [*batch, N, …] keyed by the agent, never by its place in the order.

    Args:
        distribution: says what noise one agent needs.
        key: one per batch element.
        num_agents: N.
    """

    def one(key: Key[Array, ""]) -> Float[Array, "N ..."]:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_agents))
        return jax.vmap(distribution.draw_noise)(keys)

    noise = jax.vmap(one)(key.reshape(-1))
    return noise.reshape(*key.shape, *noise.shape[1:])
