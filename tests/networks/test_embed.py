"""What an agent sees becomes a vector: features against NumPy, the dead as zeros."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import NetworkConfig
from mam.networks.embed import ObservationEmbedding
from mam.types import EnvSpec, Observation

B, N, E, OBS_DIM = 2, 4, 8, 5
ALIVE = np.array([[True, False, True, False], [False, True, True, True]])
call = jax.jit(lambda layer, x: layer(x))
kinds_of_view = pytest.mark.parametrize(
    ("obs_dim", "grid_shape", "image"),
    [
        (OBS_DIM, None, "cnn"),
        (OBS_DIM, (5, 6, 2), "cnn"),
        (0, (5, 6, 2), "cnn"),
        (0, (5, 6, 2), "scan2d"),
    ],
    ids=["features", "both", "grid", "scanned"],
)


def randomise(build, *args):
    """The layer with random parameters, none of them zero."""
    empty = jax.eval_shape(lambda key: build(*args, key=key), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.0, 0.5, leaf.shape), leaf.dtype), empty
    )


@functools.cache
def make_embedding(obs_dim, grid_shape, image="cnn", observation_norm="running"):
    spec = EnvSpec("suite/task", N, obs_dim, num_actions=3, time_limit=None, grid_shape=grid_shape)
    config = NetworkConfig(d_model=E, d_state=2, image=image, observation_norm=observation_norm)
    return randomise(ObservationEmbedding, spec, config)


def make_observation(obs_dim, grid_shape, batch=(B,)):
    rng = np.random.default_rng(1)
    shape = (*batch, N)
    return Observation(
        agents_view=rng.normal(size=(*shape, obs_dim)).astype(np.float32),
        action_mask=np.ones((*shape, 3), bool),
        alive=np.broadcast_to(ALIVE, shape),
        grid=None
        if grid_shape is None
        else rng.normal(size=(*shape, *grid_shape)).astype(np.float32),
    )


@pytest.mark.parametrize("observation_norm", ["running", "layer"])
def test_features_follow_the_formula(observation_norm):
    """LN(GELU(Dense(features))) of each agent, or LN(GELU(Dense(LN(features)))) as published."""
    embed = make_embedding(OBS_DIM, None, observation_norm=observation_norm)
    obs = make_observation(OBS_DIM, None)

    def norm(layer, x):
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6) * layer.scale + layer.offset

    x = np.where(ALIVE[..., None], obs.agents_view, 0.0)
    x = norm(embed.obs_norm, x) if observation_norm == "layer" else x
    x = norm(embed.norm, np.asarray(jax.nn.gelu(x @ embed.dense.weight + embed.dense.bias)))
    np.testing.assert_allclose(call(embed, obs), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("obs_dim", [1, 2])
def test_one_or_two_features_are_seen(obs_dim):
    """Also their level, which a norm over them would erase."""
    embed, obs = make_embedding(obs_dim, None), make_observation(obs_dim, None)
    higher = eqx.tree_at(lambda obs: obs.agents_view, obs, obs.agents_view + 1)
    moved = np.abs(call(embed, higher) - call(embed, obs)).max(axis=-1) > 1e-2
    np.testing.assert_array_equal(moved, ALIVE)


@kinds_of_view
@pytest.mark.parametrize("garbage", [1e30, np.nan, np.inf])
def test_what_dead_agents_see_goes_nowhere(obs_dim, grid_shape, image, garbage):
    """Neither into a value, the dead agents' own included, nor into a gradient."""
    embed, clean = make_embedding(obs_dim, grid_shape, image), make_observation(obs_dim, grid_shape)
    dirty = eqx.tree_at(
        lambda obs: (obs.agents_view, obs.grid),
        clean,
        (
            np.where(ALIVE[..., None], clean.agents_view, np.float32(garbage)),
            None
            if clean.grid is None
            else np.where(ALIVE[..., None, None, None], clean.grid, np.float32(garbage)),
        ),
        is_leaf=lambda x: x is None,
    )
    expected, actual = value_and_gradient(embed, clean), value_and_gradient(embed, dirty)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@jax.jit
def value_and_gradient(embed, obs):
    """The embedding, and the gradient of a random projection of it, dead agents' rows included."""
    projection = np.random.default_rng(2).normal(size=(B, N, E))

    def project(embed):
        x = embed(obs)
        return jnp.sum(projection * x), x

    return jax.grad(project, has_aux=True)(embed)


@kinds_of_view
def test_agents_and_environments_do_not_touch(obs_dim, grid_shape, image):
    """Leading axes are free, and each row of the result depends on its own row alone."""
    embed, obs = (
        make_embedding(obs_dim, grid_shape, image),
        make_observation(obs_dim, grid_shape, batch=(3, B)),
    )
    together = call(embed, obs)
    assert together.shape == (3, B, N, E)
    one = jax.tree.map(lambda x: x[1], obs)
    np.testing.assert_allclose(call(embed, one), together[1], rtol=1e-5, atol=1e-5)
    for part in ["agents_view"] * bool(obs_dim) + ["grid"] * bool(grid_shape):
        changed = getattr(one, part).copy()
        changed[1, 2] *= -1.0
        other = call(embed, eqx.tree_at(lambda obs, part=part: getattr(obs, part), one, changed))
        differs = np.any(np.abs(other - together[1]) > 1e-3, axis=-1)
        np.testing.assert_array_equal(differs, (np.arange(B * N) == N + 2).reshape(B, N))


def test_images_of_bytes_and_booleans_are_embedded():
    """As they are, without another conversion; rows of the dead are read as zeros there too."""
    embed, obs = make_embedding(0, (5, 6, 2)), make_observation(0, (5, 6, 2))
    image = obs.grid > 0
    with_image = lambda dtype: eqx.tree_at(lambda obs: obs.grid, obs, image.astype(dtype))  # noqa: E731
    expected = call(embed, with_image(np.float32))
    for dtype in (bool, np.uint8, np.int32):
        np.testing.assert_array_equal(call(embed, with_image(dtype)), expected)
