"""Images of any size and type become features: convolutions and scans along cells, in NumPy."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import NetworkConfig
from mam.networks.images import IMAGE_ENCODERS, Conv, ConvEncoder, ScanEncoder

SIZES = NetworkConfig(d_state=2)
call = jax.jit(lambda layer, x: layer(x))
every_encoder = pytest.mark.parametrize("make", IMAGE_ENCODERS.values(), ids=IMAGE_ENCODERS)


@functools.cache
def randomise(build, *args):
    """The layer with random parameters, none of them zero."""
    empty = jax.eval_shape(lambda key: build(*args, key=key), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.0, 0.5, leaf.shape), leaf.dtype), empty
    )


@pytest.mark.parametrize(
    ("shape", "num_layers", "features"),
    [
        ((1, 1, 1), 2, 32),
        ((8, 8, 3), 2, 4 * 4 * 32),
        ((9, 4, 2), 2, 5 * 2 * 32),
        ((17, 9, 1), 3, 5 * 3 * 32),
        ((40, 64, 4), 4, 5 * 8 * 32),
    ],
)
def test_convolutions_halve_images_until_they_are_small(shape, num_layers, features):
    net = randomise(ConvEncoder, shape, SIZES)
    assert len(net.layers) == num_layers
    grid = jax.ShapeDtypeStruct((2, 3, *shape), jnp.uint8)
    assert jax.eval_shape(net, grid).shape == (2, 3, features)


@pytest.mark.parametrize(
    ("shape", "side", "tokens"),
    [
        ((1, 1, 1), 1, 1),
        ((8, 8, 3), 1, 8 * 8),
        ((9, 4, 2), 2, 5 * 2),
        ((17, 9, 1), 3, 6 * 3),
        ((40, 64, 4), 8, 5 * 8),
    ],
)
def test_patches_are_as_small_as_few_of_them_allow(shape, side, tokens):
    net = randomise(ScanEncoder, shape, NetworkConfig(image_width=4))
    assert net.side == side
    grid = jax.ShapeDtypeStruct((2, 3, *shape), jnp.uint8)
    assert jax.eval_shape(net, grid).shape == (2, 3, 4 * tokens)


@every_encoder
def test_images_of_any_type_and_scale_look_the_same(make):
    """Booleans, bytes, integers and floats; brighter and with more contrast."""
    net = randomise(make, (6, 7, 2), SIZES)
    image = np.random.default_rng(3).integers(0, 2, (3, 6, 7, 2))
    expected = call(net, image.astype(np.float32))
    assert np.std(expected) > 0.1
    for dtype in (bool, np.uint8, np.int32, np.int8):
        np.testing.assert_array_equal(call(net, image.astype(dtype)), expected)
    np.testing.assert_allclose(
        call(net, (200 * image + 50).astype(np.uint8)), expected, rtol=1e-3, atol=1e-3
    )


@every_encoder
@pytest.mark.parametrize("value", [0, 1, 255])
def test_a_blank_image_is_no_accident(make, value):
    net = randomise(make, (4, 4, 1), SIZES)
    grid = np.full((1, 4, 4, 1), value, np.float32)
    out, gradient = value_and_gradient(net, grid)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((out, gradient)))


value_and_gradient = jax.jit(jax.value_and_grad(lambda net, x: net(x).sum(), (0, 1)))


def test_scans_go_along_rows_and_columns_both_ways():
    """Each block reads the cells of its own list, from the first to the last, in NumPy's order.

    Patches of 2 × 2 cells, with zeros where the image ends within one.
    """
    shape = (9, 6, 2)
    net = randomise(ScanEncoder, shape, NetworkConfig(d_state=2, image_width=4))
    image = np.random.default_rng(1).normal(size=(3, *shape)).astype(np.float32)

    x = np.asarray(image, np.float64)
    x -= x.mean(axis=(1, 2, 3), keepdims=True)
    x /= np.sqrt(x.var(axis=(1, 2, 3), keepdims=True) + 1e-6)
    x = np.concatenate([x, np.zeros((3, 1, 6, 2))], axis=1)
    tokens = [
        x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(3, -1) for i, j in np.ndindex(5, 3)
    ]
    x = np.asarray(jax.nn.gelu(np.stack(tokens, axis=1) @ net.embed.weight + net.embed.bias))
    u = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6) * net.pre_norm.scale

    by_row = np.arange(15)
    by_column = by_row.reshape(5, 3).T.ravel()
    mixed = np.zeros_like(x)
    for ssm, cells in zip(
        net.scans, (by_row, by_row[::-1], by_column, by_column[::-1]), strict=True
    ):
        mixed[:, cells] += ssm.out_proj(forwards(ssm, u[:, cells]))
    x = x + mixed
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    expected = x * net.post_norm.scale + net.post_norm.offset
    assert np.std(mixed) > 0.1
    np.testing.assert_allclose(call(net, image), expected.reshape(3, -1), rtol=1e-3, atol=1e-4)


@jax.jit
def forwards(ssm, cells):
    return ssm.unroll(None, ssm.project(cells), None, None)[1]


def test_every_cell_reaches_every_other_and_no_direction_is_like_another():
    """Flipping or turning an image is more than flipping or turning what comes of it."""
    net = randomise(ScanEncoder, (4, 4, 1), SIZES)
    image = np.random.default_rng(2).normal(size=(1, 4, 4, 1)).astype(np.float32)
    reaches = jax.jit(jax.jacobian(lambda image: net(image).reshape(16, -1).sum(axis=1)))(image)
    assert np.all(np.abs(reaches.reshape(16, 16)) > 0)
    cells = call(net, image).reshape(4, 4, -1)
    for turn in (np.flipud, np.fliplr, np.rot90, lambda x: np.swapaxes(x, 0, 1)):
        turned = call(net, turn(image[0])[None]).reshape(4, 4, -1)
        assert np.abs(turned - turn(np.asarray(cells))).max() > 0.1


def test_what_scans_add_starts_small():
    net = jax.jit(lambda key: ScanEncoder((6, 6, 3), SIZES, key=key))(jax.random.key(0))
    image = np.random.default_rng(2).normal(size=(4, 6, 6, 3)).astype(np.float32)
    alone = eqx.tree_at(lambda net: net.scans, net, jax.tree.map(jnp.zeros_like, net.scans))
    expected = call(alone, image)
    changed = np.abs(call(net, image) - expected)
    assert 0 < changed.mean() < 0.3 * np.abs(expected).mean()


@pytest.mark.parametrize(("stride", "rows", "columns"), [(1, 4, 5), (2, 4, 5), (2, 1, 2)])
def test_a_convolution_is_a_sum_over_neighbours(stride, rows, columns):
    """Zeros surround the image.

    With stride 2 and an even number of rows the first row is a centre's upper neighbour. That is
    how SAME padding deals an odd number of zeros: the extra one comes last.
    """
    conv = randomise(lambda key: Conv(2, 3, stride, key=key))
    x = np.random.default_rng(4).normal(size=(2, rows, columns, 2)).astype(np.float32)
    out_shape = tuple(-(-size // stride) for size in (rows, columns))
    before = [
        max((out - 1) * stride + 3 - size, 0) // 2
        for out, size in zip(out_shape, (rows, columns), strict=True)
    ]
    padded = np.pad(x, [(0, 0), *((low, 3) for low in before), (0, 0)])
    expected = np.zeros((2, *out_shape, 3))
    for i, j in np.ndindex(*out_shape):
        window = padded[:, stride * i : stride * i + 3, stride * j : stride * j + 3]
        expected[:, i, j] = np.einsum("byxi,yxio->bo", window, conv.weight) + conv.bias
    np.testing.assert_allclose(call(conv, x), expected, rtol=1e-4, atol=1e-5)
