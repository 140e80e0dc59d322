"""What every policy must keep: it learns a scripted expert from recorded joint actions alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import Config, EvalConfig, NetworkConfig, PPOConfig
from mam.data.steps import spec_without_ids
from mam.data.store import Writer
from mam.envs.probes import Identity
from mam.envs.registry import make_batched
from mam.errors import UserError
from mam.learning import train
from mam.learning.cloning import BehaviourCloning
from mam.learning.objective import WeightedSum
from mam.learning.ppo import PPO
from mam.networks.policy import policies
from mam.runs.record import Controller, record

NUM_UPDATES = 25
CONFIG = Config(
    env="probe/identity",
    agent_id="none",
    total_timesteps=NUM_UPDATES * 128,
    network=NetworkConfig(d_model=16, d_state=2),
    ppo=PPOConfig(num_envs=16, rollout_length=8, num_epochs=2, num_minibatches=2, lr=0.01),
    eval=EvalConfig(num_episodes=16),
)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """24 steps of 8 environments in which every agent names its cue, as its expert does."""
    envs = make_batched(CONFIG.env, 8, CONFIG.agent_id)
    expert = Controller(lambda observation: jnp.argmax(observation.agents_view, axis=-1), envs.spec)
    path = tmp_path_factory.mktemp("recording") / "data"
    with Writer(path, spec_without_ids(envs.spec)) as writer:
        record(envs, expert, writer, 8 * 24 // envs.spec.time_limit)
    return path


def clone(data, policy, objective, num_updates=NUM_UPDATES):
    config = replace(CONFIG, policy=policy, learn="bc", data=str(data))
    trainer = train.make_train(config, objective=objective)
    state, values = trainer.init(jnp.arange(1)), []
    for _ in range(num_updates):
        state, last = trainer.train_step(state)
        values.append(jax.device_get(last))
    return trainer, state, values


@pytest.mark.parametrize("policy", policies())
def test_it_does_what_the_expert_did(policy, recording):
    trainer, state, values = clone(recording, policy, BehaviourCloning())
    assert all(np.isfinite(value["loss"]).all() for value in values)
    assert "explained_variance" not in values[0]  # there is no critic to learn
    played = trainer.evaluate(state.policy, jax.random.split(jax.random.key(5), 1), 16, True)
    assert played["episode_return"].mean() >= 0.95 * Identity().optimal_return


def test_returns_are_learned_beside_and_objectives_add_up(recording):
    """A sum of two halves is the whole, and a critic, if asked for, predicts what experts earn."""
    whole = BehaviourCloning(value_coef=0.5)
    _, _, together = clone(recording, "ippo", whole, 10)
    _, _, in_parts = clone(recording, "ippo", WeightedSum(((0.25, whole), (0.75, whole))), 10)
    for one, other in zip(together, in_parts, strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-4)
    losses = [value["cloning_value_loss"].item() for value in together]
    assert losses[-1] < 0.5 * losses[0]


def test_ppo_refuses_actions_that_are_not_its_own(recording):
    with pytest.raises(
        UserError, match="PPO learns from its own actions: recorded ones have no log-probability"
    ):
        clone(recording, "ippo", PPO(CONFIG.ppo), 1)
