"""Conventions of the Jumanji tasks, checked on positions set up by hand."""

import functools
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from mam.envs import jumanji, registry
from mam.errors import UserError

LOAD = 5
FORWARD = 1
RIGHT, LEFT = 1, 3  # directions of RWARE robots
STAY, GO_RIGHT = 0, 2  # actions of Connector


@functools.cache
def compiled(suite):
    """A small task of one of the suites that show grids: environment, reset and step."""
    env = {
        "connector": lambda: jumanji.make_connector("5x5x3a"),
        "cleaner": lambda: jumanji.make_cleaner("5x5x2a"),
        "lbf/auto": lambda: jumanji.make_lbf_auto(agents=3, grid=7, limit=20),
    }[suite]()
    return env, jax.jit(env.reset), jax.jit(env.step)


SUITES = ["connector", "cleaner", "lbf/auto"]


def random_legal(mask, seed):
    return jax.random.categorical(jax.random.key(seed), jnp.where(mask, 0.0, -jnp.inf)).astype(
        jnp.int32
    )


def wires(state, *, boxed_in):
    """Puts Connector's agents on 5 × 5 cells, two of them beside their targets.

    The third is beside its target too, or walled into a corner.

    h T . . .        h = head, T = target, p = path (of agent 0), as Jumanji numbers them
    h T . . .
    . . . . .
    . . . p p
    h T . p h
    """
    from jumanji.environments.routing.connector.utils import get_action_masks

    position = jnp.array([[0, 0], [1, 0], [4, 4] if boxed_in else [4, 0]])
    target = jnp.array([[0, 1], [1, 1], [4, 1]])
    grid = jnp.zeros((5, 5), jnp.int32).at[*position.T].set(jnp.array([2, 5, 8]))
    grid = grid.at[*target.T].set(jnp.array([3, 6, 9])).at[3, 3:].set(1).at[4, 3].set(1)
    agents = state.agents.replace(start=position, position=position, target=target)
    return state.replace(grid=grid, agents=agents, action_mask=get_action_masks(agents, grid))


def load_both(lbf, state, food):
    """Puts LBF's two agents above and below a food item and lets both load."""
    position = state.env_state.food_items.position[food] + jnp.array([[-1, 0], [1, 0]])
    state = replace(
        state,
        env_state=state.env_state.replace(agents=state.env_state.agents.replace(position=position)),
    )
    return lbf.step(state, jnp.full(2, LOAD), jax.random.key(0))


def at_last_step(task, state):
    limit = jnp.int32(task.env.spec.time_limit - 1)
    return replace(state, env_state=state.env_state.replace(step_count=limit))


def facing_each_other(state):
    """Puts RWARE's two robots two cells apart, about to meet in the cell between them."""
    warehouse = state.env_state
    grid = warehouse.grid.at[1].set(0).at[1, 0, 0].set(1).at[1, 0, 2].set(2)
    agents = warehouse.agents._replace(
        position=warehouse.agents.position._replace(x=jnp.array([0, 0]), y=jnp.array([0, 2])),
        direction=jnp.array([RIGHT, LEFT]),
    )
    mask = jnp.ones_like(warehouse.action_mask)
    return replace(state, env_state=warehouse.replace(grid=grid, agents=agents, action_mask=mask))


def test_lbf_return_is_one_when_all_is_eaten(lbf):
    state, _ = lbf.reset(jax.random.key(0))
    state, first = load_both(lbf, state, food=0)
    assert not first.ended
    np.testing.assert_allclose(
        first.reward, 0.5
    )  # two items of equal level; each agent gets all of it
    state, second = load_both(lbf, state, food=1)
    assert second.terminated
    assert not second.truncated
    np.testing.assert_allclose(second.metrics["episode_return"], 1.0)


def test_lbf_solved_at_the_limit_is_terminated(lbf):
    state, _ = lbf.reset(jax.random.key(0))
    state, _ = load_both(lbf, state, food=0)
    _, timestep = load_both(lbf, at_last_step(lbf, state), food=1)
    assert timestep.terminated
    assert not timestep.truncated


@pytest.mark.parametrize("family", ["lbf", "rware"])
def test_time_limit_truncates(family, request):
    """RWARE too, where Jumanji itself calls the limit a termination."""
    task = request.getfixturevalue(family)
    state, _ = task.reset(jax.random.key(0))
    _, before = task.step(state, jnp.zeros(2, jnp.int32), jax.random.key(0))
    _, at_limit = task.step(at_last_step(task, state), jnp.zeros(2, jnp.int32), jax.random.key(0))
    assert not before.ended
    assert at_limit.truncated
    assert not at_limit.terminated


@pytest.mark.parametrize("last", [False, True], ids=["early", "at the limit"])
def test_rware_collision_terminates(rware, last):
    state, _ = rware.reset(jax.random.key(0))
    state = facing_each_other(at_last_step(rware, state) if last else state)
    _, timestep = rware.step(state, jnp.full(2, FORWARD), jax.random.key(0))
    assert timestep.terminated
    assert not timestep.truncated


@pytest.mark.parametrize("suite", SUITES)
def test_steps_are_jumanjis(suite):
    """Same state, mask and end; the reward is the team's."""
    env, reset, step = compiled(suite)
    their_step = jax.jit(env.env.step)
    state, timestep = reset(jax.random.key(0))
    for seed in range(8):
        mask = timestep.observation.action_mask
        assert mask.any(axis=1).all()
        action = random_legal(mask, seed)
        their_state, theirs = their_step(state, action)
        state, timestep = step(state, action, jax.random.key(0))
        assert eqx.tree_equal(state.replace(key=None), their_state.replace(key=None))
        np.testing.assert_array_equal(
            timestep.observation.action_mask, theirs.observation.action_mask
        )
        np.testing.assert_allclose(
            timestep.reward, np.full(env.spec.num_agents, theirs.reward.sum()), rtol=1e-6
        )
        assert timestep.ended == theirs.last()
        if timestep.ended:
            state, timestep = reset(jax.random.key(seed))


@pytest.mark.parametrize("suite", SUITES)
def test_limit_of_grid_tasks_truncates(suite):
    """Cleaner too, where Jumanji itself calls the limit a termination."""
    env, reset, step = compiled(suite)
    state, first = reset(jax.random.key(0))
    action = random_legal(first.observation.action_mask, 0)
    _, before = step(
        state.replace(step_count=jnp.int32(env.spec.time_limit - 2)), action, jax.random.key(0)
    )
    _, at_limit = step(
        state.replace(step_count=jnp.int32(env.spec.time_limit - 1)), action, jax.random.key(0)
    )
    assert not before.ended
    assert at_limit.truncated
    assert not at_limit.terminated


def test_connector_ends_when_all_are_connected():
    env, reset, step = compiled("connector")
    state, first = reset(jax.random.key(0))
    assert first.metrics["connected"] == 0
    state, two = step(
        wires(state, boxed_in=False), jnp.array([GO_RIGHT, GO_RIGHT, STAY]), jax.random.key(0)
    )
    assert not two.ended
    np.testing.assert_allclose(two.reward, 2 - 3 * 0.03, rtol=1e-6)
    np.testing.assert_allclose(two.metrics["connected"], 2 / 3, rtol=1e-6)
    assert two.observation.action_mask[:2].tolist() == [[True, False, False, False, False]] * 2
    assert two.observation.action_mask[2, GO_RIGHT]
    assert two.observation.alive.all()
    at_limit = state.replace(step_count=jnp.int32(env.spec.time_limit - 1))
    for last in (state, at_limit):
        _, three = step(last, jnp.array([STAY, STAY, GO_RIGHT]), jax.random.key(0))
        np.testing.assert_allclose(three.reward, 1 - 0.03, rtol=1e-6)
        assert three.metrics["connected"] == 1
        assert three.terminated
        assert not three.truncated


def test_connector_ends_when_the_others_are_stuck():
    _, reset, step = compiled("connector")
    state = wires(reset(jax.random.key(0))[0], boxed_in=True)
    _, timestep = step(state, jnp.array([GO_RIGHT, GO_RIGHT, STAY]), jax.random.key(0))
    assert timestep.terminated
    assert timestep.observation.action_mask[2].tolist() == [True, False, False, False, False]
    np.testing.assert_allclose(timestep.metrics["connected"], 2 / 3, rtol=1e-6)


@pytest.mark.parametrize("last", [False, True], ids=["early", "at the limit"])
def test_cleaner_ends_when_all_is_clean(last):
    from jumanji.environments.routing.cleaner.constants import CLEAN, DIRTY, WALL

    env, reset, step = compiled("cleaner")
    state, first = reset(jax.random.key(0))
    num_tiles = (state.grid != WALL).sum()
    np.testing.assert_allclose(
        first.metrics["cleaned"], 1 / num_tiles, rtol=1e-6
    )  # the start is clean
    action = random_legal(first.observation.action_mask, 0).at[1].set(0)
    action = action.at[1].set(action[0])  # both to the same tile
    tile = tuple(np.array([[-1, 0], [0, 1], [1, 0], [0, -1]])[int(action[0])])
    grid = jnp.where(state.grid == DIRTY, CLEAN, state.grid).at[*tile].set(DIRTY)
    state = state.replace(grid=grid, step_count=jnp.int32(env.spec.time_limit - 1 if last else 0))
    _, timestep = step(state, action, jax.random.key(0))
    np.testing.assert_allclose(timestep.reward, 1 - 0.5)
    assert timestep.metrics["cleaned"] == 1
    assert timestep.terminated
    assert not timestep.truncated


def test_cleaner_walking_into_a_wall_terminates():
    env, reset, step = compiled("cleaner")
    state, _ = reset(jax.random.key(0))
    state = state.replace(step_count=jnp.int32(env.spec.time_limit - 1))
    _, timestep = step(state, jnp.array([0, 0]), jax.random.key(0))  # up, from the upper row
    assert timestep.terminated
    assert not timestep.truncated
    np.testing.assert_allclose(timestep.reward, -0.5)


def test_lbf_settings():
    env = jumanji.make_lbf("2s-10x10-3p-3f")
    assert (env.spec.num_agents, env.spec.obs_dim, env.spec.num_actions, env.spec.time_limit) == (
        3,
        18,
        6,
        100,
    )
    assert (env.env.fov, env.env.grid_size, env.env.num_food) == (2, 10, 3)
    assert not env.env._generator.force_coop
    assert jumanji.make_lbf("8x8-2p-2f-coop").env._generator.force_coop


@pytest.mark.parametrize("task", jumanji.LBF_TASKS)
def test_lbf_names_say_what_they_set(task):
    settings = jumanji.LBF_TASKS[task]
    size, agents, food = settings["grid_size"], settings["num_agents"], settings["num_food"]
    name = f"{size}x{size}-{agents}p-{food}f" + "-coop" * settings.get("force_coop", False)
    assert task == ("" if settings["fov"] == size else f"{settings['fov']}s-") + name


@pytest.mark.parametrize(("task", "num_requests"), [("tiny-4ag", 4), ("tiny-4ag-hard", 2)])
def test_rware_settings(task, num_requests):
    env = jumanji.make_rware(task)
    assert (env.spec.num_agents, env.spec.obs_dim, env.spec.num_actions, env.spec.time_limit) == (
        4,
        66,
        5,
        500,
    )
    assert env.env.request_queue_size == num_requests
    assert env.env.grid_size == (11, 10)  # 1 × 3 clusters of height 8


@pytest.mark.parametrize(
    ("make", "tasks", "obs_dim", "num_actions", "channels"),
    [
        (jumanji.make_connector, jumanji.CONNECTOR_TASKS, 4, 5, 6),
        (jumanji.make_cleaner, jumanji.CLEANER_TASKS, 2, 4, 5),
    ],
    ids=["connector", "cleaner"],
)
def test_grid_settings(make, tasks, obs_dim, num_actions, channels):
    for task, limit in list(tasks.items())[::3]:  # the smallest and the largest
        spec = make(task).spec
        size = spec.grid_shape[0]
        assert f"{size}x{size}x{spec.num_agents}a" == task == spec.name.split("/")[1]
        assert (spec.obs_dim, spec.num_actions, spec.time_limit) == (obs_dim, num_actions, limit)
        assert (spec.grid_shape, spec.state_dim) == ((size, size, channels), 3 * size * size)
    assert all(limit == int(task.split("x")[0]) ** 2 for task, limit in tasks.items())


def test_lbf_auto_shows_as_much_whatever_there_is():
    small, large = jumanji.make_lbf_auto(), jumanji.make_lbf_auto(agents=64, food=100, grid=48)
    assert (
        small.spec.name == "lbf/auto:agents=8,food=8,grid=16,sight=2,levels=2,coop=false,limit=100"
    )
    assert (
        large.spec.name
        == "lbf/auto:agents=64,food=100,grid=48,sight=2,levels=2,coop=false,limit=100"
    )
    assert small.spec.obs_dim == large.spec.obs_dim == 3 * 5 * 5
    assert (large.spec.num_agents, large.spec.num_actions, large.spec.time_limit) == (64, 6, 100)


def test_lbf_auto_options_arrive():
    env = jumanji.make_lbf_auto(agents=5, food=3, grid=9, sight=1, levels=4, coop=True, limit=7)
    assert env.spec.name == "lbf/auto:agents=5,food=3,grid=9,sight=1,levels=4,coop=true,limit=7"
    assert env.spec.time_limit == 7
    state, timestep = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), 50))
    assert timestep.observation.agents_view.shape == (50, 5, 27)
    agent_level, food_level = state.agents.level, state.food_items.level
    assert set(np.unique(agent_level)) == {1, 2, 3, 4}
    np.testing.assert_array_equal(
        food_level, np.broadcast_to(np.sort(agent_level)[:, :3].sum(1, keepdims=True), (50, 3))
    )


def test_lbf_auto_draws_how_many_agents_an_episode_has():
    env = registry.make("lbf/auto:agents=2-5,grid=9,levels=3,coop=true", "none")
    assert env.spec.name.startswith("lbf/auto:agents=2-5,food=5,grid=9")
    keys = jax.random.split(jax.random.key(0), 64)
    state, first = jax.jit(jax.vmap(env.reset))(keys)
    alive = np.asarray(first.observation.alive)
    number = alive.sum(1)
    assert set(number) == {2, 3, 4, 5}
    np.testing.assert_array_equal(alive, np.arange(5) < number[:, None])
    assert not first.observation.agents_view[~alive].any()
    np.testing.assert_array_equal((~state.food_items.eaten).sum(1), number)
    levels = zip(np.asarray(state.agents.level), alive, strict=True)
    weakest = [np.sort(level[here])[:3].sum() for level, here in levels]
    np.testing.assert_array_equal(state.food_items.level.max(1), weakest)
    actions = jax.random.randint(jax.random.key(1), (20, 64, 5), 0, 6)
    last, steps = jax.jit(
        lambda state: jax.lax.scan(
            lambda state, action: jax.vmap(env.step)(state, action, keys), state, actions
        )
    )(state)
    np.testing.assert_array_equal(steps.observation.alive, np.broadcast_to(alive, (20, 64, 5)))
    where = np.asarray(last.agents.position)
    assert (where[~alive] == where[~alive][0]).all()
    assert ((where[alive] >= 0) & (where[alive] < 9)).all()
    assert np.isfinite(steps.reward).all()


@pytest.mark.parametrize("agents", ["0-4", "4-2"])
def test_lbf_auto_refuses_ranges_of_agents_that_are_none(agents):
    with pytest.raises(UserError, match="lbf/auto: agents must be at least"):
        registry.make(f"lbf/auto:agents={agents}")


def test_rware_auto_options_arrive():
    assert jumanji.make_rware_auto().env.grid_size == jumanji.make_rware("tiny-4ag").env.grid_size
    env = jumanji.make_rware_auto(
        agents=6, rows=2, columns=1, height=3, sight=2, requests=5, limit=9
    )
    assert (
        env.spec.name == "rware/auto:agents=6,rows=2,columns=1,height=3,sight=2,requests=5,limit=9"
    )
    assert (env.spec.num_agents, env.spec.obs_dim, env.spec.num_actions, env.spec.time_limit) == (
        6,
        178,
        5,
        9,
    )
    assert env.env.request_queue_size == 5
    assert len(env.env.shelf_ids) == 6  # what the bound on requests is reckoned from
    assert env.env.grid_size == (10, 4)
    assert (
        jumanji.make_rware_auto(agents=3).spec.obs_dim
        == jumanji.make_rware_auto(agents=20).spec.obs_dim
    )


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        ("lbf", {"agents": 0}, "lbf/auto: agents must be at least 1, got 0"),
        ("lbf", {"food": -1}, "lbf/auto: food must be at least 1, got -1"),
        ("lbf", {"grid": 4}, "lbf/auto: grid must be at least 5, got 4"),
        ("lbf", {"agents": 60, "grid": 8}, "lbf/auto: agents must be at most 30 at grid=8, got 60"),
        (
            "lbf",
            {"food": 9, "grid": 8},
            "lbf/auto: food must be at most 5 at grid=8, agents=8, got 9",
        ),
        ("lbf", {"sight": 0}, "lbf/auto: sight must be at least 1, got 0"),
        ("lbf", {"sight": 17}, "lbf/auto: sight must be at most 16 at grid=16, got 17"),
        ("lbf", {"levels": 1}, "lbf/auto: levels must be at least 2, got 1"),
        ("lbf", {"limit": 0}, "lbf/auto: limit must be at least 1, got 0"),
        ("rware", {"agents": 0}, "rware/auto: agents must be at least 1, got 0"),
        (
            "rware",
            {"agents": 111},
            "rware/auto: agents must be at most 110, "
            "the cells of rows=1, columns=3, height=8, got 111",
        ),
        (
            "rware",
            {"agents": 40},
            "rware/auto: requests must be at most 31, "
            "one less than the shelves of rows=1, columns=3, height=8, got 40",
        ),
        (
            "rware",
            {"columns": 1},
            "rware/auto: rows must be at least 2 with columns=1, got 1",
        ),
        ("rware", {"columns": 2}, "rware/auto: columns must be odd, got 2"),
        ("rware", {"rows": 0}, "rware/auto: rows must be at least 1, got 0"),
        ("rware", {"height": 0}, "rware/auto: height must be at least 1, got 0"),
        ("rware", {"sight": 0}, "rware/auto: sight must be at least 1, got 0"),
        ("rware", {"limit": 0}, "rware/auto: limit must be at least 1, got 0"),
    ],
)
def test_impossible_options_say_what_is_possible(make, options, message):
    make_auto = {"lbf": jumanji.make_lbf_auto, "rware": jumanji.make_rware_auto}[make]
    with pytest.raises(UserError) as error:
        make_auto(**options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "options", [{"agents": 30, "food": 1, "grid": 8}, {"agents": 8, "food": 5, "grid": 8}]
)
def test_lbf_auto_as_full_as_allowed(options):
    assert jumanji.make_lbf_auto(**options).spec.num_agents == options["agents"]


def test_rware_auto_as_full_as_allowed():
    env = jumanji.make_rware_auto(agents=110, requests=31)
    state, _ = jax.jit(env.reset)(jax.random.key(0))
    position = np.stack(state.agents.position, axis=1)
    assert len(np.unique(position, axis=0)) == 110


@pytest.mark.parametrize("suite", SUITES)
def test_animate_grid_tasks(suite, tmp_path):
    (env, reset, _), before = compiled(suite), plt.get_fignums()
    env.animate([reset(jax.random.key(seed))[0] for seed in range(2)], tmp_path / "episode.gif")
    with Image.open(tmp_path / "episode.gif") as picture:
        assert (picture.format, picture.n_frames) == ("GIF", 2)
    assert plt.get_fignums() == before


@pytest.mark.parametrize("family", ["lbf", "rware"])
def test_animate_writes_a_gif(family, request, tmp_path):
    task, before = request.getfixturevalue(family), plt.get_fignums()
    states = [task.reset(jax.random.key(seed))[0] for seed in range(3)]
    task.env.animate(states, tmp_path / "episode.gif")
    with Image.open(tmp_path / "episode.gif") as picture:
        assert picture.format == "GIF"
        assert picture.n_frames == 3
    assert plt.get_fignums() == before
