"""Dense layers, norms and the MLP: the plain parts every network is made of. Any number of leading axes.

Activations have the type of the input, whatever the type of the parameters; norms compute in float32 or wider.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float, Int, Key, PyTree

from mam.kernels.native.dense import native_product, native_product_supports
from mam.kernels.native.library import use_native
from mam.kernels.native.norm import native_norm, native_norm_supports

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
        y = _product(x.reshape(-1, x.shape[-1]), self.weight.astype(x.dtype))
        y = y.reshape(*x.shape[:-1], self.weight.shape[1])
        return y if self.bias is None else y + self.bias.astype(x.dtype)


def _product(x: Float[Array, "M I"], weight: Float[Array, "I O"]) -> Float[Array, "M O"]:
    return native_product(x, weight) if use_native() and native_product_supports(x, weight) else x @ weight


class LayerNorm(eqx.Module):
    """Zero mean and unit variance over the last axis, then scale and offset: of x, or of a residual stream x + plus."""

    scale: Float[Array, "E"]
    offset: Float[Array, "E"]
    eps: float = eqx.field(static=True)

    def __init__(self, dim: int, eps: float = 1e-6):
        self.scale, self.offset, self.eps = jnp.ones(dim), jnp.zeros(dim), eps

    def __call__(
        self, x: Float[Array, "*batch E"], plus: Float[Array, "*batch E"] | None = None
    ) -> Float[Array, "*batch E"]:
        return _norm(x, plus, self.scale, self.offset, self.eps)


class RMSNorm(eqx.Module):
    """Unit root mean square over the last axis, then scale."""

    scale: Float[Array, "E"]
    eps: float = eqx.field(static=True)

    def __init__(self, dim: int, eps: float = 1e-6):
        self.scale, self.eps = jnp.ones(dim), eps

    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
        return _norm(x, None, self.scale, None, self.eps)


def _norm(x: Array, plus: Array | None, scale: Array, offset: Array | None, eps: float) -> Array:
    """Natively on CPU, where that is installed and takes it."""

    def plain(x, plus, scale, offset):
        x = x if plus is None else x + plus
        return _normalise(x.reshape(-1, x.shape[-1]), scale, offset, eps).reshape(x.shape).astype(x.dtype)

    args = (x, plus, scale, offset)
    if not use_native() or not native_norm_supports(*args):
        return plain(*args)
    return lax.platform_dependent(*args, cpu=partial(native_norm, eps=eps), default=plain)


@jax.custom_vjp
def _normalise(x: Array, scale: Array, offset: Array | None, eps: Array | float) -> Array:
    """Rows [M, E] over their deviation, from their mean if there is an offset and from zero if not."""
    return _normalise_fwd(x, scale, offset, eps)[0]


def _normalise_fwd(x, scale, offset, eps):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide if offset is None else wide - _row_means(wide)
    inverse = lax.rsqrt(_row_means(jnp.square(centred)) + eps)
    normal = centred * inverse
    y = normal * scale
    return y if offset is None else y + offset, (normal, inverse, scale, offset, jnp.zeros((), x.dtype))


def _normalise_bwd(residuals, gy):
    normal, inverse, scale, offset, like = residuals
    g = gy * scale
    gx = g - normal * _row_means(g * normal)
    if offset is not None:
        gx -= _row_means(g)
    g_offset = None if offset is None else gy.sum(axis=0)
    return (gx * inverse).astype(like.dtype), (gy * normal).sum(axis=0), g_offset, None


_normalise.defvjp(_normalise_fwd, _normalise_bwd)


def _row_means(x: Float[Array, "M E"]) -> Float[Array, "M 1"]:
    """Means over the last axis. On CPU as a product with ones: XLA's reduction takes twice as long."""

    def product(x):
        return jnp.dot(x, jnp.full((x.shape[1], 1), 1 / x.shape[1], x.dtype), precision=lax.Precision.HIGHEST)

    return lax.platform_dependent(x, cpu=product, default=lambda x: jnp.mean(x, axis=1, keepdims=True))


@jax.custom_vjp
def lookup(table: PyTree[Float[Array, "K ..."]], index: Int[Array, "..."]) -> PyTree[Float[Array, "..."]]:
    """Rows of every array of a small table; its gradient is a product with one-hot rows instead of a scatter."""
    return jax.tree.map(lambda v: v[index], table)


def _lookup_fwd(table, index):
    return lookup(table, index), (index, jax.tree.map(lambda v: jnp.zeros(v.shape[:1], v.dtype), table))


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
        return self.out(jax.nn.gelu(self.hidden(x)))
