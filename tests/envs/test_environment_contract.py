"""What every task must satisfy, run on one task of each family."""

import functools
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mam.types import Environment


@functools.partial(jax.jit, static_argnums=0)
def random_actions(spec, timestep, key):
    mask = timestep.observation.action_mask
    if spec.continuous:
        return jax.random.uniform(key, mask.shape, minval=-1.0, maxval=1.0)
    cuts = np.cumsum(spec.action_components or ())[:-1].astype(int)
    parts = jnp.split(jnp.where(mask, 0.0, -jnp.inf), cuts, axis=-1)
    choices = [jax.random.categorical(key, part).astype(jnp.int32) for part in parts]
    return choices[0] if spec.action_components is None else jnp.stack(choices, axis=-1)


def play_episode(task, seed):
    """Returns the time steps of one episode of random legal actions, the first included."""
    key = jax.random.key(seed)
    state, timestep = task.reset(key)
    timesteps = [timestep]
    while not timestep.ended:
        key, action_key, step_key = jax.random.split(key, 3)
        state, timestep = task.step(
            state, random_actions(task.env.spec, timestep, action_key), step_key
        )
        timesteps.append(timestep)
    return [host(timestep) for timestep in timesteps]


def host(tree):
    """Returns the leaves as NumPy arrays, random keys as their numbers."""

    def convert(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return jax.tree.map(convert, tree)


def avals(tree):
    return jax.tree.map(
        lambda leaf: f"{leaf.dtype} {leaf.shape}" + " weak" * getattr(leaf, "weak_type", False),
        tree,
    )


def test_follows_the_protocol(task):
    assert isinstance(task.raw, Environment)
    assert isinstance(task.env, Environment)


def test_step_returns_what_reset_returns(task):
    """Same structure, shapes, dtypes and weak types, so that loops over steps compile once."""
    key = jax.eval_shape(jax.random.key, 0)
    spec = task.env.spec
    first = jax.eval_shape(task.env.reset, key)
    later = jax.eval_shape(task.env.step, first[0], spec.joint_action, key)
    assert avals(first) == avals(later)
    assert not any(aval.endswith("weak") for aval in jax.tree.leaves(avals(first)))


def test_shapes_and_dtypes_match_the_spec(task):
    spec = task.env.spec
    _, timestep = jax.eval_shape(task.env.reset, jax.eval_shape(jax.random.key, 0))
    for observation in (timestep.observation, timestep.final_observation):
        view, mask, alive = observation.agents_view, observation.action_mask, observation.alive
        assert (view.shape, view.dtype) == ((spec.num_agents, spec.obs_dim), jnp.float32)
        assert (mask.shape, mask.dtype) == ((spec.num_agents, spec.num_actions), jnp.bool)
        assert (alive.shape, alive.dtype) == ((spec.num_agents,), jnp.bool)
        grid, state = observation.grid, observation.state
        assert (None if grid is None else grid.shape[1:]) == spec.grid_shape
        assert grid is None or (grid.shape[0], grid.dtype) == (spec.num_agents, spec.grid_dtype)
        assert (None if state is None else (*state.shape, state.dtype)) == (
            None if spec.state_dim is None else (spec.state_dim, jnp.float32)
        )
        places = observation.positions
        assert (None if places is None else (*places.shape, places.dtype)) == (
            None if spec.position_dim is None else (spec.num_agents, spec.position_dim, jnp.float32)
        )
    assert (timestep.reward.shape, timestep.reward.dtype) == ((spec.num_agents,), jnp.float32)
    assert timestep.terminated.shape == timestep.truncated.shape == ()
    assert all(
        (metric.shape, metric.dtype) == ((), jnp.float32) for metric in timestep.metrics.values()
    )


def test_reset_depends_on_the_key_only(task):
    one, same = task.reset(jax.random.key(3)), task.reset(jax.random.key(3))
    assert eqx.tree_equal(host(one), host(same))


def test_episode(task):
    """Starts clean, always leaves a legal action, shares rewards, ends for one reason."""
    spec = task.env.spec
    first, *rest = play_episode(task, seed=0)
    assert not (first.terminated | first.truncated)
    assert not first.reward.any()
    for timestep in (first, *rest):
        assert timestep.observation.action_mask.any(axis=-1).all()
        assert timestep.observation.alive.any() or timestep.ended
        assert not timestep.observation.agents_view[
            ~timestep.observation.alive, spec.num_agents :
        ].any()
        assert np.isfinite(timestep.observation.agents_view).all()
        assert eqx.tree_equal(timestep.observation, timestep.final_observation)
        assert (timestep.reward == timestep.reward[0]).all() or not spec.team_reward
    last = rest[-1]
    assert last.terminated ^ last.truncated
    assert len(rest) <= task.env.spec.time_limit
    if last.truncated:
        assert len(rest) == task.env.spec.time_limit
    assert last.metrics["episode_length"] == len(rest)
    np.testing.assert_allclose(
        last.metrics["episode_return"], sum(t.reward.mean() for t in rest), rtol=1e-5
    )


def test_batch_equals_single_environments(task):
    """AutoReset is exact: environment i equals a hand-written loop with the same keys."""
    num_envs, num_steps = 2, task.env.spec.time_limit + 2
    batch = task.batched(num_envs)
    batch_step = jax.jit(batch.step)
    fold_in = jax.jit(jax.random.fold_in)
    state, timestep = jax.jit(batch.reset)(jax.random.key(0))
    single = [task.reset(fold_in(jax.random.key(0), i)) for i in range(num_envs)]
    num_resets = 0
    for t in range(num_steps):
        key, action_key = jax.random.split(jax.random.key(1 + t))
        action = np.asarray(random_actions(task.env.spec, timestep, action_key))
        state, timestep = batch_step(state, action, key)
        step_key, reset_key = jax.random.split(key)
        for i in range(num_envs):
            state_i, timestep_i = task.step(single[i][0], action[i], fold_in(step_key, i))
            if timestep_i.ended:
                num_resets += 1
                state_i, fresh = task.reset(fold_in(reset_key, i))
                timestep_i = replace(timestep_i, observation=fresh.observation)
            single[i] = (state_i, timestep_i)
            row = jax.tree.map(lambda leaf, i=i: leaf[i], host((state, timestep)))
            # To the bit, but for real numbers, which XLA computes in another order for a batch.
            assert eqx.tree_equal(row, host(single[i]), rtol=1e-4, atol=1e-5)
    assert num_resets >= num_envs
