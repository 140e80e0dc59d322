"""LayerNorm and RMSNorm on CPU, forward and backward, by the package `mam_native`.

One pass over memory each way. Inputs are all that is kept for the gradient; the moments are
computed again.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mam.kernels.native.library import LANES, block_sums, call, num_blocks


def native_norm_supports(x: Array, *others: Array | None) -> bool:
    """Say whether `native_norm` takes these: all float32, and rows of x a multiple of 16."""
    return x.shape[-1] % LANES == 0 and all(
        v is None or v.dtype == jnp.float32 for v in (x, *others)
    )


def native_norm(
    x: Float[Array, "*batch E"],
    plus: Float[Array, "*batch E"] | None,
    scale: Float[Array, "E"],
    offset: Float[Array, "E"] | None,
    *,
    eps: float,
) -> Float[Array, "*batch E"]:
    """Normalise x, or x + plus, over the last axis: LayerNorm if there is an offset, else RMSNorm.

    Args:
        x: activations.
        plus: residual, added to x first (None: nothing).
        scale: multiplies the normalised rows.
        offset: added then; None for RMSNorm.
        eps: added to the variance.
    """
    rows = [None if v is None else v.reshape(-1, v.shape[-1]) for v in (x, plus)]
    return _norm(eps, *rows, scale, offset).reshape(x.shape)


def _primal(eps: float, x: Array, plus: Array | None, scale: Array, offset: Array | None) -> Array:
    return _call("mam_native_norm", eps, [x.shape], x, plus, scale, offset)[0]


def _norm_fwd(eps, x, plus, scale, offset):
    return _primal(eps, x, plus, scale, offset), (x, plus, scale, offset)


def _norm_bwd(eps, inputs, gy):
    x, plus, scale, offset = inputs
    shapes = x.shape, *(block_sums(x, v) for v in (scale, offset))
    gx, g_scale, g_offset = _call("mam_native_norm_backward", eps, shapes, *inputs, gy)
    return (
        gx,
        None if plus is None else gx,
        g_scale.sum(axis=0),
        None if offset is None else g_offset.sum(axis=0),
    )


_norm = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_norm.defvjp(_norm_fwd, _norm_bwd)


def _call(name: str, eps: float, shapes: Any, x: Array, *others: Array | None) -> Any:
    return call(name, shapes, x, *others, blocks=num_blocks(x), eps=np.float32(eps))
