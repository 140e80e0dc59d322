"""Dense layers, norms and the MLP: the plain parts every network is made of. Any number of leading axes."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float, Key

HIDDEN_GAIN = 2**0.5  # orthogonal gain before a GELU
SMALL_GAIN = 0.01  # of layers whose output should start near zero


class Dense(eqx.Module):
    """y = x W + b."""

    weight: Float[Array, "I O"]
    bias: Float[Array, "O"] | None

    def __init__(self, in_dim: int, out_dim: int, *, key: Key[Array, ""], gain: float | None = None, bias: bool = True):
        """Orthogonal weights with the given gain, or LeCun-normal ones if `gain` is None; the bias starts at zero."""
        init = initializers.lecun_normal() if gain is None else initializers.orthogonal(gain)
        self.weight = init(key, (in_dim, out_dim), jnp.float32)
        self.bias = jnp.zeros(out_dim) if bias else None

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        # One 2-D product: with more axes XLA transposes in the backward pass, at twice the cost on CPU.
        y = (x.reshape(-1, x.shape[-1]) @ self.weight).reshape(*x.shape[:-1], self.weight.shape[1])
        return y if self.bias is None else y + self.bias


class LayerNorm(eqx.Module):
    """Zero mean and unit variance over the last axis, then scale and offset."""

    scale: Float[Array, "E"]
    offset: Float[Array, "E"]
    eps: float = eqx.field(static=True)

    def __init__(self, dim: int, eps: float = 1e-6):
        self.scale, self.offset, self.eps = jnp.ones(dim), jnp.zeros(dim), eps

    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return centred * lax.rsqrt(variance + self.eps) * self.scale + self.offset


class RMSNorm(eqx.Module):
    """Unit root mean square over the last axis, then scale."""

    scale: Float[Array, "E"]
    eps: float = eqx.field(static=True)

    def __init__(self, dim: int, eps: float = 1e-6):
        self.scale, self.eps = jnp.ones(dim), eps

    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
        return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps) * self.scale


class MLP(eqx.Module):
    """Dense → GELU → Dense, all of the same width; the output starts near zero (MAT, §3)."""

    hidden: Dense
    out: Dense

    def __init__(self, d_model: int, *, key: Key[Array, ""]):
        hidden_key, out_key = jax.random.split(key)
        self.hidden = Dense(d_model, d_model, key=hidden_key, gain=HIDDEN_GAIN)
        self.out = Dense(d_model, d_model, key=out_key, gain=SMALL_GAIN)

    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
        return self.out(jax.nn.gelu(self.hidden(x)))
