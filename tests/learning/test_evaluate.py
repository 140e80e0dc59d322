"""Playing whole episodes: each counted once, from its reset to its end and no further."""

from dataclasses import dataclass, replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.envs.wrappers import EpisodeStatistics
from mam.learning.evaluate import MOST_KINDS, agents_by_kind, evaluate, with_kinds
from mam.types import EnvSpec, Observation, PolicyOutput, TimeStep

NUM_EPISODES = 40


@dataclass(frozen=True)
class Drawn:
    """Episodes of 1 to 5 steps, drawn at the reset; the view is the number of steps so far.

    Steps after the end, which only a mistaken evaluation would count, earn NaN and do not end.
    """

    spec = EnvSpec("test/drawn", num_agents=2, obs_dim=1, num_actions=100, time_limit=10**9)

    def reset(self, key):
        state = jnp.array([jax.random.randint(key, (), 1, 6), 0])
        return state, self._timestep(state, jnp.zeros(2))

    def step(self, state, action, key):
        earned = action * 10.0 ** state[1]
        state = state + jnp.array([0, 1])
        return state, self._timestep(state, jnp.where(state[1] > state[0], jnp.nan, earned))

    def animate(self, states, path):
        raise NotImplementedError

    def _timestep(self, state, reward):
        length, time = state
        view = jnp.broadcast_to(time.astype(float), (2, 1))
        obs = Observation(view, jnp.ones((2, 100), bool), alive=jnp.ones(2, bool))
        over, even = time == length, length % 2 == 0
        return TimeStep(
            obs, reward, over & even, over & ~even, obs, metrics={"drawn": length.astype(float)}
        )


class Scripted(eqx.Module):
    """Greedy agents choose `weight` + steps since the last reset, others at random."""

    weight: jax.Array
    calls: list = eqx.field(static=True)

    def init_memory(self, batch=()):
        return jnp.full(batch, 50, jnp.int32)  # as if left over from an earlier episode

    def act(self, memory, obs, reset, key, *, greedy=False):
        jax.debug.callback(lambda _: self.calls.append(1), memory[0])
        count = jnp.where(reset, 0, memory)
        preferred = jnp.broadcast_to((self.weight + count)[:, None], (count.size, 2))
        action = jnp.where(
            greedy, preferred, jax.vmap(lambda k: jax.random.randint(k, (2,), 0, 100))(key)
        )
        blank = jnp.zeros(action.shape)
        return count + 1, PolicyOutput(
            action.astype(jnp.int32), blank, blank, jnp.zeros(action.shape, jnp.int32)
        )

    def evaluate(self, memory, obs, action, order, reset):
        raise NotImplementedError

    def successor_values(self, memory, obs, action, reset, successor):
        raise NotImplementedError


ENV = EpisodeStatistics(Drawn())
CALLS = []


@partial(jax.jit, static_argnames="greedy")
def _play(weight, key, greedy, max_steps):
    return evaluate(
        ENV, Scripted(weight, CALLS), key, NUM_EPISODES, greedy=greedy, max_steps=max_steps
    )


def play(weight=3, seed=0, *, greedy=True, max_steps=100):
    CALLS.clear()
    metrics = jax.device_get(_play(jnp.asarray(weight), jax.random.key(seed), greedy, max_steps))
    jax.effects_barrier()
    return metrics


def by_hand(weight, length):
    """Return and length of one episode, in a plain loop."""
    state, total = jnp.array([length, 0]), 0.0
    for time in range(100):
        state, timestep = Drawn().step(state, jnp.full(2, weight + time), jax.random.key(0))
        total += float(timestep.reward.mean())
        if timestep.terminated or timestep.truncated:
            return total, time + 1
    raise AssertionError


def test_what_does_not_end_is_cut_off_and_counted():
    """No more steps are taken, and what ended in time is what it was."""
    limit = 3
    whole, cut = play(), play(max_steps=limit)
    assert len(CALLS) == limit
    late = whole["drawn"] > limit
    np.testing.assert_array_equal(cut["unfinished"], late)
    assert 0 < late.sum() < NUM_EPISODES
    assert not whole["unfinished"].any()
    np.testing.assert_array_equal(cut["episode_length"], np.minimum(whole["episode_length"], limit))
    np.testing.assert_array_equal(cut["episode_return"][~late], whole["episode_return"][~late])
    assert (cut["episode_return"][late] < whole["episode_return"][late]).all()


def test_every_episode_equals_one_played_by_hand():
    """Returns, lengths, the task's metrics; memory is reset at the first step only (defect 9)."""
    metrics = play()
    assert set(metrics) == {"episode_return", "episode_length", "drawn", "unfinished"}
    assert all(values.shape == (NUM_EPISODES,) for values in metrics.values())
    assert set(metrics["drawn"]) == {1, 2, 3, 4, 5}
    expected = {length: by_hand(3, length) for length in range(1, 6)}
    for drawn, *found in zip(
        metrics["drawn"], metrics["episode_return"], metrics["episode_length"], strict=True
    ):
        assert found == pytest.approx(expected[int(drawn)])


def test_it_stops_when_the_last_episode_is_over():
    assert play()["drawn"].max() == 5
    assert len(CALLS) == 5


def test_the_weights_decide():
    few, many = (play(weight)["episode_return"] for weight in (3, 5))
    assert (many > few).all()


def test_the_key_decides_everything_else():
    jax.tree.map(np.testing.assert_array_equal, play(greedy=False), play(greedy=False))
    assert (play(seed=1)["drawn"] != play(seed=0)["drawn"]).any()


def test_sampled_unless_greedy():
    """Every episode and agent draws its own actions."""
    sampled = play(greedy=False)
    first_actions = sampled["episode_return"][sampled["drawn"] == 1]
    assert len(set(first_actions)) > 1
    greedy = play(greedy=True)
    assert set(greedy["episode_return"][greedy["drawn"] == 1]) == {3}


class Rivals(Drawn):
    """Agents of two kinds, each of which earns its own."""

    spec = replace(Drawn.spec, team_reward=False, agent_names=("wolf_0", "hare_0"))


def test_returns_of_each_agent_and_of_each_kind():
    env = EpisodeStatistics(Rivals())
    metrics = evaluate(env, Scripted(jnp.asarray(3), []), jax.random.key(0), NUM_EPISODES)
    own = metrics["agent_return"]
    assert own.shape == (NUM_EPISODES, 2)
    assert (own[:, 0] != own[:, 1]).any()
    np.testing.assert_allclose(own.mean(axis=1), metrics["episode_return"], rtol=1e-6)
    kept, kinds = (
        with_kinds(metrics, env.spec, each_agent=each_agent) for each_agent in (True, False)
    )
    assert kept.keys() - kinds.keys() == {"agent_return"}
    assert kinds.keys() - metrics.keys() == {"return_wolf", "return_hare"}
    np.testing.assert_array_equal(kinds["return_hare"], own[:, 1])


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (("wolf_0", "wolf_1", "hare_0"), {"wolf": [0, 1], "hare": [2]}),
        (("wolf1", "hare 7", "wolf-12", "team2_a"), {"wolf": [0, 2], "hare": [1], "team2_a": [3]}),
        (("0", "boss", "1"), {"agent": [0, 2], "boss": [1]}),
        (("wolf_0", "wolf_1"), {}),
        ((), {}),
        (tuple("abcdefghijklmnopqrstuvwxyz"[: MOST_KINDS + 1]), {}),
    ],
)
def test_a_kind_is_a_name_without_its_number(names, kinds):
    assert {kind: rows.tolist() for kind, rows in agents_by_kind(names).items()} == kinds


def test_side_by_side_equals_alone():
    """Under `vmap`, as seeds are, although some finish earlier than others."""
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(
        jax.vmap(lambda key: evaluate(ENV, Scripted(jnp.asarray(3), []), key, 2, greedy=False))
    )(keys)
    alone = jax.jit(lambda key: evaluate(ENV, Scripted(jnp.asarray(3), []), key, 2, greedy=False))
    assert len(set(together["episode_length"].max(axis=1).tolist())) > 1
    for seed, key in enumerate(keys):
        jax.tree.map(
            lambda a, b, seed=seed: np.testing.assert_array_equal(a[seed], b), together, alone(key)
        )
