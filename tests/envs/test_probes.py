"""The best and the random return of every probe are what they say, with hand-written policies."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from mam.envs.memory_probes import Convention, Memory, MemoryProbe, TMaze
from mam.envs.probes import PROBES, Channels, Components, Copy, Identity, Matrix, Recall, Target

SIZES = [  # not the defaults, so that the formulas are tested and not the numbers
    Target(num_agents=2, num_actions=3, time_limit=5),
    Components(num_agents=2, sizes=(2, 1, 3), time_limit=5),
    Identity(num_agents=5, num_actions=2, time_limit=3),
    Copy(num_agents=2, num_actions=5, time_limit=9),
    Matrix(num_agents=3, num_actions=4),
    Memory(num_agents=1, num_actions=6, length=7),
    TMaze(num_agents=3, num_actions=2, length=5),
    Convention(num_agents=3, num_actions=5, num_rounds=7),
    Recall(num_agents=5, num_actions=3, time_limit=3),
    Channels(num_agents=6, num_usable=2, time_limit=3),
    Channels(num_agents=5, num_usable=4, time_limit=2),
]
MEMORY = [env for env in SIZES if isinstance(env, MemoryProbe)]


def play(env, policy, num_episodes=2000):
    """Returns the returns of `play_steps`, [num_episodes]."""
    return play_steps(env, policy, num_episodes)[1].sum(axis=1)


def play_steps(env, policy, num_episodes):
    """Plays `policy(views so far, view, key)`, all episodes at once.

    Views of steps to come are zeros. Returns views [num_episodes, T, N, O] and rewards
    [num_episodes, T].
    """
    num_steps = env.spec.time_limit

    def episode(key):
        reset_key, steps_key = jax.random.split(key)
        state, first = env.reset(reset_key)

        def step(carry, now):
            (state, view, seen), (index, key) = carry, now
            action_key, step_key = jax.random.split(key)
            seen = seen.at[index].set(view)
            state, timestep = env.step(state, policy(seen, view, action_key), step_key)
            return (state, timestep.observation.agents_view, seen), timestep

        view = first.observation.agents_view
        seen = jnp.zeros((num_steps, *view.shape))
        steps = jnp.arange(num_steps), jax.random.split(steps_key, num_steps)
        (_, _, seen), timesteps = jax.lax.scan(step, (state, view, seen), steps)
        return seen, timesteps.reward.mean(axis=1), timesteps.ended

    keys = jax.random.split(jax.random.key(0), num_episodes)
    seen, rewards, ended = jax.jit(jax.vmap(episode))(keys)
    assert ended[:, -1].all()
    assert not ended[:, :-1].any()
    return np.asarray(seen), np.asarray(rewards)


def optimal(env):
    """The policy that earns `env.optimal_return`."""

    def copy(seen, view, key):
        return jnp.full(env.num_agents, jax.random.randint(key, (), 0, env.num_actions))

    def components(seen, view, key):
        parts = jnp.split(view, np.cumsum(env.sizes)[:-1], axis=-1)
        return jnp.stack([part.argmax(axis=-1) for part in parts], axis=-1)

    def tmaze(seen, view, key):
        cue = seen[0, :, : env.num_actions].sum(axis=0).argmax()
        return jnp.full(env.num_agents, cue)

    def try_in_turn(seen, view, key):
        wrong = seen[:, :, 1].sum(axis=0).astype(jnp.int32)
        return wrong % env.num_actions

    def recall(seen, view, key):
        own, asked, value = jnp.split(view, [env.num_agents, 2 * env.num_agents], axis=1)
        return (asked @ own.T @ value).argmax(axis=1)

    def channels(seen, view, key):
        def assign(usable):
            return linear_sum_assignment(usable, maximize=True)[1].astype(np.int32)

        shape = jax.ShapeDtypeStruct((env.num_agents,), jnp.int32)
        return jax.pure_callback(assign, shape, view, vmap_method="sequential")

    return {
        Channels: channels,
        Identity: lambda seen, view, key: view.argmax(axis=-1),
        Copy: copy,
        Matrix: lambda seen, view, key: jnp.zeros(env.num_agents, jnp.int32),
        Memory: lambda seen, view, key: seen[0].argmax(axis=-1),
        TMaze: tmaze,
        Convention: try_in_turn,
        Recall: recall,
        Target: lambda seen, view, key: view,
        Components: components,
    }[type(env)]


def uniform(env):
    if isinstance(env, Target):
        shape = (env.num_agents, env.num_actions)
        return lambda seen, view, key: jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
    if isinstance(env, Channels):
        return lambda seen, view, key: jax.random.categorical(key, jnp.log(view))
    choices = (
        env.spec.num_actions
        if env.spec.action_components is None
        else jnp.array(env.spec.action_components)
    )
    return lambda seen, view, key: jax.random.randint(key, env.spec.joint_action.shape, 0, choices)


def assert_mean(returns, expected):
    """The mean lies within four standard errors (and rounding)."""
    assert abs(returns.mean() - expected) <= 4 * returns.std() / np.sqrt(len(returns)) + 1e-5


@pytest.mark.parametrize("env", SIZES, ids=repr)
def test_optimal_return(env):
    returns = play(env, optimal(env))
    assert_mean(returns, env.optimal_return)
    if not isinstance(env, Copy | Convention):  # there, luck may help
        assert returns.max() <= env.optimal_return + 1e-5


@pytest.mark.parametrize("env", SIZES, ids=repr)
def test_random_return(env):
    assert_mean(play(env, uniform(env)), env.random_return)
    assert env.random_return < env.optimal_return


def test_an_agent_has_as_many_channels_as_it_should_and_takes_no_others():
    env = Channels(num_agents=7, num_usable=3)
    state, timestep = env.reset(jax.random.key(0))
    assert state.usable.sum(axis=1).tolist() == [3] * 7
    np.testing.assert_array_equal(timestep.observation.action_mask, state.usable)
    np.testing.assert_array_equal(timestep.observation.agents_view, state.usable)


@pytest.mark.parametrize("env", MEMORY, ids=repr)
def test_memoryless_return(env):
    """Where there is something to earn, all episodes look the same; a constant earns the most."""
    seen, rewards = play_steps(env, uniform(env), num_episodes=500)
    pays = rewards.any(axis=0)
    views = seen[:, pays].reshape(-1, *seen.shape[2:])
    np.testing.assert_array_equal(views, np.broadcast_to(views[0], views.shape))

    constant = jnp.ones(env.num_agents, jnp.int32)
    assert_mean(play(env, lambda seen, view, key: constant), env.memoryless_return)
    assert env.random_return <= env.memoryless_return < env.optimal_return


def test_copy_without_seeing_earlier_agents():
    """The best independent agents: agent 0 alternates at random, the others wait for it."""
    env = Copy()

    def independent(seen, view, key):
        return (
            jnp.zeros(env.num_agents, jnp.int32)
            .at[0]
            .set(jax.random.bernoulli(key).astype(jnp.int32))
        )

    assert_mean(play(env, independent), env.independent_return)
    assert env.random_return < env.independent_return < env.optimal_return / 2


def test_copy_pays_nothing_for_a_constant():
    env = Copy()
    assert not play(
        env, lambda seen, view, key: jnp.ones(env.num_agents, jnp.int32), num_episodes=2
    ).any()


def test_copy_and_matrix_show_nothing():
    for env in (Copy(), Matrix()):
        state, first = env.reset(jax.random.key(0))
        _, later = env.step(state, jnp.arange(env.num_agents), jax.random.key(1))
        np.testing.assert_array_equal(first.observation.agents_view, later.observation.agents_view)
        np.testing.assert_array_equal(first.observation.agents_view, 1.0)


def test_matrix_trap_is_an_equilibrium_below_the_optimum():
    env = Matrix()

    def reward(*action):
        return env.step((), jnp.array(action), jax.random.key(0))[1].reward[0]

    assert reward(1, 1) == pytest.approx(env.trap_return)
    assert reward(0, 1) == reward(1, 0) == 0
    p = 1 / env.num_actions
    assert jax.grad(lambda p: p**2 + env.trap_return * (1 - p) ** 2)(p) < 0


def test_memory_hides_the_cue_after_the_first_step():
    env = Memory()
    views = []
    for seed in (0, 1):
        state, timestep = env.reset(jax.random.key(seed))
        first = timestep.observation.agents_view
        later = []
        for _ in range(env.length):
            state, timestep = env.step(state, first.argmax(axis=-1), jax.random.key(seed))
            later.append(timestep.observation.agents_view)
        views.append((first, np.stack(later)))
    assert (views[0][0] != views[1][0]).any()
    np.testing.assert_array_equal(views[0][1], views[1][1])


def test_only_one_agent_of_a_tmaze_sees_the_cue():
    """And after the first step they see how far they have come, and nothing else."""
    env = TMaze(num_agents=3, num_actions=4, length=2)
    seen, _ = play_steps(env, uniform(env), num_episodes=100)
    symbols = seen.argmax(axis=-1)
    np.testing.assert_array_equal(seen.sum(axis=-1), 1)
    informed = symbols[:, 0] < env.num_actions
    np.testing.assert_array_equal(informed.sum(axis=1), 1)
    assert (symbols[:, 0][~informed] == 4).all()
    assert {*symbols[:, 0][informed]} == {0, 1, 2, 3}
    assert informed.any(axis=0).all()
    np.testing.assert_array_equal(symbols[:, 1:], np.broadcast_to([[5], [5], [6]], (100, 3, 3)))


def test_every_round_of_a_convention_is_played_against_the_oracle():
    env = Convention(num_agents=2, num_actions=3, num_rounds=5)
    _, rewards = play_steps(env, optimal(env), num_episodes=2000)
    for index, earned in enumerate(rewards[:, ::2].T, start=1):
        assert_mean(earned, env.oracle_round_return(index))
    assert not rewards[:, 1::2].any()


def test_a_convention_reports_its_rounds():
    """Each as it was earned, complete at the end, whatever is done while answers are told."""
    env = Convention(num_agents=2, num_rounds=3)
    state, timestep = env.reset(jax.random.key(0))
    half, right, wrong = state.code.at[0].add(1) % 4, state.code, (state.code + 1) % 4
    rewards, views = [], [timestep.observation.agents_view.argmax(axis=1)]
    for action in (half, right, wrong, right, right):
        state, timestep = env.step(state, action, jax.random.key(1))
        rewards.append(float(timestep.reward[0]))
        views.append(timestep.observation.agents_view.argmax(axis=1))
    assert rewards == [0.5, 0, 0, 0, 1]
    assert timestep.metrics == {"round_1": 0.5, "round_2": 0.0, "round_3": 1.0}
    np.testing.assert_array_equal(views[:5], [[0, 0], [1, 2], [0, 0], [1, 1], [0, 0]])


def test_recall_asks_for_every_other_agent():
    env = Recall(num_agents=3, num_actions=2, time_limit=4)
    seen, _ = play_steps(env, uniform(env), num_episodes=100)
    own, asked, value = (part.argmax(axis=-1) for part in np.split(seen, [3, 6], axis=-1))
    np.testing.assert_array_equal(np.sort(own), np.broadcast_to([0, 1, 2], own.shape))
    assert {*(asked - own).ravel() % 3} == {1, 2}
    assert {*value.ravel()} == {0, 1}
    assert (own[:, 1:] != own[:, :-1]).any()  # new at every step


@pytest.mark.parametrize("name", PROBES)
def test_ends_are_of_the_documented_kind(name):
    env = PROBES[name]()
    state, timestep = env.reset(jax.random.key(0))
    while not timestep.ended:
        action = uniform(env)(None, timestep.observation.agents_view, jax.random.key(0))
        state, timestep = env.step(state, action, jax.random.key(0))
    assert bool(timestep.terminated) == isinstance(env, Matrix | MemoryProbe)
    assert bool(timestep.truncated) != bool(timestep.terminated)


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_is_called_what_it_is_made_by(name):
    assert PROBES[name]().spec.name == f"probe/{name}"


@pytest.mark.parametrize("name", PROBES)
def test_documented_returns_are_those_of_the_task(name):
    env = PROBES[name]()
    memoryless = getattr(env, "memoryless_return", env.optimal_return)
    cells = " | ".join(f"{x:.3g}" for x in (env.optimal_return, memoryless, env.random_return))
    row = rf"^\| `{name.partition('-')[0]}\b.* \| {re.escape(cells)} \|$"
    text = (Path(__file__).parents[2] / "docs/environments.md").read_text()
    assert re.search(row, text, re.MULTILINE)


def test_probes_cannot_be_drawn():
    with pytest.raises(NotImplementedError, match="probe/copy cannot be drawn"):
        Copy().animate([], Path("unused.gif"))
