"""Rivals do what the policies do."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import NetworkConfig
from mam.study.bench.baselines import act_uncached, matched_sizes
from mam.study.bench.inputs import count, policy_shapes
from mam.types import EnvSpec, Observation

SIZES = NetworkConfig(d_model=8, num_heads=2, d_state=4, dt_rank=2)
ALIVE = np.array([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1]], bool)


def make_spec(continuous=False):
    return EnvSpec("suite/task", ALIVE.shape[1], 6, 4, time_limit=None, continuous=continuous)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", params=[("mat", False), ("mat", True), ("mam", False)], ids=str)
def acted(request):
    """Joint actions of a random policy, of `act` and of the baseline after any number of steps."""
    name, continuous = request.param
    with jax.enable_x64(True):
        rng, spec = np.random.default_rng(0), make_spec(continuous)

        def draw(path, leaf):
            centre, spread = 1.0 if path[-1].name == "scale" else 0.0, 0.1 if continuous else 0.5
            return jnp.asarray(rng.normal(centre, spread, leaf.shape))

        policy = jax.tree_util.tree_map_with_path(draw, policy_shapes(name, spec, SIZES))
        mask = jnp.asarray(rng.random((*ALIVE.shape, spec.num_actions)) < 0.7).at[..., 0].set(True)
        obs = Observation(
            jnp.asarray(rng.normal(size=(*ALIVE.shape, spec.obs_dim))), mask, jnp.asarray(ALIVE)
        )
        keys = jax.random.split(jax.random.key(1), len(ALIVE))
        reset = jnp.zeros(len(ALIVE), bool)

        @jax.jit
        def act(policy, obs, keys):
            return policy.act(policy.init_memory(reset.shape), obs, reset, keys)[1]

        expected, uncached = act(policy, obs, keys), jax.jit(act_uncached)
        outputs = [
            uncached(policy, obs, keys, jnp.int32(steps)) for steps in range(ALIVE.shape[1] + 1)
        ]
        return jax.tree.map(np.asarray, (expected, outputs))


def test_uncached_decoding_chooses_the_same_actions(acted):
    expected, outputs = acted
    np.testing.assert_array_equal(outputs[-1].order, expected.order)
    for name in ("action", "log_prob", "value"):
        np.testing.assert_allclose(
            getattr(outputs[-1], name), getattr(expected, name), rtol=1e-9, atol=1e-9
        )
    assert len(np.unique(expected.action[ALIVE])) > 1


def test_a_step_decides_for_one_agent(acted):
    expected, outputs = acted
    for steps, output in enumerate(outputs):
        for env, order in enumerate(expected.order):
            decided, left = order[:steps], order[steps:]
            np.testing.assert_allclose(
                output.action[env, decided], expected.action[env, decided], rtol=1e-9
            )
            assert not np.any(output.action[env, left])


def test_matched_sizes_have_the_nearest_number_of_parameters():
    def size(sizes):
        return count(policy_shapes("mat", make_spec(), sizes))

    sizes = replace(SIZES, d_model=32)
    target = count(policy_shapes("mam", make_spec(), sizes))
    away = {d: abs(size(replace(sizes, d_model=d)) - target) for d in range(8, 81, 8)}
    d_model = matched_sizes("mat", make_spec(), sizes, target).d_model
    assert d_model == min(away, key=away.__getitem__) != sizes.d_model
    assert (
        matched_sizes("mat", make_spec(), replace(sizes, d_model=30, num_heads=3), target).d_model
        % 24
        == 0
    )
    assert matched_sizes("mat", make_spec(), sizes, 1).d_model == 8
