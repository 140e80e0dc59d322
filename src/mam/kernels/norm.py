"""Normalisation over the last axis: LayerNorm and RMSNorm, on CPU by the native kernels if any."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mam.kernels.native.library import by_platform, named, use_native
from mam.kernels.native.norm import native_norm, native_norm_supports


def normalise(
    x: Float[Array, "*batch E"],
    scale: Float[Array, "E"],
    offset: Float[Array, "E"] | None = None,
    *,
    eps: float,
    residual: Float[Array, "*batch E"] | None = None,
) -> Float[Array, "*batch E"]:
    """Divide rows by their deviation, from their mean if there is an offset and from zero if not.

    Args:
        x: activations; the result has their type and is computed in float32 or wider.
        scale: multiplies the normalised rows.
        offset: added then (LayerNorm); None for RMSNorm.
        eps: added to the variance.
        residual: added to x first.
    """
    if use_native() and native_norm_supports(x, residual, scale, offset):
        return native_norm(x, residual, scale, offset, eps=eps)
    return normalised_rows(x if residual is None else x + residual, scale, offset, eps)


@named
def normalised_rows(x, scale, offset, eps):
    """Normalise the last axis, in plain JAX.

    Args:
        x: as in `normalise`, as are the others; there is no residual.
        scale: multiplies the normalised rows.
        offset: added then, or None.
        eps: added to the variance.
    """
    return _rows(x.reshape(-1, x.shape[-1]), scale, offset, eps).reshape(x.shape).astype(x.dtype)


@jax.custom_vjp
def _rows(x: Array, scale: Array, offset: Array | None, eps: Array | float) -> Array:
    """Normalise rows [M, E], about their mean if there is an offset and about zero if not."""
    return _rows_fwd(x, scale, offset, eps)[0]


def _rows_fwd(x, scale, offset, eps):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide if offset is None else wide - _row_means(wide)
    inverse = lax.rsqrt(_row_means(jnp.square(centred)) + eps)
    normal = centred * inverse
    y = normal * scale
    return y if offset is None else y + offset, (
        normal,
        inverse,
        scale,
        offset,
        jnp.zeros((), x.dtype),
    )


def _rows_bwd(residuals, gy):
    normal, inverse, scale, offset, like = residuals
    g = gy * scale
    gx = g - normal * _row_means(g * normal)
    if offset is not None:
        gx -= _row_means(g)
    g_offset = None if offset is None else gy.sum(axis=0)
    return (gx * inverse).astype(like.dtype), (gy * normal).sum(axis=0), g_offset, None


_rows.defvjp(_rows_fwd, _rows_bwd)


def _row_means(x: Float[Array, "M E"]) -> Float[Array, "M 1"]:
    """Return means over the last axis; on CPU by a product, half the time of XLA's reduction."""
    return by_platform(x, cpu=_mean_product, default=partial(jnp.mean, axis=1, keepdims=True))


def _mean_product(x: Float[Array, "M E"]) -> Float[Array, "M 1"]:
    weight = jnp.full((x.shape[1], 1), 1 / x.shape[1], x.dtype)
    return jnp.dot(x, weight, precision=lax.Precision.HIGHEST)
