"""The decode kernel against its loop, interpreted on the CPU; and its lowering for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from mam.config import NetworkConfig
from mam.networks.actions import Categorical, MultiCategorical, TanhNormal
from mam.networks.decoder import Decoder
from mam.networks.decoding.cuda import Tiling, decode_kernel, kernel_supports
from mam.networks.decoding.decide import DecodeInputs, Decoding, decide
from mam.networks.mixers.registry import families_of

IGNORE_DEPRECATION = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated"
)  # JAX 0.11
GPU = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100", 132, "gpu"))
SIZES = NetworkConfig(d_model=16, d_state=4, head_dim=16)
FAST = NetworkConfig(d_model=64, d_state=16)


DECLINED = pytest.mark.parametrize(
    ("letters", "sizes", "distribution"),
    [
        *((letters, SIZES, Categorical(5)) for letters in ("A", "MA")),
        ("M", NetworkConfig(d_model=24), Categorical(5)),
        *(("M", SIZES, distribution) for distribution in (TanhNormal(5), MultiCategorical((3, 2)))),
    ],
)


def make_shapes(letters, sizes, distribution=Categorical(5), cross=None):  # noqa: B008 (frozen)
    layout, cross_layout = (families_of(names, "layout") for names in (letters, cross or letters))
    return jax.eval_shape(
        lambda key: Decoder(distribution, layout, cross_layout, sizes, key=key), jax.random.key(0)
    )


def make_decoder(letters, sizes, num_actions=5, seed=0):
    """Large random parameters: under the initial ones agents hardly heed another."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        spread = 1.5 * leaf.shape[0] ** -0.5 if leaf.ndim > 1 and path[-1].name != "A_log" else 0.4
        return jnp.asarray(rng.normal(path[-1].name == "scale", spread, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(
        draw, make_shapes(letters, sizes, Categorical(num_actions))
    )


def make_inputs(sizes, num_agents, num_actions, batch, seed=0):
    """Observation representations, masks and noise; some agents have no legal action at all."""
    rng = np.random.default_rng(seed)
    mask = rng.random((*batch, num_agents, num_actions)) < 0.7
    obs_rep = rng.normal(size=(*batch, num_agents, sizes.d_model))
    return (
        jnp.asarray(obs_rep, jnp.float32),
        jnp.asarray(mask),
        jnp.asarray(rng.gumbel(size=mask.shape), jnp.float32),
    )


def look_ahead(decoder, obs_rep, mask, noise):
    return DecodeInputs(context=decoder.read(obs_rep), mask=mask, noise=noise)


@jax.jit
def loop(decoder, obs_rep, mask, noise):
    decision = decide(
        decoder, Categorical(noise.shape[-1]), look_ahead(decoder, obs_rep, mask, noise), Decoding()
    )
    return decision.action, decision.out


@functools.partial(jax.jit, static_argnames=("dtype", "tiling"))
def kernel(decoder, obs_rep, mask, noise, *, dtype=jnp.float32, tiling=None):
    ahead = look_ahead(decoder, obs_rep, mask, noise)
    return decode_kernel(decoder, ahead, operand_dtype=dtype, interpret=True, tiling=tiling)


@pytest.mark.parametrize(
    ("letters", "sizes", "num_agents", "num_actions", "batch", "num_envs"),
    [
        ("M", SIZES, 17, 5, (21,), 1),
        ("2", SIZES, 17, 5, (21,), 2),
        ("M", SIZES, 1, 1, (3,), 4),
        ("2", SIZES, 3, 17, (43, 3), 8),
        ("MM", SIZES, 5, 3, (2, 3), 4),
        ("22", SIZES, 5, 3, (), 2),
        ("M2", NetworkConfig(d_model=32, d_state=32, d_conv=1, dt_rank=20), 3, 16, (2,), 2),
    ],
)
def test_equals_the_loop(letters, sizes, num_agents, num_actions, batch, num_envs):
    decoder = make_decoder(letters, sizes, num_actions)
    inputs = make_inputs(sizes, num_agents, num_actions, batch)
    action, out = kernel(decoder, *inputs, tiling=Tiling(num_envs, 4))
    expected_action, expected_out = loop(decoder, *inputs)
    assert action.dtype == jnp.int32
    np.testing.assert_array_equal(action, expected_action)
    np.testing.assert_array_equal(
        action, Categorical(num_actions).sample_from_noise(out, *inputs[1:])
    )
    np.testing.assert_allclose(
        out, expected_out, rtol=1e-4, atol=1e-4
    )  # rounding, over all agents before
    assert num_agents == 1 or np.std(out) > 0.5


def test_half_precision_operands_move_log_probabilities_little():
    decoder = make_decoder("M", SIZES)
    inputs = make_inputs(SIZES, 9, 5, (40,))
    _, exact = kernel(decoder, *inputs)
    action, out = kernel(decoder, *inputs, dtype=jnp.float16)
    same = np.cumprod(
        np.asarray(action == kernel(decoder, *inputs)[0]), axis=-1
    )  # until the first other decision
    assert same.mean() > 0.95
    assert np.mean(np.abs(out - exact)[same == 1]) < 5e-3


def test_seeds_side_by_side():
    decoders = [make_decoder("2", SIZES, seed=k) for k in (0, 1)]
    inputs = [make_inputs(SIZES, 3, 5, (5,), seed=k) for k in (0, 1)]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *zip(decoders, inputs, strict=True))
    one = kernel.__wrapped__
    together = jax.jit(jax.vmap(lambda decoder, inputs: one(decoder, *inputs)))(*stacked)
    for k, (decoder, args) in enumerate(zip(decoders, inputs, strict=True)):
        for actual, expected in zip(together, loop(decoder, *args), strict=True):
            np.testing.assert_allclose(actual[k], expected, rtol=1e-4, atol=1e-4)


@IGNORE_DEPRECATION
@pytest.mark.parametrize(
    ("letters", "sizes", "num_agents", "batch"),
    [
        ("M", FAST, 4, 64),
        ("2", FAST, 128, 512),
        ("22", NetworkConfig(d_model=32, d_state=16), 32, 64),
        ("M", NetworkConfig(d_model=128, d_state=32, dt_rank=128), 32, 64),  # the published size
    ],
)
def test_lowers_for_a_gpu(letters, sizes, num_agents, batch):
    decoder = make_shapes(letters, sizes)
    shape = (batch, num_agents)
    floats = [jax.ShapeDtypeStruct((*shape, size), jnp.float32) for size in (sizes.d_model, 5)]
    mask = jax.ShapeDtypeStruct((*shape, 5), bool)

    def run(decoder, obs_rep, mask, noise):
        return decode_kernel(decoder, look_ahead(decoder, obs_rep, mask, noise))

    with use_abstract_mesh(GPU):
        text = (
            jax.jit(run)
            .trace(decoder, floats[0], mask, floats[1])
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )
    assert "triton" in text


@DECLINED
def test_what_it_does_not_take(letters, sizes, distribution):
    assert not kernel_supports(make_shapes(letters, sizes, distribution))
    assert kernel_supports(make_shapes("M", FAST))
