"""Two updates of one policy on one task, by the trainer's own pieces; compiling is all that takes time here."""

from dataclasses import replace
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import Config, NetworkConfig, PPOConfig
from mam.envs.registry import make_batched
from mam.rollout import init_actors, rollout
from mam.train import Learner

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # less time compiling
CONFIG = Config(
    total_timesteps=16,
    network=NetworkConfig(d_model=8, d_state=2),
    ppo=PPOConfig(num_envs=2, rollout_length=4, num_epochs=1, num_minibatches=1),
)

quick_jit = partial(jax.jit, compiler_options=QUICK)


@cache
def environments(task):
    """The batch of environments, and how they start, compiled."""
    envs = make_batched(task, CONFIG.ppo.num_envs)
    return envs, quick_jit(envs.reset)


def draw(path, leaf):
    """A value of about the usual size for a leaf of the training state: drawing with NumPy compiles nothing."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros(leaf.shape, leaf.dtype)
    scale = 0.0 if any(getattr(key, "name", "") in ("mu", "nu") for key in path) else 0.3
    centre = 1.0 if getattr(path[-1], "name", "") == "scale" and scale else 0.0
    return jnp.asarray(np.random.default_rng(leaf.size).normal(centre, scale, leaf.shape), leaf.dtype)


@pytest.fixture(scope="session")
def check_two_updates():
    def check(task, name):
        """Nothing is compiled twice, all numbers are finite, ratios begin at 1, and every parameter moves."""
        envs, reset = environments(task)
        learner = Learner(replace(CONFIG, env=task, policy=name), envs.spec)
        fresh = jax.eval_shape(lambda seed: learner.init(seed, lambda p, k: init_actors(envs, p, k)), 0)
        fresh = eqx.tree_at(lambda s: (s.actors.env_state, s.key), fresh, (None, None))
        state = jax.tree_util.tree_map_with_path(draw, fresh)
        env_state, timestep = reset(jax.random.key(0))
        actors = replace(state.actors, env_state=env_state, observation=timestep.observation, reset=~timestep.ended)
        actors = replace(actors, memory=jax.tree.map(jnp.zeros_like, actors.memory))
        first = state = replace(state, actors=actors, key=jax.random.key(1))

        @quick_jit
        def act(state, key):
            return rollout(envs, state.policy, state.actors, key, CONFIG.ppo.rollout_length)

        learn = quick_jit(learner.learn)
        for update in range(2):
            act_key, learn_key = jax.random.split(jax.random.key(2 + update))
            state, values = learn(state, *act(state, act_key), learn_key)
            values = {name: float(value) for name, value in values.items() if name not in timestep.metrics}
            assert np.isfinite([*values.values()]).all(), values
            assert values["first_ratio_deviation"] <= 1e-5
        assert learn._cache_size() == act._cache_size() == 1
        for (path, before), after in zip(
            jax.tree_util.tree_leaves_with_path(first.policy), jax.tree.leaves(state.policy), strict=True
        ):
            assert not np.array_equal(before, after), jax.tree_util.keystr(path)

    return check
