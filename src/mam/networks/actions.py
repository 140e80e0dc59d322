"""How agents act, given what a network put out: one of several choices, or a vector of real numbers.

The one place where masks apply: an illegal choice has probability zero, a component not in use is zero and
counts for nothing. Both kinds draw from noise that is handed to them, so that noise can belong to the agent.
"""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mam.types import AgentAction, EnvSpec

ILLEGAL = -1e9  # exp(ILLEGAL − any logit) is exactly zero, and unlike −inf it has a gradient
LARGEST = 1 - 1e-6  # of a continuous action's components, where atanh is still finite and sensible


@runtime_checkable
class ActionKind(Protocol):
    """A distribution over one agent's actions, for any leading axes. `out` and `mask` are [*batch, A]."""

    def noise(self, key: Key[Array, ""], num_actions: int) -> Float[Array, "A"]:
        """What makes `choose` a random sample; with zeros it takes the mode."""
        ...

    def choose(
        self, out: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"], noise: Float[Array, "*batch A"]
    ) -> AgentAction:
        """An action: [*batch] or, if continuous, [*batch, A]."""
        ...

    def same(self, one: AgentAction, other: AgentAction) -> Bool[Array, "*batch"]:
        """Whether they are equal, up to rounding."""
        ...

    def log_prob(self, out: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"], action: AgentAction) -> Array:
        """Its log-probability (density), [*batch]."""
        ...

    def entropy(self, out: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]) -> Float[Array, "*batch"]:
        """In nats."""
        ...


class Categorical(eqx.Module):
    """One of A choices; the network's outputs are logits."""

    def noise(self, key: Key[Array, ""], num_actions: int) -> Float[Array, "A"]:
        """Gumbel noise: argmax(logits + noise) is a sample from softmax(logits)."""
        return jax.random.gumbel(key, (num_actions,))

    def choose(
        self, out: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"], noise: Float[Array, "*batch A"]
    ) -> Int[Array, "*batch"]:
        return jnp.argmax(_legal(out, mask) + noise, axis=-1).astype(jnp.int32)

    def same(self, one: Int[Array, "*batch"], other: Int[Array, "*batch"]) -> Bool[Array, "*batch"]:
        return one == other

    def log_prob(
        self, out: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"], action: Int[Array, "*batch"]
    ) -> Float[Array, "*batch"]:
        return jnp.take_along_axis(jax.nn.log_softmax(_legal(out, mask)), action[..., None], axis=-1)[..., 0]

    def entropy(self, out: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]) -> Float[Array, "*batch"]:
        """An illegal action contributes nothing, in value and in gradient."""
        log_probs = jax.nn.log_softmax(_legal(out, mask))
        return -jnp.sum(jnp.where(mask, jnp.exp(log_probs) * log_probs, 0.0), axis=-1)


def _legal(logits: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]) -> Float[Array, "*batch A"]:
    return jnp.where(mask, logits, ILLEGAL)


# Nodes and weights of ∫ f(x) N(x; 0, 1) dx ≈ Σ w f(x): exact for polynomials up to degree 31.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(16)
_NODES, _WEIGHTS = _NODES.astype(np.float32), (_WEIGHTS / _WEIGHTS.sum()).astype(np.float32)


class TanhNormal(eqx.Module):
    """A real number in (−1, 1) per component: tanh of a normal variable; the network's outputs are its means.

    The standard deviations, softplus(log_std), do not depend on the observation; log_std starts at 0.

        log π(a) = Σ_j log N(x_j; μ_j, σ_j) − log(1 − a_j²),  x = atanh(a)
        H(π)     = Σ_j ½ log(2πe σ_j²) + E[log(1 − tanh² x_j)]

    The expectation has no closed form; a Gauss–Hermite sum of 16 terms gives it to 2e-5 for σ ≤ 1 (3e-3 at σ = 2),
    with no noise and no key, where others draw one sample. Source: Haarnoja et al. 2018 (arXiv 1812.05905), app. C.
    """

    log_std: Float[Array, "A"]

    def __init__(self, num_actions: int):
        self.log_std = jnp.zeros(num_actions)

    def noise(self, key: Key[Array, ""], num_actions: int) -> Float[Array, "A"]:
        return jax.random.normal(key, (num_actions,))

    def choose(
        self, out: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"], noise: Float[Array, "*batch A"]
    ) -> Float[Array, "*batch A"]:
        action = jnp.tanh(out + jax.nn.softplus(self.log_std) * noise)
        return jnp.where(mask, jnp.clip(action, -LARGEST, LARGEST), 0.0)

    def same(self, one: Float[Array, "*batch A"], other: Float[Array, "*batch A"]) -> Bool[Array, "*batch"]:
        return jnp.all(jnp.abs(one - other) <= 8 * jnp.finfo(one.dtype).eps, axis=-1)

    def log_prob(
        self, out: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"], action: Float[Array, "*batch A"]
    ) -> Float[Array, "*batch"]:
        std, x = jax.nn.softplus(self.log_std), jnp.arctanh(action)
        log_normal = -0.5 * jnp.square((x - out) / std) - jnp.log(std) - 0.5 * jnp.log(2 * jnp.pi)
        return jnp.sum(jnp.where(mask, log_normal - _log_slope(x), 0.0), axis=-1)

    def entropy(self, out: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]) -> Float[Array, "*batch"]:
        std = jax.nn.softplus(self.log_std)
        log_slope = _log_slope(out[..., None] + std[:, None] * _NODES) @ _WEIGHTS
        entropy = 0.5 * jnp.log(2 * jnp.pi * jnp.e * jnp.square(std)) + log_slope
        return jnp.sum(jnp.where(mask, entropy, 0.0), axis=-1)


def _log_slope(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(1 − tanh² x), the logarithm of tanh's slope, without cancellation."""
    return 2 * (jnp.log(2.0) - x - jax.nn.softplus(-2 * x))


def make_action_kind(spec: EnvSpec) -> ActionKind:
    """The kind of action a task takes."""
    return TanhNormal(spec.num_actions) if spec.continuous else Categorical()


def agent_noise(kind: ActionKind, key: Key[Array, "*batch"], num_agents: int, num_actions: int) -> Array:
    """Noise [*batch, N, A] keyed by the agent, never by its place in the order."""

    def one(key: Key[Array, ""]) -> Float[Array, "N A"]:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_agents))
        return jax.vmap(lambda k: kind.noise(k, num_actions))(keys)

    return jax.vmap(one)(key.reshape(-1)).reshape(*key.shape, num_agents, num_actions)
