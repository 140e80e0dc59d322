"""What agents see of the grids, against Jumanji's own; where LBF's agents and food start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.envs import jumanji, jumanji_grids


@functools.cache
def random_episodes(make, num_envs=8, num_steps=30, **options):
    """Plays random legal actions; returns states and observations [num_steps · num_envs, …]."""
    env = make(**options)

    @jax.jit
    def play(key):
        first = jax.vmap(env.reset)(jax.random.split(key, num_envs))

        def step(carry, key):
            state, timestep = carry
            action = jax.random.categorical(
                key, jnp.where(timestep.observation.action_mask, 0.0, -jnp.inf)
            )
            carry = jax.vmap(env.step)(
                state, action.astype(jnp.int32), jax.random.split(key, num_envs)
            )
            return carry, (state, timestep.observation)

        _, visited = jax.lax.scan(step, first, jax.random.split(key, num_steps))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), visited)

    states, observations = play(jax.random.key(0))
    return env, states.replace(key=None), observations


def one_by_one(states, observations):
    states, observations = jax.device_get((states, observations))
    for i in range(len(states.step_count)):
        yield jax.tree.map(lambda leaf, i=i: leaf[i], (states, observations))


def test_connector_images():
    from jumanji.environments.routing.connector.utils import get_path, get_position, get_target

    env, states, observations = random_episodes(jumanji.make_connector, task="5x5x3a")
    num_agents, size = 3, 5
    channels = [(get_path, 0), (get_position, 1), (get_target, 2)]
    assert states.agents.connected.any()
    for state, observation in one_by_one(states, observations):
        image = np.zeros((num_agents, size, size, 6), bool)
        global_state = np.zeros((size, size, 3), np.float32)
        for y, x in np.ndindex(size, size):
            for owner in range(num_agents):
                for value_of, channel in channels:
                    if state.grid[y, x] == value_of(owner):
                        global_state[y, x, channel] = np.float32((owner + 1) / num_agents)
                        for agent in range(num_agents):
                            image[agent, y, x, channel + 3 * (agent != owner)] = True
        np.testing.assert_array_equal(observation.grid, image)
        np.testing.assert_array_equal(observation.state, global_state.ravel())
        for agent in range(num_agents):
            ((*head,),) = np.argwhere(observation.grid[agent, :, :, 1])
            targets = np.argwhere(observation.grid[agent, :, :, 2])
            assert len(targets) == (not state.agents.connected[agent])
            (target,) = targets if len(targets) else [head]  # a connected agent stands on it
            np.testing.assert_array_equal(
                observation.agents_view[agent], np.array([*head, *target], np.float32) / 4
            )
    assert observations.grid.dtype == bool
    assert env.spec.grid_shape == (5, 5, len(jumanji_grids.CONNECTOR_CHANNELS))


def test_cleaner_images():
    from jumanji.environments.routing.cleaner.constants import CLEAN, DIRTY, WALL

    env, states, observations = random_episodes(jumanji.make_cleaner, task="5x5x2a")
    num_agents, size = 2, 5
    for state, observation in one_by_one(states, observations):
        position = [tuple(cell) for cell in state.agents_locations]
        for y, x in np.ndindex(size, size):
            tile = state.grid[y, x]
            kind = [tile == DIRTY, tile == CLEAN, tile == WALL]
            share = sum(cell == (y, x) for cell in position) / num_agents
            assert observation.state.reshape(size, size, 3)[y, x].tolist() == [
                kind[0],
                kind[2],
                share,
            ]
            for agent in range(num_agents):
                others = [cell for j, cell in enumerate(position) if j != agent]
                expected = [*kind, position[agent] == (y, x), (y, x) in others]
                assert observation.grid[agent, y, x].tolist() == expected
        np.testing.assert_array_equal(observation.agents_view, np.array(position, np.float32) / 4)
    assert observations.grid.dtype == bool
    assert env.spec.grid_shape == (5, 5, len(jumanji_grids.CLEANER_CHANNELS))


@pytest.mark.filterwarnings(
    "ignore:scatter inputs have incompatible types:FutureWarning"
)  # Jumanji's
@pytest.mark.parametrize("sight", [1, 2, 9])
def test_local_view_is_what_jumanji_shows(sight):
    """And its mask what Jumanji allows, before and after food is eaten."""
    from jumanji.environments.routing.lbf.observer import GridObserver

    env, states, observations = random_episodes(jumanji.make_lbf_auto, agents=6, food=7, grid=9)
    assert states.food_items.eaten.any()
    assert not states.food_items.eaten.all()
    theirs = jax.jit(jax.vmap(GridObserver(sight, 9, 6, 7).state_to_observation))(states)
    local_view = functools.partial(
        jumanji_grids.local_view, observation=None, grid_size=9, sight=sight
    )
    ours = jax.jit(jax.vmap(local_view))(states)
    np.testing.assert_array_equal(
        ours.agents_view, theirs.agents_view.reshape(*ours.agents_view.shape)
    )
    np.testing.assert_array_equal(ours.action_mask, theirs.action_mask)
    if sight == 2:
        assert env.spec.obs_dim == 3 * 5 * 5
        np.testing.assert_array_equal(ours.agents_view, observations.agents_view)


@pytest.mark.parametrize(
    ("grid_size", "num_food", "num_agents"),
    [(5, 1, 3), (8, 6, 5), (10, 9, 18), (46, 64, 64)],
    ids=["smallest", "as full as allowed", "more agents", "64 agents"],
)
def test_nothing_starts_on_anything(grid_size, num_food, num_agents):
    def draw(key):
        return jumanji_grids.draw_positions(key, grid_size, num_food, num_agents)

    num_draws = 200
    food, agents = jax.device_get(
        jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), num_draws))
    )
    assert food.min() >= 1
    assert food.max() <= grid_size - 2
    assert agents.min() >= 0
    assert agents.max() <= grid_size - 1
    cells = np.concatenate([food, agents], axis=1) @ [grid_size, 1]
    assert all(len(set(row)) == num_food + num_agents for row in cells)
    distance = np.abs(food[:, :, None] - food[:, None]).sum(axis=-1)
    assert (distance[:, ~np.eye(num_food, dtype=bool)] > 1).all()


def test_start_cells_are_uniform():
    """Chi-square per cell: food over the inner cells, every agent over the cells that are left."""
    size, num_draws = 6, 20_000

    def draw(key):
        return jumanji_grids.draw_positions(key, size, num_food=1, num_agents=3)

    food, agents = jax.device_get(
        jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), num_draws))
    )
    inner = np.pad(np.ones((size - 2, size - 2)), 1)
    food_chance = inner / inner.sum()
    agent_chance = (1 - food_chance) / (size**2 - 1)
    for cells, chance in [
        (food[:, 0], food_chance),
        *((agents[:, i], agent_chance) for i in range(3)),
    ]:
        seen = np.bincount(cells @ [size, 1], minlength=size**2).reshape(size, size)
        expected = num_draws * chance
        assert (seen[chance == 0] == 0).all()
        possible = chance > 0
        chi_square = ((seen - expected)[possible] ** 2 / expected[possible]).sum()
        freedom = possible.sum() - 1
        assert abs(chi_square - freedom) < 4 * np.sqrt(
            2 * freedom
        )  # mean and deviation of chi-square


def test_later_food_is_uniform_over_what_is_left():
    """With two items on 3 × 3 inner cells: all ordered pairs that do not touch, by their chance."""
    num_draws = 20_000

    def draw(key):
        return jumanji_grids.draw_positions(key, 5, num_food=2, num_agents=1)[0] - 1

    food = jax.device_get(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), num_draws)))
    first, second = food[:, 0], food[:, 1]
    for y, x in np.ndindex(3, 3):
        left = [(v, u) for v, u in np.ndindex(3, 3) if abs(v - y) + abs(u - x) > 1]
        after = second[(first == [y, x]).all(axis=1)]
        assert abs(len(after) - num_draws / 9) < 4 * np.sqrt(num_draws / 9)
        for cell in left:
            count, expected = (after == cell).all(axis=1).sum(), len(after) / len(left)
            assert abs(count - expected) < 4 * np.sqrt(expected)
