"""CAMAR: what its adapter says of episodes. The contract of environments has it, too."""

from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.envs import camar, registry
from mam.envs.tasks import CAMAR_TASKS
from mam.errors import UserError

needs_camar = pytest.mark.skipif(not find_spec("camar"), reason="needs the extra camar")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("auto:agents=0", "agents must be at least 1, got 0"),
        ("auto:density=1.5", r"density must lie in \[0, 1\), got 1.5"),
        ("auto:agents=9,rows=4,columns=4,density=0", "18 of which 16 are free at rows=4, columns"),
        ("caves:size=13", "size must be at least 14, got 13"),
    ],
)
def test_options_out_of_range(task, message):
    with pytest.raises(UserError, match=message):
        registry.make(f"camar/{task}")


@needs_camar
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("..\n#", "all lines and all maps of .* must be of one length"),
        ("..\n##\n\n.#\n##", "2 agents need a cell each, of which 1 are free"),
        (None, "no maps can be read from .*: .*No such file"),
    ],
)
def test_what_is_no_map(text, message, tmp_path):
    file = tmp_path / "map.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        registry.make(f"camar/text:file={file},agents=2")


@needs_camar
def test_sizes_of_the_tasks():
    for task in CAMAR_TASKS:
        spec = camar.make_camar(task).spec
        assert str(spec.num_agents) == task.split("-")[1]
        assert (spec.obs_dim, spec.num_actions, spec.position_dim) == (8, 2, 2)


@needs_camar
def test_all_on_their_goals_is_an_end_and_the_limit_is_a_cut():
    env = camar.make_camar_auto(agents=2, rows=4, columns=4, density=0.0, limit=4)
    key, still = jax.random.key(0), jnp.zeros((2, 2))
    step = jax.jit(env.step)
    state, timestep = env.reset(key)
    for count in range(1, 5):
        state, timestep = step(state, still, key)
        assert bool(timestep.truncated) == (count == 4)
        assert not timestep.terminated
    assert timestep.metrics["success_rate"] == 0
    # Nobody is later than those who never arrive: the limit's time, three moves of 0.01 s each.
    np.testing.assert_allclose(timestep.metrics["makespan"], 4 * 0.03, rtol=1e-6)
    np.testing.assert_allclose(timestep.metrics["flow_time"], 2 * 4 * 0.03, rtol=1e-6)
    arrived = replace(state, goal_pos=state.physical_state.agent_pos)
    _, timestep = step(arrived, still, key)
    assert timestep.terminated
    assert not timestep.truncated
    assert timestep.metrics["success_rate"] == 1
    assert timestep.metrics["coordination"] == 1
    one_place = replace(state.physical_state, agent_pos=jnp.zeros((2, 2)))
    _, timestep = step(replace(state, physical_state=one_place), still, key)
    np.testing.assert_allclose(timestep.metrics["coordination"], 1 - 1 / 5)


@needs_camar
@pytest.mark.parametrize(
    "task", ["auto:agents=7,rows=5,columns=5", "caves:size=28,agents=7", "text"]
)
def test_what_is_not_near_changes_nothing(task):
    """Cells give what CAMAR does: at the start, where distances are equal, and from anywhere.

    Agents are set anywhere in the map and beyond its edges, one upon another.
    """
    env = registry.make_plain(f"camar/{task}")
    suite = replace(env, env=env.env.suite)

    def both(key):
        (state, first), (bare, same) = env.reset(key), suite.reset(key)
        place = jax.random.uniform(key, (env.spec.num_agents, 2), minval=-0.6, maxval=0.6)
        place = place.at[1].set(place[0]) * jnp.array([env.env.width, env.env.height])
        body = replace(state.physical_state, agent_pos=place)
        action = jnp.sin(place)
        found = env.step(replace(state, physical_state=body), action, key)
        expected = suite.step(replace(bare, physical_state=body), action, key)
        return (first, found[0].num_collisions, found[1]), (
            same,
            expected[0].num_collisions,
            expected[1],
        )

    found, expected = jax.jit(jax.vmap(both))(jax.random.split(jax.random.key(0), 100))
    assert 0.2 < found[1].mean() < 0.9
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6, err_msg=jax.tree_util.keystr(path))


@needs_camar
def test_every_episode_draws_one_of_the_maps(tmp_path):
    file = tmp_path / "maps.txt"
    file.write_text("..#\n...\n\n#..\n...\n")
    env = registry.make_plain(f"camar/text:file={file},agents=2")
    starts = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 20))[0].landmark_pos
    assert len(np.unique(starts, axis=0)) == 2


@needs_camar
def test_an_episode_is_drawn(tmp_path):
    env = camar.make_camar_auto(agents=2, rows=4, columns=4)
    state, _ = env.reset(jax.random.key(0))
    env.animate([state, state], tmp_path / "episode.gif")
    assert (tmp_path / "episode.gif").read_bytes().startswith(b"GIF")
