"""The decode kernel against the loop it stands for, interpreted on the CPU; and its lowering for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from mam.config import NetworkConfig
from mam.networks.actions import Categorical, make_action_kind
from mam.networks.decode import Ahead, Decoding, decide
from mam.networks.decoder import Decoder
from mam.networks.kernels.decode import Tiling, decode_kernel, default_tiling, kernel_supports
from mam.networks.kernels.decode_columns import Columns
from mam.networks.kernels.decode_programs import Plan
from mam.networks.mixers import LETTERS
from mam.networks.mixers.ssm import step_size
from mam.types import EnvSpec

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # less time compiling
IGNORE_DEPRECATION = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # JAX 0.11
GPU = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100", 132, "gpu"))
SIZES = NetworkConfig(d_model=16, d_state=4, head_dim=16)
FAST = NetworkConfig(d_model=64, d_state=16)


def make_spec(num_actions, continuous=False):
    return EnvSpec("suite/task", 3, 5, num_actions, time_limit=None, continuous=continuous)


def make_shapes(letters, sizes, num_actions=5, continuous=False, cross=None):
    layout, cross_layout = ([LETTERS[letter] for letter in names] for names in (letters, cross or letters))
    spec = make_spec(num_actions, continuous)
    return jax.eval_shape(lambda key: Decoder(spec, layout, cross_layout, sizes, key=key), jax.random.key(0))


def make_decoder(letters, sizes, num_actions=5, seed=0):
    """Large random parameters: under the initial ones agents hardly heed another."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        spread = 1.5 * leaf.shape[0] ** -0.5 if leaf.ndim > 1 and path[-1].name != "A_log" else 0.4
        return jnp.asarray(rng.normal(path[-1].name == "scale", spread, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, make_shapes(letters, sizes, num_actions))


def make_inputs(sizes, num_agents, num_actions, batch, seed=0):
    """Observation representations, masks and noise; some agents have no legal action at all."""
    rng = np.random.default_rng(seed)
    mask = rng.random((*batch, num_agents, num_actions)) < 0.7
    obs_rep = rng.normal(size=(*batch, num_agents, sizes.d_model))
    return jnp.asarray(obs_rep, jnp.float32), jnp.asarray(mask), jnp.asarray(rng.gumbel(size=mask.shape), jnp.float32)


def look_ahead(decoder, obs_rep, mask, noise):
    return Ahead(context=decoder.read(obs_rep), mask=mask, noise=noise)


@functools.partial(jax.jit, compiler_options=QUICK)
def loop(decoder, obs_rep, mask, noise):
    decision = decide(decoder, Categorical(), look_ahead(decoder, obs_rep, mask, noise), Decoding())
    return decision.action, decision.out


@functools.partial(jax.jit, static_argnames=("dtype", "tiling"), compiler_options=QUICK)
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
    np.testing.assert_allclose(out, expected_out, rtol=1e-5, atol=1e-5)
    assert num_agents == 1 or np.std(out) > 0.5
