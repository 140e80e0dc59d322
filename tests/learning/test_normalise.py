"""Running statistics against NumPy's of all samples, and what policies see in their units."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import NetworkConfig
from mam.errors import UserError
from mam.learning.normalise import (
    MAX_DEVIATIONS,
    Moments,
    NormalisedPolicy,
    Statistics,
    transfer_policy,
)
from mam.learning.sharding import AXIS, Shard
from mam.networks.policy import make_policy
from mam.types import EnvSpec, Observation

T, B, N, F, STATE_DIM, NUM_IDS = 3, 4, 2, 5, 3, 2
SPEC = EnvSpec(
    "suite/task",
    N,
    NUM_IDS + F,
    num_actions=3,
    time_limit=None,
    state_dim=STATE_DIM,
    id_dim=NUM_IDS,
)
BATCHES, HORIZON = 4, 10
update = jax.jit(partial(Moments.update, horizon=HORIZON))


def samples(seed, scale=1.0, offset=0.0):
    """Batches [BATCHES, T, B, N, F] each from elsewhere, of several scales; the dead are NaN."""
    rng = np.random.default_rng(seed)
    x = offset + scale * (
        rng.normal(size=(BATCHES, T, B, N, F)) * np.geomspace(0.1, 10, F) + np.arange(F)
    )
    x += scale * rng.normal(size=(BATCHES, 1, 1, 1, 1))
    alive = rng.random((BATCHES, T, B, N)) < 0.7
    return np.where(alive[..., None], x, np.nan).astype(np.float32), alive


def assert_moments(moments, x, rtol=1e-4):
    """Those of the rows [samples, F]."""
    x = x.astype(np.float64)
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), atol=rtol * x.std(), rtol=1e-6)
    np.testing.assert_allclose(moments.var, x.var(axis=0), rtol=rtol)


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-3, 0), (1e6, 0), (1, -1e4)])
def test_batch_by_batch_they_are_the_moments_of_all_living(scale, offset):
    x, alive = samples(0, scale, offset)
    moments = Moments.init(F)
    for batch, mask in zip(x, alive, strict=True):
        moments = update(moments, batch, mask)
    assert_moments(moments, x[alive], rtol=1e-3)
    assert moments.count == alive.sum()


def test_without_samples_nothing_changes():
    x, alive = samples(1)
    moments = update(Moments.init(F), x[0], alive[0])
    jax.tree.map(
        np.testing.assert_array_equal, update(moments, x[1], np.zeros_like(alive[1])), moments
    )


def test_what_is_older_than_the_horizon_fades():
    mask = np.ones(100, bool)
    moments = Moments.init()
    for mean in (0.0, *[1.0] * 100):
        moments = update(moments, np.full(100, mean, np.float32), mask)
    assert 1 - moments.mean == pytest.approx(
        (1 - 1 / HORIZON) ** (100 - HORIZON + 1) / HORIZON, rel=1e-2
    )
    assert moments.count == 100 * HORIZON


def test_shares_of_a_batch_give_the_moments_of_the_whole():
    x, alive = samples(2)
    whole = update(update(Moments.init(F), x[0], alive[0]), x[1], alive[1])
    halves = [
        np.stack(np.split(array, 2, axis=2)) for array in (x, alive)
    ]  # environments on two devices
    shared = partial(Moments.update, horizon=HORIZON, shard=Shard(2))
    each = jax.vmap(
        lambda x, alive: shared(shared(Moments.init(F), x[0], alive[0]), x[1], alive[1]),
        axis_name=AXIS,
    )
    jax.tree.map(
        lambda leaf, expected: np.testing.assert_allclose(
            leaf, np.stack([expected] * 2), rtol=1e-5, atol=1e-5
        ),
        jax.jit(each)(*halves),
        whole,
    )


def observe(x, alive):
    """What N agents see: ids, and numbers; the state is another."""
    ids = np.broadcast_to(np.eye(N, NUM_IDS, dtype=np.float32), (*alive.shape, NUM_IDS))
    mask = np.ones((*alive.shape, 3), bool)
    state = 100 + 7 * np.random.default_rng(3).normal(size=(*alive.shape[:-1], STATE_DIM)).astype(
        np.float32
    )
    grid = np.zeros((*alive.shape, 2, 2, 1), np.uint8)
    return Observation(np.concatenate([ids, x], axis=-1), mask, alive, grid, state)


def test_the_living_are_seen_with_mean_0_and_deviation_1_and_ids_and_images_as_they_are():
    x, alive = samples(4, scale=1000)
    obs = observe(x[0], alive[0])
    fresh = Statistics.init(SPEC, observations=True, values=False)
    seen = jax.jit(lambda s, obs: s.update(obs).normalise(obs))(fresh, obs)
    own = np.asarray(seen.agents_view)[alive[0]][:, NUM_IDS:]
    for numbers in (own, np.asarray(seen.state).reshape(-1, STATE_DIM)):
        np.testing.assert_allclose(numbers.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(numbers.std(axis=0), 1, atol=1e-3)
    np.testing.assert_array_equal(seen.agents_view[..., :NUM_IDS], obs.agents_view[..., :NUM_IDS])
    np.testing.assert_array_equal(seen.grid, obs.grid)


def test_before_anything_was_seen_numbers_are_clipped_only():
    x, alive = samples(5, scale=100)
    seen = Statistics.init(SPEC, observations=True, values=True).normalise(observe(x[0], alive[0]))
    expected = np.clip(x[0], -MAX_DEVIATIONS, MAX_DEVIATIONS)
    np.testing.assert_allclose(seen.agents_view[..., NUM_IDS:], expected, rtol=1e-6)


def test_what_never_changes_is_zero_and_what_then_does_is_bounded():
    alive = np.ones((T, B, N), bool)
    obs = observe(np.full((T, B, N, F), 3.0, np.float32), alive)
    statistics = Statistics.init(SPEC, observations=True, values=False).update(obs)
    np.testing.assert_allclose(statistics.normalise(obs).agents_view[..., NUM_IDS:], 0, atol=1e-3)
    later = replace(obs, agents_view=obs.agents_view + 1)
    np.testing.assert_array_equal(
        statistics.normalise(later).agents_view[..., NUM_IDS:], MAX_DEVIATIONS
    )


@pytest.mark.parametrize("kind", ["observations", "values"])
def test_there_are_statistics_of_what_is_normalised_only(kind):
    on = {"observations": False, "values": False} | {kind: True}
    statistics = Statistics.init(SPEC, **on)
    there = {
        name for name in ("features", "state", "values") if getattr(statistics, name) is not None
    }
    assert there == ({"features", "state"} if kind == "observations" else {"values"})
    assert not jax.tree.leaves(Statistics.init(SPEC, observations=False, values=False))
    only_ids = Statistics.init(
        replace(SPEC, obs_dim=NUM_IDS, state_dim=None), observations=True, values=False
    )
    assert not jax.tree.leaves(only_ids)


@pytest.mark.parametrize(
    ("name", "state_dim", "kept"), [("ippo", STATE_DIM, True), ("ippo", None, False)]
)
def test_statistics_go_with_the_weights_to_another_number_of_agents(name, state_dim, kept):
    """Those of a state that the network does not read are left behind where it is another."""
    sizes, new = NetworkConfig(d_model=4), replace(SPEC, num_agents=N + 3, state_dim=state_dim)
    network = jax.eval_shape(lambda key: make_policy(name, SPEC, sizes, key=key), jax.random.key(0))
    statistics = Statistics.init(SPEC, observations=True, values=True)
    moved = transfer_policy(NormalisedPolicy(network, statistics), name, SPEC, new, sizes)
    assert moved.statistics.features is statistics.features
    assert moved.statistics.values is statistics.values
    assert moved.statistics.state is (statistics.state if kept else None)


def test_views_divided_otherwise_are_another_task():
    """They are as wide, and what was a feature would be read as an id."""
    sizes, new = NetworkConfig(d_model=4), replace(SPEC, num_agents=N + 1, id_dim=NUM_IDS + 1)
    network = jax.eval_shape(
        lambda key: make_policy("ippo", SPEC, sizes, key=key), jax.random.key(0)
    )
    policy = NormalisedPolicy(network, Statistics.init(SPEC, observations=True, values=True))
    with pytest.raises(UserError, match=r"cannot play suite/task: id_dim is 3 instead of 2$"):
        transfer_policy(policy, "ippo", SPEC, new, sizes)


@jax.jit
def successor_values_and_values(policy, obs, successor):
    """What follows one step, and the value of it with the memory after the step."""
    memory, reset = policy.init_memory((B,)), jnp.ones(B, bool)
    keys = jax.random.split(jax.random.key(1), B)
    after, output = policy.act(memory, obs, reset, keys)
    steps = jax.tree.map(lambda x: x[None], (obs, output.action, reset, successor))
    later = policy.act(after, successor, jnp.zeros(B, bool), keys)[1].value
    return policy.successor_values(memory, *steps)[0], later


def test_successors_are_valued_in_the_same_units_as_everything_else():
    """Of a policy with memory, which reads the steps as well."""
    x, alive = samples(6, offset=30)
    obs, successor = jax.tree.map(
        lambda x: np.asarray(x[0]), (observe(x[0], alive[0]), observe(x[1], alive[1]))
    )
    network = make_policy("rec_ippo", SPEC, NetworkConfig(d_model=4), key=jax.random.key(0))
    statistics = Statistics.init(SPEC, observations=True, values=True).update(
        observe(x[0], alive[0])
    )
    policy = NormalisedPolicy(network, statistics).update_values(
        np.float32(5 + x[0].sum(-1)), alive[0]
    )
    found, expected = successor_values_and_values(policy, obs, successor)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.abs(expected).min() > 5


def test_values_of_one_without_statistics_have_units_that_are_known():
    own = Statistics.init(SPEC, observations=False, values=True)
    assert own.values.count == 0
    assert own.taken_from(Statistics()).values.count == 1
    other = replace(own, values=replace(own.values, count=jnp.array(7.0)))
    assert own.taken_from(other).values.count == 7
