"""Generalised advantage estimation: a loop in float64, defining relations, values of the dead."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.learning.advantages import constant_value, generalised_advantages, impute_dead_values

LENGTH = 20
SHAPE = (LENGTH, 1000)

gae = partial(jax.jit, static_argnames=("gamma", "gae_lambda"))(generalised_advantages)
constant = partial(jax.jit, static_argnames="gamma")(constant_value)


@pytest.fixture(scope="module")
def random():
    """1,000 trajectories: reward, value, next_value, terminated, truncated; some end both ways."""
    rng = np.random.default_rng(0)
    numbers = (rng.normal(size=SHAPE).astype(np.float32) for _ in range(3))
    return (*numbers, rng.random(SHAPE) < 0.1, rng.random(SHAPE) < 0.1)


@pytest.fixture(scope="module")
def endless(random):
    """The same without ends: the successor's value is the next value, except at the cut."""
    reward, value, next_value, _, _ = random
    never = np.zeros(SHAPE, bool)
    return reward, value, np.concatenate([value[1:], next_value[-1:]]), never, never


def double_loop(reward, value, next_value, terminated, truncated, gamma, gae_lambda):
    """Â_t = Σ_k (γλ)^k δ_{t+k}, up to and including the step at which the episode ends."""
    reward, value, next_value = (np.asarray(x, np.float64) for x in (reward, value, next_value))
    advantage = np.zeros(reward.shape)
    for t in range(LENGTH):
        goes_on = np.ones(reward.shape[1:])
        for k in range(LENGTH - t):
            bootstrap = np.where(terminated[t + k], 0.0, next_value[t + k])
            advantage[t] += (
                goes_on
                * (gamma * gae_lambda) ** k
                * (reward[t + k] + gamma * bootstrap - value[t + k])
            )
            goes_on *= ~terminated[t + k] & ~truncated[t + k]
    return advantage


def assert_close(actual, expected):
    """Within 1e-6 of the largest number there is."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("gamma", "gae_lambda"), [(0.99, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0), (0.0, 0.9)]
)
def test_equals_the_double_loop(random, gamma, gae_lambda):
    out = gae(*random, gamma=gamma, gae_lambda=gae_lambda)
    expected = double_loop(*random, gamma, gae_lambda)
    assert_close(out.advantage, expected)
    assert_close(out.target, expected + random[1])


def test_ends_of_an_environment_are_those_of_all_its_agents(random):
    """[T, B, N] with ends [T, B, 1] is N times [T, B], as the trainer calls it."""
    agents = [[np.roll(x, n, axis=1) for x in random[:3]] for n in range(3)]
    reward, value, next_value = (np.stack(x, axis=-1) for x in zip(*agents, strict=True))
    terminated, truncated = (x[..., None] for x in random[3:])
    out = gae(reward, value, next_value, terminated, truncated, gamma=0.99, gae_lambda=0.95)
    for n, numbers in enumerate(agents):
        alone = gae(*numbers, *random[3:], gamma=0.99, gae_lambda=0.95)
        assert_close(out.advantage[..., n], alone.advantage)
        assert_close(out.target[..., n], alone.target)


def test_lambda_zero_is_the_one_step_error(random):
    reward, value, next_value, terminated, _ = random
    out = gae(*random, gamma=0.9, gae_lambda=0.0)
    assert_close(out.advantage, reward + 0.9 * ~terminated * next_value - value)


def test_lambda_one_without_ends_is_the_discounted_return_minus_the_value(endless):
    reward, value, next_value, _, _ = endless
    out = gae(*endless, gamma=0.9, gae_lambda=1.0)
    returns = np.zeros(SHAPE)
    future = next_value[-1].astype(np.float64)
    for t in reversed(range(LENGTH)):
        future = returns[t] = reward[t] + 0.9 * future
    assert_close(out.advantage, returns - value)
    assert_close(out.target, returns)


def test_gamma_zero_looks_no_further_than_the_reward(random):
    out = gae(*random, gamma=0.0, gae_lambda=0.95)
    assert_close(out.advantage, random[0] - random[1])
    assert_close(out.target, random[0])


@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [
        (False, False, 1 + 0.9 * 10 - 2),
        (False, True, 1 + 0.9 * 10 - 2),
        (True, False, 1 - 2),
        (True, True, 1 - 2),
    ],
)
def test_a_time_limit_is_bootstrapped_a_termination_is_not(terminated, truncated, expected):
    """Defect 2."""
    one = (jnp.full((1,), x) for x in (1.0, 2.0, 10.0, terminated, truncated))
    assert generalised_advantages(*one, gamma=0.9, gae_lambda=0.95).advantage[0] == pytest.approx(
        expected
    )


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_nothing_leaks_across_an_end(random, end):
    """What comes after an end changes nothing before it, to the bit; without the end it does."""
    reward, value, next_value, *_ = random
    cut = LENGTH // 2
    later = np.arange(LENGTH)[:, None] > cut
    changed = [np.where(later, 7 * x + 3, x) for x in (reward, value, next_value)]
    ends = {name: np.zeros(SHAPE, bool) for name in ("terminated", "truncated")}
    for has_end in (True, False):
        ends[end][cut] = has_end
        before, after = (
            gae(*numbers, **ends, gamma=0.99, gae_lambda=0.95).advantage[: cut + 1]
            for numbers in ((reward, value, next_value), changed)
        )
        assert (before == after).all() == has_end
    ends[end][cut] = True
    nothing = [np.where(later, np.nan, x) for x in (reward, value, next_value)]
    found = gae(*nothing, **ends, gamma=0.99, gae_lambda=0.95).advantage[: cut + 1]
    assert np.isfinite(found).all()


def test_the_successor_of_a_termination_may_be_anything(random):
    """Some environments have no meaningful successor there."""
    reward, value, next_value, terminated, truncated = random
    clean = gae(*random, gamma=0.99, gae_lambda=0.95)
    dirty = np.where(terminated, np.nan, next_value)
    dirty = gae(reward, value, dirty, terminated, truncated, gamma=0.99, gae_lambda=0.95)
    np.testing.assert_array_equal(clean.advantage, dirty.advantage)


VALUE = jnp.array(
    [[1.0, 2.0, 6.0], [4.0, jnp.nan, -1.0], [jnp.inf, jnp.nan, 8.0], [jnp.nan, 7.0, 7.0]]
)
ALIVE = jnp.array(
    [[True, True, True], [True, False, True], [False, False, True], [False, False, False]]
)


@pytest.mark.parametrize(
    ("team_reward", "expected"),
    [
        (
            True,
            [[1, 2, 6], [4, 1.5, -1], [8, 8, 8], [0, 0, 0]],
        ),  # the mean of the living, 0 if there are none
        (False, [[1, 2, 6], [4, 0, -1], [0, 0, 8], [0, 0, 0]]),
    ],
)
def test_values_of_the_dead_are_replaced(team_reward, expected):
    np.testing.assert_array_equal(
        impute_dead_values(VALUE, ALIVE, team_reward=team_reward), expected
    )


@pytest.mark.parametrize(("gamma", "offset"), [(0.99, 0.0), (0.9, -100.0), (1.0, 5.0), (0.0, 1.0)])
def test_the_best_constant_is_right_on_average(random, gamma, offset):
    """Its errors add up to nothing, those of the dead left out, whatever stands there."""
    reward, _, _, terminated, _ = random
    alive = np.random.default_rng(1).random(SHAPE) < 0.7
    value = constant(np.where(alive, reward + offset, np.nan), terminated, alive, gamma=gamma)
    error = reward + offset + gamma * np.where(terminated, 0, value) - value
    assert error[alive].mean() == pytest.approx(0, abs=1e-5 * max(1, abs(offset)))


def test_the_best_constant_of_what_never_ends(endless):
    reward, _, _, never, _ = endless
    alive = np.ones(SHAPE, bool)
    assert constant(0 * reward - 10, never, alive, gamma=0.99) == pytest.approx(-1000, rel=1e-4)
    assert constant(reward, never, alive, gamma=1.0) == 0
