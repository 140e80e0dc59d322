"""Two updates of one policy on one task, by the trainer's own pieces.

Compiling is all that takes time here. So a task's environments are compiled once, for
all policies, as if they were external ones.
"""

from dataclasses import replace
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import Config, NetworkConfig, PPOConfig
from mam.envs.registry import make_batched
from mam.learning.external import blank_state, external_rollout, start_episodes
from mam.learning.ppo import PPO
from mam.learning.train import Learner

CONFIG = Config(
    total_timesteps=16,
    network=NetworkConfig(d_model=8, d_state=2),
    ppo=PPOConfig(num_envs=2, rollout_length=4, num_epochs=1, num_minibatches=1),
)


class OnHost:
    """A batch of JAX environments as a `ExternalEnvironments`."""

    def __init__(self, task):
        envs = make_batched(task, CONFIG.ppo.num_envs)
        self.spec, self.num_envs = envs.spec, envs.num_envs
        self.lost = np.zeros(envs.num_envs, bool)
        self._reset, self._step = jax.jit(envs.reset), jax.jit(envs.step)

    def reset(self, seed):
        self._key = jax.random.key(seed)
        self._state, timestep = self._reset(self._key)
        return jax.device_get(timestep)

    def step(self, action):
        self._key = jax.random.fold_in(self._key, 1)
        self._state, timestep = self._step(self._state, action, self._key)
        return jax.device_get(timestep)

    def close(self):
        pass


environments = cache(OnHost)


def draw(path, leaf):
    """A value of about the usual size for a leaf of the training state, drawn with NumPy."""
    names = [getattr(key, "name", "") for key in path]
    if "statistics" in names:
        return jnp.full(leaf.shape, 1.0 if names[-1] == "var" else 0.0, leaf.dtype)
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or {"mu", "nu", "actors"} & {*names}:
        return jnp.zeros(leaf.shape, leaf.dtype)
    centre = 1.0 if names[-1] == "scale" else 0.0
    return jnp.asarray(np.random.default_rng(leaf.size).normal(centre, 0.3, leaf.shape), leaf.dtype)


@pytest.fixture
def check_two_updates():
    def check(task, name):
        """Nothing compiles twice, all numbers are finite, ratios begin at 1, parameters move."""
        envs = environments(task)
        learner = Learner(replace(CONFIG, env=task, policy=name), envs.spec, PPO(CONFIG.ppo))

        def init(seed):
            return learner.init(
                seed, lambda policy, key: blank_state(policy, envs.spec, envs.num_envs)
            )

        fresh = jax.eval_shape(jax.vmap(init), jnp.zeros(1, jnp.int32))
        state = jax.tree_util.tree_map_with_path(draw, eqx.tree_at(lambda s: s.key, fresh, None))
        first = state = replace(state, key=jax.random.split(jax.random.key(1), 1))
        carry, timestep = start_episodes(envs, state.actors.memory, num_seeds=1, seed=0)

        learn = jax.jit(jax.vmap(learner.learn))
        for update in range(2):
            keys = jax.random.split(jax.random.key(2 + update))
            carry, found = external_rollout(
                envs, state.policy, carry, keys[:1], CONFIG.ppo.rollout_length
            )
            state, values = learn(state, carry, found, keys[1:])
            carry = state.actors
            values = {
                name: float(value[0])
                for name, value in values.items()
                if name not in timestep.metrics
            }
            assert np.isfinite([*values.values()]).all(), values
            # A sum over dimensions of what is not small: the weights are large, the standard
            # deviations are not.
            assert values["first_ratio_deviation"] <= (3e-5 if envs.spec.continuous else 1e-5)
        assert learn._cache_size() == 1
        for (path, before), after in zip(
            jax.tree_util.tree_leaves_with_path(first.policy),
            jax.tree.leaves(state.policy),
            strict=True,
        ):
            assert not np.array_equal(before, after), jax.tree_util.keystr(path)

    return check
