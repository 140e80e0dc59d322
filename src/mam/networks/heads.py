"""Output heads, and the masked categorical distribution: the one place where illegal actions are masked."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mam.networks.layers import HIDDEN_GAIN, SMALL_GAIN, Dense, LayerNorm

ILLEGAL = -1e9  # exp(ILLEGAL − any logit) is exactly zero, and unlike −inf it has a gradient


class Head(eqx.Module):
    """Dense → GELU → LayerNorm → Dense; the output starts near zero (MAT, §3)."""

    hidden: Dense
    norm: LayerNorm
    out: Dense

    def __init__(self, d_model: int, out_dim: int, *, key: Key[Array, ""]):
        hidden_key, out_key = jax.random.split(key)
        self.hidden = Dense(d_model, d_model, key=hidden_key, gain=HIDDEN_GAIN)
        self.norm = LayerNorm(d_model)
        self.out = Dense(d_model, out_dim, key=out_key, gain=SMALL_GAIN)

    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch A"]:
        return self.out(self.norm(jax.nn.gelu(self.hidden(x))))


def mask_logits(logits: Float[Array, "*batch A"], action_mask: Bool[Array, "*batch A"]) -> Float[Array, "*batch A"]:
    """Logits under which an illegal action has probability zero."""
    return jnp.where(action_mask, logits, ILLEGAL)


def log_prob_of(masked_logits: Float[Array, "*batch A"], action: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Log-probability of the chosen action."""
    return jnp.take_along_axis(jax.nn.log_softmax(masked_logits), action[..., None], axis=-1)[..., 0]


def entropy_of(masked_logits: Float[Array, "*batch A"]) -> Float[Array, "*batch"]:
    """Entropy in nats; an illegal action contributes nothing, in value and in gradient."""
    log_probs = jax.nn.log_softmax(masked_logits)
    return -jnp.sum(jnp.where(log_probs > 0.5 * ILLEGAL, jnp.exp(log_probs) * log_probs, 0.0), axis=-1)
