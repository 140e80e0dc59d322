"""Output heads."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mam.networks.layers import HIDDEN_GAIN, SMALL_GAIN, Dense, LayerNorm, gelu


class PlainHead(eqx.Module):
    """Dense alone; the output starts near zero, in float32 or wider."""

    out: Dense

    def __init__(self, d_model: int, out_dim: int, *, key: Key[Array, ""]):
        self.out = Dense(d_model, out_dim, key=key, gain=SMALL_GAIN)

    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch A"]:
        return self.out(x.astype(jnp.promote_types(x.dtype, jnp.float32)))


class Head(eqx.Module):
    """Dense → GELU → LayerNorm → Dense; the output starts near zero, in float32 or wider.

    Source: MAT (arXiv 2205.14953), §3.
    """

    hidden: Dense
    norm: LayerNorm
    out: Dense

    def __init__(self, d_model: int, out_dim: int, *, key: Key[Array, ""]):
        hidden_key, out_key = jax.random.split(key)
        self.hidden = Dense(d_model, d_model, key=hidden_key, gain=HIDDEN_GAIN)
        self.norm = LayerNorm(d_model)
        self.out = Dense(d_model, out_dim, key=out_key, gain=SMALL_GAIN)

    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch A"]:
        x = self.norm(gelu(self.hidden(x)))
        return self.out(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
