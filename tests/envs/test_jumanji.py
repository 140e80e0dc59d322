"""Conventions of the LBF and RWARE tasks, checked on positions set up by hand."""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from mam.envs import jumanji
from mam.errors import UserError

LOAD = 5
FORWARD = 1
RIGHT, LEFT = 1, 3  # directions of RWARE robots


def load_both(lbf, state, food):
    """Puts LBF's two agents above and below a food item and lets both load."""
    position = state.env_state.food_items.position[food] + jnp.array([[-1, 0], [1, 0]])
    state = replace(state, env_state=state.env_state.replace(agents=state.env_state.agents.replace(position=position)))
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
    np.testing.assert_allclose(first.reward, 0.5)  # two items of equal level; each agent gets all of it
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


def test_lbf_settings():
    env = jumanji.make_lbf("2s-10x10-3p-3f")
    assert (env.spec.num_agents, env.spec.obs_dim, env.spec.num_actions, env.spec.time_limit) == (3, 18, 6, 100)
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
    assert (env.spec.num_agents, env.spec.obs_dim, env.spec.num_actions, env.spec.time_limit) == (4, 66, 5, 500)
    assert env.env.request_queue_size == num_requests
    assert env.env.grid_size == (11, 10)  # 1 × 3 clusters of height 8


@pytest.mark.parametrize("family", ["lbf", "rware"])
def test_animate_writes_a_gif(family, request, tmp_path):
    task = request.getfixturevalue(family)
    states = [task.reset(jax.random.key(seed))[0] for seed in range(3)]
    task.env.animate(states, tmp_path / "episode.gif")
    with Image.open(tmp_path / "episode.gif") as picture:
        assert picture.format == "GIF"
        assert picture.n_frames == 3
    assert plt.get_fignums() == []


def test_missing_jumanji_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "jumanji", None)
    with pytest.raises(UserError, match=r'pip install "mam\[jumanji\]"'):
        jumanji.make_lbf("8x8-2p-2f-coop")
