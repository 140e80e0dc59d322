"""The order in which agents decide: curves, ties, the dead, and what follows from them."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import EncoderConfig, NetworkConfig
from mam.errors import UserError
from mam.networks.order import (
    decision_order,
    hilbert_index,
    order_agents,
    shifted_orders,
)
from mam.networks.policy import make_policy
from mam.types import EnvSpec, Observation

SIZES = NetworkConfig(d_model=8, num_heads=2, d_state=2, d_conv=2, dt_rank=2, head_dim=8)
N, A, O, B = 6, 3, 4, 3  # noqa: E741
SPEC = EnvSpec("suite/task", N, O, A, time_limit=None, position_dim=2)
RESET = jnp.zeros(B, bool)


def observation(seed=0, alive=None, positions=None, num_agents=N):
    rng = np.random.default_rng(seed)
    return Observation(
        jnp.asarray(rng.normal(size=(B, num_agents, O)), jnp.float32),
        jnp.ones((B, num_agents, A), bool),
        jnp.broadcast_to(jnp.asarray(True if alive is None else alive), (B, num_agents)),
        positions=jnp.asarray(rng.random((B, num_agents, 2)), jnp.float32)
        if positions is None
        else jnp.asarray(positions, jnp.float32),
    )


def by_agent(names, obs):
    """Return what is seen where agent n is the one that was names[n]."""
    return jax.tree.map(lambda x: x[:, names], obs)


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_the_curve_passes_every_cell_once_and_steps_to_a_neighbour(bits):
    y, x = map(jnp.asarray, np.divmod(np.arange(4**bits), 2**bits))
    index = np.asarray(hilbert_index(x, y, bits))
    np.testing.assert_array_equal(np.sort(index), np.arange(4**bits))
    path = np.stack([x, y], axis=1)[np.argsort(index)]
    np.testing.assert_array_equal(np.abs(np.diff(path, axis=0)).sum(axis=1), 1)


def test_a_larger_curve_passes_the_quarters_of_a_smaller_one_in_its_order():
    y, x = map(jnp.asarray, np.divmod(np.arange(4**4), 2**4))
    coarse, fine = hilbert_index(x, y, 15), hilbert_index(x >> 1, y >> 1, 14)
    np.testing.assert_array_equal(np.asarray(coarse) // 4, np.asarray(fine))


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_smaller_keys_first_then_the_index_and_the_dead_last(array):
    alive = array(np.array([[1, 0, 1, 1, 0, 1]], bool))
    keys = array(np.array([[5.0, 0.0, 7.0, 5.0, np.nan, -1.0]]))
    order = decision_order(alive, keys)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(order, [[5, 0, 3, 2, 1, 4]])
    np.testing.assert_array_equal(decision_order(alive), [[0, 2, 3, 5, 1, 4]])


@pytest.mark.parametrize("name", ["hilbert", "sweep"])
def test_neither_the_unit_nor_the_dead_change_the_order(name):
    obs, alive = observation(), np.ones((B, N), bool)
    alive[:, 1] = False
    placed = np.array(obs.positions)
    placed[:, 1] = 4096 * placed[:, 1] + 7
    whole = order_agents(name, observation(alive=alive))
    np.testing.assert_array_equal(order_agents(name, observation(0, alive, placed)), whole)
    other = observation(0, alive, 8 * np.array(obs.positions) - 2)
    np.testing.assert_array_equal(order_agents(name, other), whole)
    assert (whole[:, -1] == 1).all()


def test_a_sweep_goes_band_by_band_and_back():
    rows, columns = np.divmod(np.arange(9), 3)
    obs = observation(num_agents=9, positions=np.broadcast_to(np.c_[rows, columns], (B, 9, 2)))
    np.testing.assert_array_equal(order_agents("sweep", obs)[0], [0, 1, 2, 5, 4, 3, 6, 7, 8])


@pytest.mark.parametrize("name", ["hilbert", "sweep"])
def test_along_a_line_agents_are_sorted(name):
    line = np.array([[3.0, 1.0, 2.0, 0.5, 9.0, -4.0]] * B)[..., None]
    found = order_agents(name, observation(positions=line))
    np.testing.assert_array_equal(found, np.argsort(line[..., 0]))


@pytest.mark.parametrize("place", [[[0.0, 0.0]] * N, [[np.nan, np.inf]] * N], ids=["one", "none"])
def test_agents_in_one_place_or_none_at_all_are_in_the_order_of_their_indices(place):
    alive = np.full((B, N), np.isfinite(place).all())
    obs = observation(0, alive, np.broadcast_to(place, (B, N, 2)))
    np.testing.assert_array_equal(order_agents("hilbert", obs)[0], np.arange(N))


def test_a_random_order_is_drawn_by_agent_and_left_out_where_actions_are_greedy():
    keys, obs = jax.random.split(jax.random.key(0), B), observation()
    drawn = np.asarray(order_agents("random", obs, keys))
    assert {tuple(sorted(order)) for order in drawn.tolist()} == {tuple(range(N))}
    assert len(np.unique(drawn, axis=0)) == B
    fewer = jax.tree.map(lambda x: x[:, : N - 1], obs)
    np.testing.assert_array_equal(
        order_agents("random", fewer, keys), [[a for a in row if a < N - 1] for row in drawn]
    )
    for plain in (order_agents("random", obs), order_agents("random", obs, keys, True)):
        np.testing.assert_array_equal(plain, decision_order(obs.alive))


def test_neighbours_across_the_seam_of_one_curve_are_near_on_another():
    # At random places; the gap is how many agents lie between two that are nearest each other.
    num = 1024
    obs = observation(num_agents=num)
    places = np.asarray(obs.positions)[0]
    distance = np.square(places[:, None] - places).sum(-1) + 9 * np.eye(num)
    nearest = distance.argmin(1)

    def gap(order):
        rank = np.argsort(order[0])
        return np.abs(rank - rank[nearest])

    gaps = [gap(order_agents("hilbert", obs)), *map(gap, shifted_orders(2, obs))]
    one, three = gaps[0], np.min(gaps, axis=0)
    assert np.median(gap(decision_order(obs.alive))) > 100
    assert np.median(one) <= 3
    assert one.max() > 200 > 60 > three.max()


def own_keys(obs):
    """Return keys of one environment's agents: the last first."""
    return -jnp.arange(obs.alive.shape[-1])


def not_keys(obs):
    return jnp.zeros(2)


def test_an_order_of_ones_own():
    found = order_agents("test_order:own_keys", observation())
    np.testing.assert_array_equal(found, np.tile(np.arange(N)[::-1], (B, 1)))
    with pytest.raises(UserError, match=r"test_order:not_keys returns \[3, 2\]: expected \[6\] k"):
        order_agents("test_order:not_keys", observation())
    with pytest.raises(UserError, match="no order test_order:nothing, expected package"):
        order_agents("test_order:nothing", observation())


@functools.cache
def policy(order, *, scans=1, local=0, spec=SPEC):
    """A policy with large random parameters: under the initial ones agents hardly interact."""
    encoder = EncoderConfig(order_scans=scans, local_branch=local)
    sizes = replace(SIZES, order=order, encoder=encoder)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        centre, spread = 1.0 if path[-1].name == "scale" else 0.0, 0.6 if leaf.ndim > 1 else 0.4
        return jnp.asarray(rng.normal(centre, spread, leaf.shape), jnp.float32)

    empty = jax.eval_shape(lambda key: make_policy("mam", spec, sizes, key=key), KEY)
    return jax.tree_util.tree_map_with_path(draw, empty)


KEY = jax.random.key(0)


@jax.jit
def act(policy, obs):
    noise = jnp.zeros((*obs.alive.shape, A))
    return policy.act_on_noise(policy.init_memory((B,)), obs, RESET, noise)[1]


@jax.jit
def evaluate(policy, obs, output):
    memory = policy.init_memory((B,))
    inputs = jax.tree.map(lambda x: x[None], (obs, output.action, output.order, RESET))
    return jax.tree.map(lambda x: x[0], policy.evaluate(memory, *inputs))


VARIANTS = [("hilbert", 1, 0), ("hilbert", 3, 5), ("sweep", 1, 0)]


@pytest.mark.parametrize(("order", "scans", "local"), VARIANTS)
def test_permuting_agents_permutes_the_outputs(order, scans, local):
    names = np.array([3, 0, 5, 1, 2, 4])
    subject, obs = policy(order, scans=scans, local=local), observation()
    output, moved = act(subject, obs), act(subject, by_agent(names, obs))
    np.testing.assert_array_equal(moved.action, output.action[:, names])
    np.testing.assert_allclose(moved.log_prob, output.log_prob[:, names], atol=1e-5)
    np.testing.assert_allclose(moved.value, output.value[:, names], atol=1e-5)


def test_by_index_the_outputs_change_with_the_agents_numbers():
    names = np.array([3, 0, 5, 1, 2, 4])
    subject, obs = policy("index"), observation()
    output, moved = act(subject, obs), act(subject, by_agent(names, obs))
    assert np.abs(moved.value - output.value[:, names]).max() > 1e-2


@pytest.mark.parametrize(("order", "scans", "local"), [*VARIANTS, ("random", 1, 0)])
def test_the_order_acted_in_is_the_order_learned_in(order, scans, local):
    subject, obs = policy(order, scans=scans, local=local), observation(alive=np.arange(N) != 2)
    memory, keys = subject.init_memory((B,)), jax.random.split(KEY, B)
    output = jax.jit(type(subject).act)(subject, memory, obs, RESET, keys)[1]
    assert (output.order[:, -1] == 2).all()
    evaluation = evaluate(subject, obs, output)
    living = np.arange(N) != 2
    np.testing.assert_allclose(
        evaluation.log_prob[:, living], output.log_prob[:, living], atol=1e-5
    )
    np.testing.assert_allclose(evaluation.value[:, living], output.value[:, living], atol=1e-5)
    next_values = subject.successor_values(
        memory, *jax.tree.map(lambda x: x[None], (obs, output.action, RESET, obs))
    )
    if order != "random":
        np.testing.assert_allclose(next_values[0][:, living], output.value[:, living], atol=1e-5)


@pytest.mark.parametrize(("scans", "local"), [(3, 0), (1, 5)])
def test_the_dead_change_nothing_along_any_curve(scans, local):
    subject, alive = policy("hilbert", scans=scans, local=local), np.arange(N) < N - 2
    seen = observation(alive=alive)
    odd = jnp.where(alive[:, None], seen.agents_view, 99.0)
    one, other = act(subject, seen), act(subject, replace(seen, agents_view=odd))
    np.testing.assert_allclose(one.value[:, alive], other.value[:, alive], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "hilbrt"}, r"unknown network.order 'hilbrt': did you mean hilbert\?"),
        ({"order": "hilbert", "spec": replace(SPEC, position_dim=None)}, "gives no positions"),
    ],
)
def test_orders_that_there_are_not(change, message):
    with pytest.raises(UserError, match=message):
        policy(**change)
