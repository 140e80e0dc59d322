"""SiLU of a causal depthwise convolution on CPU, forward and backward, by the package `mam_native`.

One pass over the inputs each way, which are all that is kept for the gradient.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mam.kernels.native.library import block_sums, call, num_blocks

MAX_TAPS = 4  # kMaxTaps in native/src/cpp/kernels.h


def native_conv_supports(x: Array, weight: Array) -> bool:
    """Say whether `native_conv_silu` takes x and weight [taps, F]: float32, and at most 4 taps."""
    return x.dtype == weight.dtype == jnp.float32 and weight.shape[0] <= MAX_TAPS


def native_conv_silu(
    x: Float[Array, "*batch N F"],
    weight: Float[Array, "K F"],
    bias: Float[Array, "F"],
    reset: Bool[Array, "*batch N"] | None = None,
    *,
    reverse: bool,
) -> Float[Array, "*batch N F"]:
    """Return SiLU(bias + Σ_k weight[K − 1 − k] x_{i−k}), the causal depthwise convolution.

    Args:
        x: inputs x_i; zeros before the first agent.
        weight: K taps per channel, the last for the agent itself.
        bias: one per channel.
        reset: True where agents before agent i count as zeros (None: nowhere).
        reverse: read x_{i+k}, and zeros after the last agent.
    """
    rows, n = math.prod(x.shape[:-2]), x.shape[-2]
    reset = None if reset is None else reset.reshape(rows, n)
    return _conv_silu(reverse, x.reshape(rows, *x.shape[-2:]), weight, bias, reset).reshape(x.shape)


def _primal(reverse: bool, x: Array, weight: Array, bias: Array, reset: Array | None) -> Array:
    arguments = x, weight, bias, reset
    return call("mam_native_conv", [x.shape], *arguments, blocks=num_blocks(x), reverse=reverse)[0]


def _conv_silu_fwd(reverse, x, weight, bias, reset):
    return _primal(reverse, x, weight, bias, reset), (x, weight, bias, reset)


def _conv_silu_bwd(reverse, inputs, gy):
    x, *weights, _ = inputs
    shapes = x.shape, *(block_sums(x, v) for v in weights)
    grads = call(
        "mam_native_conv_backward", shapes, *inputs, gy, blocks=num_blocks(x), reverse=reverse
    )
    gx, g_weight, g_bias = grads
    return gx, g_weight.sum(axis=0), g_bias.sum(axis=0), None


_conv_silu = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_conv_silu.defvjp(_conv_silu_fwd, _conv_silu_bwd)
