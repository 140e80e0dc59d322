"""Dense layers, norms and the MLP, for any number of leading axes.

Activations have the type of the input, whatever the type of the parameters; norms compute in
float32 or wider.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float, Int, Key, PyTree

from mam.kernels.dense import dense
from mam.kernels.native.library import named
from mam.kernels.norm import normalise

HIDDEN_GAIN = 2**0.5  # orthogonal gain before a GELU
SMALL_GAIN = 0.01  # of layers whose output should start near zero
# Of what mixers and memories add: early learning is that of agents by themselves.
MIXED_GAIN = 0.1

gelu = named(jax.nn.gelu)


class Dense(eqx.Module):
    """y = x W + b."""

    weight: Float[Array, "I O"]
    bias: Float[Array, "O"] | None

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        key: Key[Array, ""],
        gain: float | None = None,
        bias: bool = True,
    ):
        """Draw the weights; the bias starts at zero.

        Args:
            in_dim: I.
            out_dim: O.
            key: of the weights.
            gain: of orthogonal weights; None for LeCun-normal ones.
            bias: whether there is one.
        """
        init = initializers.lecun_normal() if gain is None else initializers.orthogonal(gain)
        self.weight = init(key, (in_dim, out_dim), jnp.float32)
        self.bias = jnp.zeros(out_dim) if bias else None

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        return dense(x, self.weight, self.bias)


class LayerNorm(eqx.Module):
    """Zero mean and unit variance over the last axis, then scale and offset; of x + residual."""

    scale: Float[Array, "E"]
    offset: Float[Array, "E"]
    eps: float = eqx.field(static=True)

    def __init__(self, dim: int, *, scale: float = 1.0, eps: float = 1e-6):
        self.scale, self.offset, self.eps = scale * jnp.ones(dim), jnp.zeros(dim), eps

    def __call__(
        self, x: Float[Array, "*batch E"], residual: Float[Array, "*batch E"] | None = None
    ) -> Float[Array, "*batch E"]:
        return normalise(x, self.scale, self.offset, eps=self.eps, residual=residual)


def activate(x: Float[Array, "*batch E"], norm: LayerNorm | None) -> Float[Array, "*batch E"]:
    """Return what a hidden layer makes of its product: LN(GELU(x)), or ReLU(x) without a norm."""
    return jax.nn.relu(x) if norm is None else norm(gelu(x))


class RMSNorm(eqx.Module):
    """Unit root mean square over the last axis, then scale."""

    scale: Float[Array, "E"]
    eps: float = eqx.field(static=True)

    def __init__(self, dim: int, eps: float = 1e-6):
        self.scale, self.eps = jnp.ones(dim), eps

    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
        return normalise(x, self.scale, eps=self.eps)

    def inverse(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch 1"]:
        """Return what x is multiplied by, besides the scale."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)


@jax.custom_vjp
def lookup(
    table: PyTree[Float[Array, "K ..."]], index: Int[Array, "..."]
) -> PyTree[Float[Array, "..."]]:
    """Return rows of every array of a small table.

    The gradient is a product with one-hot rows instead of a scatter.

    Args:
        table: arrays with K rows each.
        index: of the rows, from 0 to K − 1.
    """
    return jax.tree.map(lambda v: v[index], table)


def _lookup_fwd(table, index):
    return lookup(table, index), (
        index,
        jax.tree.map(lambda v: jnp.zeros(v.shape[:1], v.dtype), table),
    )


def _lookup_bwd(residuals, grads):
    index, like = residuals

    def rows(g, like):
        one_hot = jax.nn.one_hot(index.reshape(-1), like.shape[0], dtype=g.dtype, axis=0)
        shape = g.shape[index.ndim :]
        total = jnp.dot(one_hot, g.reshape(index.size, -1), precision=lax.Precision.HIGHEST)
        return total.reshape(like.shape[0], *shape).astype(like.dtype)

    return jax.tree.map(rows, grads, like), None


lookup.defvjp(_lookup_fwd, _lookup_bwd)


class MLP(eqx.Module):
    """Dense → GELU → Dense, all of the same width; the output starts near zero (MAT, §3)."""

    hidden: Dense
    out: Dense

    def __init__(self, d_model: int, *, key: Key[Array, ""]):
        hidden_key, out_key = jax.random.split(key)
        self.hidden = Dense(d_model, d_model, key=hidden_key, gain=HIDDEN_GAIN)
        self.out = Dense(d_model, d_model, key=out_key, gain=SMALL_GAIN)

    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
        return self.out(gelu(self.hidden(x)))
