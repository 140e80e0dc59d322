"""Agent ids, statistics and self-resetting batches, on a task whose outcomes show its keys."""

from dataclasses import dataclass, replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.envs.base import restart, transition
from mam.envs.wrappers import AgentId, AutoReset, EpisodeStatistics, agent_ids
from mam.types import EnvSpec, Observation


@dataclass(frozen=True)
class Coin:
    """Ends with probability 1/3 per step; state and view are drawn from the last key used."""

    spec = EnvSpec("test/coin", num_agents=2, obs_dim=1, num_actions=2, time_limit=1000)

    def reset(self, key):
        state = jax.random.uniform(key)
        return state, restart(self._observe(state))

    def step(self, state, action, key):
        state = jax.random.uniform(key)
        return state, transition(self._observe(state), action.mean(), terminated=state < 1 / 3)

    def animate(self, states, path):
        path.write_text(str(states))

    def _observe(self, state):
        return Observation(jnp.full((2, 1), state), jnp.ones((2, 2), bool), jnp.ones(2, bool))


@partial(jax.jit, static_argnums=0)
def rollout(batch, key):
    """Returns the last state and 20 time steps [T, B, …] where only agent 0 chooses 1."""
    reset_key, steps_key = jax.random.split(key)
    state, _ = batch.reset(reset_key)
    action = jnp.tile(jnp.array([1, 0]), (batch.num_envs, 1))
    return jax.lax.scan(
        lambda state, key: batch.step(state, action, key), state, jax.random.split(steps_key, 20)
    )


@pytest.mark.parametrize(("encoding", "dim"), [("one_hot", 2), ("sinusoid", 16), ("none", 0)])
def test_agent_id_comes_first(encoding, dim):
    env = AgentId(Coin(), encoding)
    assert env.spec == replace(Coin.spec, obs_dim=dim + 1, id_dim=dim)
    state, first = env.reset(jax.random.key(0))
    _, later = env.step(state, jnp.zeros(2, jnp.int32), jax.random.key(1))
    for observation in (
        first.observation,
        first.final_observation,
        later.observation,
        later.final_observation,
    ):
        assert observation.agents_view.shape == (2, dim + 1)
        np.testing.assert_array_equal(observation.agents_view[:, :dim], agent_ids(2, encoding))
    assert (
        later.observation.agents_view[:, dim]
        == Coin().step(state, jnp.zeros(2), jax.random.key(1))[0]
    ).all()


def test_one_hot_is_the_usual_encoding():
    assert AgentId(Coin()) == AgentId(Coin(), "one_hot")
    np.testing.assert_array_equal(agent_ids(5, "one_hot"), np.eye(5))


def test_sinusoids_tell_ten_thousand_agents_apart():
    """With as many features whatever their number is, and the same for the first few: a prefix."""
    ids = agent_ids(10_000, "sinusoid")
    assert (ids.shape, ids.dtype) == ((10_000, 16), np.float32)
    assert len(np.unique(ids, axis=0)) == 10_000
    assert np.abs(ids).max() <= 1
    np.testing.assert_allclose(
        [ids[1, 0], ids[9_999, 7]], 1, rtol=1e-6
    )  # a quarter of 4, and of 40,000 agents
    for num_agents in (1, 2, 37):
        np.testing.assert_array_equal(agent_ids(num_agents, "sinusoid"), ids[:num_agents])
    # Neighbours differ by far more than rounding: by a quarter turn of the fastest pair.
    assert np.abs(np.diff(ids, axis=0)).max(axis=1).min() > 0.9


def test_wrappers_draw_with_the_innermost_environment(tmp_path):
    env = EpisodeStatistics(AgentId(Coin()))
    state, _ = env.reset(jax.random.key(0))
    env.animate([state], tmp_path / "out")
    assert (tmp_path / "out").read_text() == str([state.env_state])


def test_statistics_of_consecutive_episodes():
    """The running values restart after an end and are complete at it."""
    timesteps = rollout(AutoReset(EpisodeStatistics(Coin()), 4), jax.random.key(0))[1]
    length = np.zeros(4)
    for t in range(20):
        length += 1
        np.testing.assert_array_equal(timesteps.metrics["episode_length"][t], length)
        np.testing.assert_allclose(timesteps.metrics["episode_return"][t], length / 2)
        length[timesteps.ended[t]] = 0
    assert timesteps.ended.any(axis=0).all()


@pytest.mark.parametrize("num_envs", [5, 70])
def test_auto_reset_starts_new_episodes_exactly_where_one_ended(num_envs):
    """With chunks of 1 and of 2, whatever number of environments ends at once."""
    timesteps = rollout(AutoReset(Coin(), num_envs), jax.random.key(0))[1]
    restarted = (timesteps.observation.agents_view != timesteps.final_observation.agents_view).any(
        axis=(2, 3)
    )
    np.testing.assert_array_equal(restarted, timesteps.ended)
    np.testing.assert_array_equal(
        timesteps.ended, timesteps.final_observation.agents_view[:, :, 0, 0] < 1 / 3
    )


def test_an_environment_does_not_depend_on_how_many_there_are():
    few, many = (
        jax.device_get(rollout(AutoReset(Coin(), num_envs), jax.random.key(0)))
        for num_envs in (3, 40)
    )
    assert eqx.tree_equal(few[0], many[0][:3])
    assert eqx.tree_equal(few[1], jax.tree.map(lambda leaf: leaf[:, :3], many[1]))


def test_seeds_under_vmap_equal_solo_runs():
    batch = AutoReset(EpisodeStatistics(AgentId(Coin())), 5)
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.device_get(jax.vmap(partial(rollout, batch))(keys))
    for seed, key in enumerate(keys):
        alone = jax.device_get(rollout(batch, key))
        assert eqx.tree_equal(jax.tree.map(lambda leaf, seed=seed: leaf[seed], together), alone)


def test_wrapped_environments_compare_by_value():
    """So that they can be static arguments of jitted functions without compiling again."""
    assert AutoReset(AgentId(Coin()), 2) == AutoReset(AgentId(Coin()), 2)
    assert hash(AutoReset(AgentId(Coin()), 2)) == hash(AutoReset(AgentId(Coin()), 2))
    assert AutoReset(AgentId(Coin()), 2) != replace(AutoReset(AgentId(Coin()), 2), num_envs=3)
