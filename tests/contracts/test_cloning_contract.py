"""What every policy must keep: it learns a scripted expert from recorded joint actions alone."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import Config, EvalConfig, NetworkConfig, PPOConfig
from mam.envs.probes import Identity
from mam.envs.registry import make_batched
from mam.errors import UserError
from mam.learning import train
from mam.learning.cloning import BehaviourCloning
from mam.learning.experience import Recorded
from mam.learning.objective import WeightedSum
from mam.networks.policy import policies
from mam.types import Transition

NUM_UPDATES = 25
CONFIG = Config(
    env="probe/identity",
    agent_id="none",
    total_timesteps=NUM_UPDATES * 128,
    network=NetworkConfig(d_model=16, d_state=2),
    ppo=PPOConfig(num_envs=16, rollout_length=8, num_epochs=2, num_minibatches=2, lr=0.01),
    eval=EvalConfig(num_episodes=16),
)


@cache
def recording():
    """24 steps of 8 environments in which every agent names its cue, as its expert does."""
    envs = make_batched(CONFIG.env, 8, CONFIG.agent_id)
    state, timestep = jax.jit(envs.reset)(jax.random.key(0))
    step, steps = jax.jit(envs.step), []
    for t in range(24):
        seen, reset = timestep.observation, ~timestep.ended if t == 0 else timestep.ended
        action = jnp.argmax(seen.agents_view, axis=-1).astype(jnp.int32)
        state, timestep = step(state, action, jax.random.key(t + 1))
        steps.append(
            Transition(
                observation=seen,
                reset=reset,
                action=action,
                log_prob=None,
                value=None,
                order=jnp.zeros_like(action),
                reward=timestep.reward,
                terminated=timestep.terminated,
                truncated=timestep.truncated,
                final_observation=timestep.final_observation,
                metrics={},
            )
        )
    return jax.tree.map(lambda *x: np.stack(x), *steps)


def clone(policy, objective, num_updates=NUM_UPDATES):
    config = replace(CONFIG, policy=policy)
    ppo = config.ppo
    source = Recorded(recording(), ppo.num_envs, ppo.rollout_length)
    trainer = train.make_train(config, source, objective)
    state, values = trainer.init(jnp.arange(1)), []
    for _ in range(num_updates):
        state, last = trainer.train_step(state)
        values.append(jax.device_get(last))
    return trainer, state, values


@pytest.mark.parametrize("policy", policies())
def test_it_does_what_the_expert_did(policy):
    trainer, state, values = clone(policy, BehaviourCloning())
    assert all(np.isfinite(value["loss"]).all() for value in values)
    assert "explained_variance" not in values[0]  # there is no critic to learn
    played = trainer.evaluate(state.policy, jax.random.split(jax.random.key(5), 1), 16, True)
    assert played["episode_return"].mean() >= 0.95 * Identity().optimal_return


def test_returns_are_learned_beside_and_objectives_add_up():
    """A sum of two halves is the whole, and a critic, if asked for, predicts what experts earn."""
    whole = BehaviourCloning(value_coef=0.5)
    _, _, together = clone("ippo", whole, 10)
    _, _, in_parts = clone("ippo", WeightedSum(((0.25, whole), (0.75, whole))), 10)
    for one, other in zip(together, in_parts, strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-4)
    losses = [value["cloning_value_loss"].item() for value in together]
    assert losses[-1] < 0.5 * losses[0]


def test_ppo_refuses_actions_that_are_not_its_own():
    with pytest.raises(
        UserError, match="PPO learns from its own actions: recorded ones have no log-probability"
    ):
        clone("ippo", None, 1)


def test_windows_must_fit_in_the_recording():
    with pytest.raises(UserError, match="windows of 25 steps do not fit in 24 recorded"):
        Recorded(recording(), 2, 25)
