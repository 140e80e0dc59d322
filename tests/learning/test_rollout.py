"""Acting in a batch: records fit together, and memory is reset exactly where episodes start."""

from dataclasses import dataclass
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.envs.wrappers import AutoReset, EpisodeStatistics
from mam.learning.rollout import init_rollout_state, rollout
from mam.types import EnvSpec, Evaluation, Observation, PolicyOutput, TimeStep

LENGTH, NUM_ENVS, NUM_AGENTS, NUM_ACTIONS = 12, 5, 2, 7


@dataclass(frozen=True)
class Clock:
    """Episodes of 1 to 4 steps, drawn at the reset; even ones terminate, odd ones are truncated.

    The view is (the episode's length, steps so far); an agent earns its action plus the steps
    before it.
    """

    spec = EnvSpec("test/clock", NUM_AGENTS, obs_dim=2, num_actions=NUM_ACTIONS, time_limit=4)

    def reset(self, key):
        state = jnp.array([jax.random.randint(key, (), 1, 5), 0])
        return state, self._timestep(state, jnp.zeros(NUM_AGENTS))

    def step(self, state, action, key):
        reward = (action + state[1]).astype(float)
        state = state + jnp.array([0, 1])
        return state, self._timestep(state, reward)

    def animate(self, states, path):
        raise NotImplementedError

    def _timestep(self, state, reward):
        length, time = state
        view = jnp.broadcast_to(state.astype(float), (NUM_AGENTS, 2))
        action_mask = jnp.ones((NUM_AGENTS, NUM_ACTIONS), bool)
        obs = Observation(view, action_mask, alive=jnp.ones(NUM_AGENTS, bool))
        over, even = time == length, length % 2 == 0
        return TimeStep(
            obs,
            reward,
            terminated=over & even,
            truncated=over & ~even,
            final_observation=obs,
            metrics={},
        )


class Counter(eqx.Module):
    """Its memory is the number of steps since the last reset, also its value and action."""

    taste: jax.Array

    def init_memory(self, batch=()):
        return jnp.full(batch, 99, jnp.int32)  # as if left over from an earlier episode

    def _count(self, memory, reset):
        return jnp.where(reset, 0, memory)

    def _log_probs(self, count, obs):
        return jax.nn.log_softmax(self.taste[count][..., None, :] + obs.agents_view[..., :1])

    def act(self, memory, obs, reset, key, *, greedy=False):
        count = self._count(memory, reset)
        logits = self._log_probs(count, obs)
        action = jax.vmap(jax.random.categorical)(key, logits).astype(jnp.int32)
        output = PolicyOutput(
            action=action,
            log_prob=jnp.take_along_axis(logits, action[..., None], -1)[..., 0],
            value=jnp.broadcast_to(count[..., None], action.shape).astype(float),
            order=jnp.broadcast_to(jnp.arange(NUM_AGENTS, dtype=jnp.int32)[::-1], action.shape),
        )
        return count + 1, output

    def evaluate(self, memory, obs, action, order, reset):
        def step(memory, reset):
            count = self._count(memory, reset)
            return count + 1, count

        _, count = jax.lax.scan(step, memory, reset)
        log_prob = jnp.take_along_axis(self._log_probs(count, obs), action[..., None], -1)[..., 0]
        value = jnp.broadcast_to(count[..., None], action.shape).astype(float)
        return Evaluation(log_prob, jnp.zeros_like(log_prob), value)

    def successor_values(self, memory, obs, action, reset, successor):
        raise NotImplementedError


@partial(jax.jit, static_argnames="sequence_length")
def run(key, sequence_length=None):
    """States around two rollouts, the rollouts, and what the policy says of them later."""
    policy = Counter(taste=jax.random.normal(jax.random.key(9), (100, NUM_ACTIONS)))
    env = AutoReset(EpisodeStatistics(Clock()), NUM_ENVS)
    states, rollouts = [init_rollout_state(env, policy, key)], []
    for seed in (1, 2):
        act_key = jax.random.fold_in(key, seed)
        after, found = rollout(
            env, policy, states[-1], act_key, LENGTH, sequence_length=sequence_length
        )
        states.append(after)
        rollouts.append(found)

    def evaluate(memory, t):
        return policy.evaluate(memory, t.observation, t.action, t.order, t.reset)

    said = [evaluate(found.memory[0], found.transitions) for found in rollouts]
    return states, rollouts, said


@pytest.fixture(scope="module")
def ran():
    return jax.device_get(run(jax.random.key(0)))


@pytest.fixture(scope="module")
def both(ran):
    """The two rollouts as one."""
    return jax.tree.map(lambda *x: np.concatenate(x), *(found.transitions for found in ran[1]))


def test_time_comes_first_then_environments(ran):
    for transitions in (found.transitions for found in ran[1]):
        assert {leaf.shape[:2] for leaf in jax.tree.leaves(transitions)} == {(LENGTH, NUM_ENVS)}
        assert (
            transitions.action.shape == transitions.reward.shape == (LENGTH, NUM_ENVS, NUM_AGENTS)
        )
        assert transitions.observation.agents_view.shape == (LENGTH, NUM_ENVS, NUM_AGENTS, 2)
        assert transitions.order.tolist() == [[[1, 0]] * NUM_ENVS] * LENGTH


def test_the_next_observation_is_the_successor_or_a_new_episode(both):
    """Across the two rollouts too: acting goes on where it stopped."""
    seen, successor = both.observation.agents_view, both.final_observation.agents_view
    ended = both.terminated | both.truncated
    np.testing.assert_array_equal(
        successor[..., 1], seen[..., 1] + 1
    )  # the true one, also at an end
    np.testing.assert_array_equal(successor[..., 0], seen[..., 0])
    goes_on = ~ended[:-1]
    np.testing.assert_array_equal(seen[1:][goes_on], successor[:-1][goes_on])
    np.testing.assert_array_equal(seen[1:][~goes_on][..., 1], 0)
    assert (both.terminated.any(), both.truncated.any(), goes_on.any()) == (True, True, True)


def test_ends_are_where_and_of_the_kind_the_task_says(both):
    length, time = np.moveaxis(both.observation.agents_view[:, :, 0], -1, 0)
    over = time + 1 == length
    np.testing.assert_array_equal(both.terminated, over & (length % 2 == 0))
    np.testing.assert_array_equal(both.truncated, over & (length % 2 == 1))


def test_reset_marks_first_observations(both):
    np.testing.assert_array_equal(both.reset, both.observation.agents_view[:, :, 0, 1] == 0)
    np.testing.assert_array_equal(both.reset[1:], (both.terminated | both.truncated)[:-1])
    assert both.reset[0].all()


def test_memory_counts_from_the_first_step_of_every_episode(both):
    """Defect 9: not one step off, whatever was in the memory before."""
    np.testing.assert_array_equal(both.value, both.observation.agents_view[..., 1])


@pytest.mark.parametrize("sequence_length", [1, 2, LENGTH // 2])
def test_memory_is_kept_before_every_sequence(ran, both, sequence_length):
    """As it was before the policy acted; and whatever the length, the same happens."""
    _, rollouts, _ = jax.device_get(run(jax.random.key(0), sequence_length))
    again = jax.tree.map(lambda *x: np.concatenate(x), *(found.transitions for found in rollouts))
    jax.tree.map(np.testing.assert_array_equal, again, both)
    memory = np.concatenate([found.memory for found in rollouts])
    before = np.concatenate([np.full((1, NUM_ENVS), 99), both.value[:-1, :, 0] + 1])
    np.testing.assert_array_equal(memory, before[::sequence_length])
    np.testing.assert_array_equal(
        np.concatenate([found.memory for found in ran[1]]), before[::LENGTH]
    )


def test_actions_are_evaluated_as_they_were_made(ran):
    for transitions, said in zip((found.transitions for found in ran[1]), ran[2], strict=True):
        np.testing.assert_allclose(said.log_prob, transitions.log_prob, atol=1e-6)
        np.testing.assert_array_equal(said.value, transitions.value)


def test_rewards_and_metrics_are_of_the_action_beside_them(both):
    time = both.observation.agents_view[..., 1]
    np.testing.assert_array_equal(both.reward, both.action + time)
    np.testing.assert_array_equal(both.metrics["episode_length"], time[..., 0] + 1)
    ended = both.terminated | both.truncated
    for b in range(NUM_ENVS):
        last = np.flatnonzero(ended[:, b])
        for start, end in zip([0, *(last[:-1] + 1)], last, strict=True):
            expected = both.reward[start : end + 1, b].sum(axis=0).mean()
            assert both.metrics["episode_return"][end, b] == pytest.approx(expected)


def test_the_state_is_that_of_the_step_that_comes_next(ran):
    states, (_, found), _ = ran
    second = found.transitions
    np.testing.assert_array_equal(
        states[1].observation.agents_view, second.observation.agents_view[0]
    )
    np.testing.assert_array_equal(states[1].reset, second.reset[0])
    np.testing.assert_array_equal(states[1].memory, found.memory[0])
    np.testing.assert_array_equal(states[2].reset, (second.terminated | second.truncated)[-1])
    np.testing.assert_array_equal(states[2].observation.alive, found.final_alive)


def test_keys_differ_by_step_and_environment_and_decide_everything(ran, both):
    for axis in (0, 1):
        assert (both.action != np.roll(both.action, 1, axis)).any(axis=axis).all()
    again, other = (jax.device_get(run(jax.random.key(seed))) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, again[1], ran[1])
    assert (other[1][0].transitions.action != ran[1][0].transitions.action).any()
