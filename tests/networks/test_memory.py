"""Memories: what every one must keep, alone, with the last action, with a clock; GRU's parity."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mam.config import Config, NetworkConfig, PPOConfig, RecurrenceConfig
from mam.errors import UserError
from mam.networks.actions import Categorical
from mam.networks.clock import at_step, counts_of
from mam.networks.memory.base import unroll_successors
from mam.networks.memory.registry import MEMORIES, make_memory
from mam.networks.policy import sequence_length

T, B, N, E = 6, 2, 3, 4
RESETS = arrays.arrays(bool, (T, B), elements=st.booleans())
thorough = settings(max_examples=60, deadline=None, derandomize=True, database=None)
RECURRENT = [name for name in MEMORIES if name != "none"]
every_memory = pytest.mark.parametrize(
    "name", [*RECURRENT, "gru+action", "gru+clock", "mamba+action", "mamba+norm", "mamba+off"]
)
DISTRIBUTION = Categorical(3)


def config_of(name):
    memory, _, option = (name or "").partition("+")
    own = RecurrenceConfig(
        d_state=4,
        last_action=option == "action",
        normalise=option == "norm",
        clock={"clock": "on", "off": "off"}.get(option, "auto"),
    )
    return NetworkConfig(d_model=E, memory=memory or None, recurrence=own)


def build(name, *, key):
    return make_memory(config_of(name), DISTRIBUTION, key=key)


def random_like(shapes, spread, seed):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):  # actions, and steps
            return rng.integers(0, 3, leaf.shape).astype(leaf.dtype)
        return rng.normal(0.0, spread, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, shapes)


@functools.cache
def make(name):
    """With large random parameters."""
    shapes = jax.eval_shape(functools.partial(build, name), key=jax.random.key(0))
    return random_like(shapes, 0.7, seed=0)


@functools.cache
def state_of(name):
    """Not that before an episode."""
    return random_like(jax.eval_shape(lambda: make(name).init((B, N))), 1.0, seed=1)


X, SUCCESSOR = (
    np.random.default_rng(seed).normal(size=(T, B, N, E)).astype(np.float32) for seed in (2, 3)
)
ACTION = jnp.asarray(np.random.default_rng(4).integers(0, 3, (T, B, N)), jnp.int32)


@jax.jit
def unroll(recurrence, state, x, reset):
    return recurrence.unroll(state, x, reset, ACTION)


@jax.jit
def step_by_step(recurrence, state, x, reset):
    def step(state, inputs):
        x, reset, action = inputs
        state, y = recurrence.step(state, x, reset)
        return recurrence.note(state, action), y

    return jax.lax.scan(step, state, (x, reset, ACTION))


@jax.jit
def influence(recurrence, state, x, reset):
    """Which output depends on the first state (first column) and on which input: [T, 1 + T, B]."""
    numbers, counts = eqx.partition(state, eqx.is_inexact_array)

    def read(numbers, x):
        return recurrence.unroll(eqx.combine(numbers, counts), x, reset, ACTION)[1]

    y, pull_back = jax.vjp(read, numbers, x)
    state_gradient, x_gradient = jax.vmap(pull_back)(jnp.eye(T)[:, :, None, None, None] * y)
    of_state = [
        jnp.any(leaf.reshape(T, B, -1) != 0.0, axis=-1) for leaf in jax.tree.leaves(state_gradient)
    ]
    of_x = jnp.any(x_gradient != 0.0, axis=(-2, -1))
    return jnp.concatenate([functools.reduce(jnp.logical_or, of_state)[:, None], of_x], axis=1)


@jax.jit
def successors_by_hand(recurrence, state, x, reset, successor):
    """From the states after every step, all of them kept."""

    def step(state, inputs):
        x, reset, action = inputs
        state = recurrence.note(recurrence.step(state, x, reset)[0], action)
        return state, state

    _, states = jax.lax.scan(step, state, (x, reset, ACTION))
    return recurrence.step(states, successor, jnp.zeros_like(reset))[1]


in_one_pass = jax.jit(unroll_successors)


def test_unknown_name():
    with pytest.raises(UserError, match=r"unknown network.memory 'gro': did you mean gru\?"):
        build("gro", key=jax.random.key(0))


@pytest.mark.parametrize("name", [None, "none"])
def test_without_memory_all_axes_are_alike_and_everything_passes(name):
    nothing = build(name, key=jax.random.key(0))
    assert not jax.tree.leaves(nothing)
    x, successor, reset = jnp.asarray(X), jnp.asarray(SUCCESSOR), jnp.ones((T, B), bool)
    state = nothing.init((B, N))
    assert not jax.tree.leaves(state)
    assert nothing.step(state, x, reset)[1] is x
    assert nothing.unroll(state, x, reset, ACTION)[1] is x
    assert unroll_successors(nothing, state, x, reset, ACTION, successor) is successor


@every_memory
@thorough
@given(reset=RESETS)
def test_unrolling_is_stepping(name, reset):
    args = make(name), state_of(name), X, reset
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        unroll(*args),
        step_by_step(*args),
    )


@every_memory
@thorough
@given(reset=RESETS)
def test_memory_is_that_of_the_episode_exactly(name, reset):
    """Defect 9: not a step further and not a step less, wherever episodes start."""
    episode = np.cumsum(reset, axis=0)  # 0 is the one that began before the first step
    began = np.concatenate([np.zeros((1, B), int), episode])
    expected = (episode[:, None] == began[None]) & np.tri(T, 1 + T, 1, dtype=bool)[..., None]
    np.testing.assert_array_equal(influence(make(name), state_of(name), X, reset), expected)


@every_memory
def test_an_episode_starts_from_the_first_state(name):
    """Whatever was in the memory, NaN included."""
    reset = np.zeros((T, B), bool)
    blank = jax.tree.map(jnp.zeros_like, make(name)).init((B, N))
    expected = unroll(make(name), blank, X, reset)
    reset[0] = True

    def spoil(leaf):
        return np.full_like(leaf, np.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else 2)

    spoilt = jax.tree.map(spoil, state_of(name))
    jax.tree.map(np.testing.assert_array_equal, unroll(make(name), spoilt, X, reset), expected)


@every_memory
@thorough
@given(reset=RESETS)
def test_successors_are_read_from_the_state_after_their_step(name, reset):
    """And leave no trace in it."""
    args = make(name), state_of(name), X, reset
    found, expected = in_one_pass(*args, ACTION, SUCCESSOR), successors_by_hand(*args, SUCCESSOR)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_gru_is_that_of_equinox():
    gru = make("gru")
    cell = eqx.nn.GRUCell(E, E, key=jax.random.key(0))
    weights = (gru.inputs.weight.T, gru.hidden.weight.T, gru.inputs.bias, gru.new_bias)
    cell = eqx.tree_at(lambda c: (c.weight_ih, c.weight_hh, c.bias, c.bias_n), cell, weights)

    @jax.jit
    def reference(cell, hidden, x):
        each = jax.vmap(jax.vmap(cell))
        return jax.lax.scan(lambda h, x: (each(x, h),) * 2, hidden, x)

    actual = unroll(gru, state_of("gru"), X, np.zeros((T, B), bool))
    expected = reference(cell, state_of("gru"), X)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected
    )
    assert np.std(actual[1]) > 0.3
    np.testing.assert_array_equal(gru.init((B, N)), np.zeros((B, N, E)))


@pytest.mark.parametrize(
    ("memory", "setting", "counts"),
    [
        ("mamba", "auto", True),
        ("mamba2", "auto", True),
        ("gru", "auto", False),
        (None, "auto", False),
        ("mamba", "off", False),
        ("gru", "on", True),
        (None, "on", True),
    ],
)
def test_who_reads_a_clock(memory, setting, counts):
    """The same steps, later in the episode."""
    own = RecurrenceConfig(d_state=4, clock=setting)
    config = NetworkConfig(d_model=E, memory=memory, recurrence=own)
    recurrence = make_memory(config, DISTRIBUTION, key=jax.random.key(0))
    state = recurrence.init((B, N))
    assert len(counts_of(state)) == counts
    later = at_step(state, jnp.array([0.0, 7.0]))
    assert [list(x) for x in counts_of(later)] == [[0, 7]] * counts
    reset = np.zeros((T, B), bool)
    (_, y), (after, moved) = (unroll(recurrence, s, X, reset) for s in (state, later))
    assert [list(x) for x in counts_of(after)] == [[T, T + 7]] * counts
    np.testing.assert_array_equal(y[:, 0], moved[:, 0])
    assert (np.abs(y - moved)[:, 1].max() > 1e-3) == counts


@pytest.mark.parametrize(
    ("changes", "recurrence", "length"),
    [
        ({}, {"clock": "on"}, 1),
        ({}, {"clock": "on", "last_action": True}, 128),
        ({"policy": "rec_mam"}, {}, 128),
        ({"policy": "sable"}, {"clock": "on"}, 128),
        ({"policy": "json:loads"}, {"clock": "on"}, 128),  # may remember what it likes
        ({"learn": "distill", "teacher": "runs/one"}, {"clock": "on"}, 128),
        ({"policy": "rec_mam", "ppo": PPOConfig(sequence_length=4)}, {}, 4),
    ],
)
def test_a_clock_alone_is_learned_from_single_steps(changes, recurrence, length):
    config = Config(network=NetworkConfig(recurrence=RecurrenceConfig(**recurrence)), **changes)
    assert sequence_length(config) == length
