"""What an agent sees as an image, as features: by convolutions, or by scans along its cells."""

import operator
from dataclasses import replace
from functools import reduce

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float, Key, Shaped

from mam.config import NetworkConfig
from mam.networks.layers import HIDDEN_GAIN, Dense, LayerNorm, RMSNorm, gelu
from mam.networks.mixers.mamba import SelectiveSSM
from mam.networks.mixers.roles import AbstractSSM, with_small_output

SMALL_IMAGE = 8  # rows and columns an image is reduced to, at most
# Of the cells: column by column in place of row by row, and whether from the last to the first.
ORDERS = ((False, False), (False, True), (True, False), (True, True))


class Conv(eqx.Module):
    """A 3 × 3 convolution with bias; `stride` 2 halves rows and columns."""

    weight: Float[Array, "3 3 I O"]
    bias: Float[Array, "O"]
    stride: int = eqx.field(static=True)

    def __init__(self, in_dim: int, out_dim: int, stride: int, *, key: Key[Array, ""]):
        self.weight = initializers.orthogonal(HIDDEN_GAIN)(key, (9 * in_dim, out_dim)).reshape(
            3, 3, in_dim, out_dim
        )
        self.bias = jnp.zeros(out_dim)
        self.stride = stride

    def __call__(self, x: Float[Array, "batch Y X I"]) -> Float[Array, "batch Y2 X2 O"]:
        strides = (self.stride, self.stride)
        y = lax.conv_general_dilated(
            x, self.weight, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + self.bias


class ConvEncoder(eqx.Module):
    """Convolutions until an image has at most 8 × 8 cells, each followed by a GELU; then flat.

    The first has `config.image_width` channels, the others, which halve the image, twice as many.
    """

    layers: tuple[Conv, ...]

    def __init__(self, shape: tuple[int, int, int], config: NetworkConfig, *, key: Key[Array, ""]):
        rows, columns, channels = shape
        width = config.image_width
        layers = [Conv(channels, width, 1, key=key)]
        while len(layers) == 1 or max(rows, columns) > SMALL_IMAGE:
            rows, columns = -(-rows // 2), -(-columns // 2)
            in_dim, own_key = layers[-1].bias.shape[0], jax.random.fold_in(key, len(layers))
            layers.append(Conv(in_dim, 2 * width, 2, key=own_key))
        self.layers = tuple(layers)

    def __call__(self, grid: Shaped[Array, "*batch Y X C"]) -> Float[Array, "*batch F"]:
        x = _standardised(grid)
        for layer in self.layers:
            x = gelu(layer(x))
        return x.reshape(*grid.shape[:-3], -1)


class ScanEncoder(eqx.Module):
    """Patches, mixed along rows and along columns, each in both directions; then flat.

        x = GELU(Dense(patch));  u = RMSNorm(x);  out = LN(x + Σ_k SSM_k(u in order k))

    An image of more than 8 × 8 cells is cut into at most as many square patches. The orders run
    through all of it, row by row or column by column. Each has Mamba's block with weights of its
    own, so that what is on the left differs from what is on the right, or above.

    Source: the cross-scan of VMamba (arXiv 2401.10166), §4.2. Differences: whole blocks for each
    order, where theirs share projections; a single layer, in which mixing starts small.
    """

    embed: Dense
    pre_norm: RMSNorm
    scans: tuple[AbstractSSM, ...]  # one for each of `ORDERS`
    post_norm: LayerNorm
    side: int = eqx.field(static=True)  # rows and columns of a patch

    def __init__(self, shape: tuple[int, int, int], config: NetworkConfig, *, key: Key[Array, ""]):
        rows, columns, channels = shape
        width = config.image_width
        embed_key, *keys = jax.random.split(key, 1 + len(ORDERS))
        self.side = -(-max(rows, columns) // SMALL_IMAGE)
        self.embed = Dense(self.side**2 * channels, width, key=embed_key, gain=HIDDEN_GAIN)
        # As wide inside as outside: what a cell costs is most of what the encoder costs.
        sizes = replace(config, d_model=width, expand=1, dt_rank=None, head_dim=None)
        self.scans = tuple(with_small_output(SelectiveSSM(sizes, key=k)) for k in keys)
        self.pre_norm, self.post_norm = RMSNorm(width), LayerNorm(width)

    def __call__(self, grid: Shaped[Array, "*batch Y X C"]) -> Float[Array, "*batch F"]:
        x = gelu(self.embed(_patches(_standardised(grid), self.side)))
        u = self.pre_norm(x)
        passes = (_scan(ssm, u, *order) for ssm, order in zip(self.scans, ORDERS, strict=True))
        mixed = reduce(operator.add, passes)
        return self.post_norm(x, mixed).reshape(*grid.shape[:-3], -1)


def _scan(
    ssm: AbstractSSM, u: Float[Array, "M Y X E"], by_column: bool, reverse: bool
) -> Float[Array, "M Y X E"]:
    """Return what a block makes of all cells in one order."""
    u = jnp.swapaxes(u, 1, 2) if by_column else u
    cells = ssm.project(u.reshape(u.shape[0], -1, u.shape[-1]))
    y = ssm.out_proj(ssm.unroll(None, cells, None, None, reverse=reverse)[1]).reshape(u.shape)
    return jnp.swapaxes(y, 1, 2) if by_column else y


def _standardised(grid: Shaped[Array, "*batch Y X C"]) -> Float[Array, "M Y X C"]:
    """Return images of zero mean and unit variance, whatever their numbers mean, in a row."""
    x = grid.reshape(-1, *grid.shape[-3:]).astype(jnp.float32)
    x = x - x.mean(axis=(1, 2, 3), keepdims=True)
    return x * lax.rsqrt(jnp.square(x).mean(axis=(1, 2, 3), keepdims=True) + 1e-6)


def _patches(x: Float[Array, "M Y X C"], side: int) -> Float[Array, "M Y2 X2 F"]:
    """Return squares of side × side cells as features, with zeros beyond the edge."""
    m, rows, columns, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, -rows % side), (0, -columns % side), (0, 0)))
    x = x.reshape(m, -(-rows // side), side, -(-columns // side), side, channels)
    return x.swapaxes(2, 3).reshape(m, x.shape[1], x.shape[3], -1)


IMAGE_ENCODERS = {"cnn": ConvEncoder, "scan2d": ScanEncoder}
