"""CAMAR: what its adapter says of episodes. The contract of environments has it, too."""

from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest

from mam.envs import camar, registry
from mam.envs.tasks import CAMAR_TASKS
from mam.errors import UserError

needs_camar = pytest.mark.skipif(not find_spec("camar"), reason="needs the extra camar")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("agents=0", "agents must be at least 1, got 0"),
        ("density=1.5", r"density must lie in \[0, 1\), got 1.5"),
        ("agents=9,rows=4,columns=4,density=0", "18 of which 16 are free at rows=4, columns=4"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        registry.make(f"camar/auto:{options}")


@needs_camar
def test_sizes_of_the_tasks():
    for task in CAMAR_TASKS:
        spec = camar.make_camar(task).spec
        assert f"random_grid-{spec.num_agents}" == task
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
    arrived = replace(state, goal_pos=state.physical_state.agent_pos)
    _, timestep = step(arrived, still, key)
    assert timestep.terminated
    assert not timestep.truncated
    assert timestep.metrics["success_rate"] == 1


@needs_camar
def test_an_episode_is_drawn(tmp_path):
    env = camar.make_camar_auto(agents=2, rows=4, columns=4)
    state, _ = env.reset(jax.random.key(0))
    env.animate([state, state], tmp_path / "episode.gif")
    assert (tmp_path / "episode.gif").read_bytes().startswith(b"GIF")
