"""SiLU of a causal depthwise convolution on CPU, forward and backward, by the package `mam_native`.

One pass over the inputs each way, which are all that is kept for the gradient.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mam.networks.kernels.native import library

MAX_BLOCKS = 32  # of sequences: each has its own sums for the weights' gradients
MAX_TAPS = 4  # kMaxTaps in native/src/cpp/kernels.h


def native_conv_supports(x: Array, weight: Array) -> bool:
    """Whether `native_conv_silu` takes these: float32, and at most 4 taps."""
    return x.dtype == weight.dtype == jnp.float32 and weight.shape[0] <= MAX_TAPS


def native_conv_silu(
    x: Float[Array, "*batch N F"], weight: Float[Array, "K F"], bias: Float[Array, "F"]
) -> Float[Array, "*batch N F"]:
    """SiLU(bias + Σ_k weight[K − 1 − k] x_{i−k}), zeros before the first agent."""
    *batch, n, features = x.shape
    return _conv_silu(x.reshape(math.prod(batch), n, features), weight, bias).reshape(x.shape)


@jax.custom_vjp
def _conv_silu(x, weight, bias):
    return _call("mam_native_conv", x.shape, arguments=(x, weight, bias))[0]


def _conv_silu_fwd(x, weight, bias):
    return _conv_silu(x, weight, bias), (x, weight, bias)


def _conv_silu_bwd(residuals, gy):
    x, weight, bias = residuals
    blocks = _blocks(x)
    shapes = x.shape, (blocks, *weight.shape), (blocks, *bias.shape)
    gx, g_weight, g_bias = _call("mam_native_conv_backward", *shapes, arguments=(x, weight, bias, gy))
    return gx, jnp.sum(g_weight, axis=0), jnp.sum(g_bias, axis=0)


_conv_silu.defvjp(_conv_silu_fwd, _conv_silu_bwd)


def _blocks(x: Array) -> int:
    return min(x.shape[0], MAX_BLOCKS)


def _call(name: str, *shapes: tuple[int, ...], arguments: tuple[Array, ...]) -> Any:
    library()
    outputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    call = jax.ffi.ffi_call(name, outputs, vmap_method="broadcast_all")
    return call(*arguments, blocks=np.int64(_blocks(arguments[0])))
