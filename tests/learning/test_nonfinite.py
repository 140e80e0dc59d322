"""Non-finite values, planted anywhere, are found in that update, which then changes nothing."""

from dataclasses import dataclass, replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mam.config import Config, NetworkConfig, PPOConfig
from mam.envs import probes, tasks
from mam.envs.probes import Identity
from mam.learning import train
from mam.learning.nonfinite import NO_FAULT, first_nonfinite, is_nonfinite
from mam.types import Evaluation, PolicyOutput

NUM_AGENTS, NUM_ACTIONS = 3, 4
SEEDS = jnp.arange(2)
CONFIG = Config(
    policy="fragile",
    env="probe/fragile",
    network=NetworkConfig(observation_norm="layer"),
    ppo=PPOConfig(
        num_envs=4, rollout_length=4, num_epochs=1, num_minibatches=2, normalise_value=False
    ),
)


class Fragile(eqx.Module):
    """A linear policy whose gradients and losses can be broken.

    `steep` has a gradient wherever it is not 0.
    """

    actor: jax.Array
    critic: jax.Array
    steep: jax.Array
    loud: jax.Array

    def init_memory(self, batch=()):
        return ()

    def act(self, memory, obs, reset, key, *, greedy=False):
        logits = obs.agents_view @ self.actor
        action = jax.vmap(jax.random.categorical)(key, logits).astype(jnp.int32)
        order = jnp.broadcast_to(jnp.arange(NUM_AGENTS, dtype=jnp.int32), action.shape)
        return memory, PolicyOutput(
            action, self._log_prob(obs, action), self.value(memory, obs), order
        )

    def evaluate(self, memory, obs, action, order, reset):
        log_prob = self._log_prob(obs, action)
        value = self.value(memory, obs) + 0.0 * jnp.sqrt(jnp.square(self.steep))
        return Evaluation(
            log_prob, entropy=-log_prob, value=jnp.where(self.loud > 1, jnp.inf, value)
        )

    def value(self, memory, obs):
        return obs.agents_view @ self.critic

    def successor_values(self, memory, obs, action, reset, successor):
        return self.value(memory, successor)

    def _log_prob(self, obs, action):
        log_probs = jax.nn.log_softmax(obs.agents_view @ self.actor)
        return jnp.take_along_axis(log_probs, action[..., None], axis=-1)[..., 0]


@dataclass(frozen=True)
class Bribed(Identity):
    """Pays what its state says on top, and shows it to those who are dead."""

    def reset(self, key):
        state, timestep = super().reset(key)
        return (state, jnp.zeros(())), timestep

    def step(self, state, action, key):
        inner, bribe = state
        inner, timestep = super().step(inner, action, key)
        return (inner, bribe), replace(timestep, reward=timestep.reward + bribe)


def make_fragile(name, spec, *args, key):
    actor_key, critic_key = jax.random.split(key)
    shape = (spec.obs_dim, spec.num_actions)
    return Fragile(
        jax.random.normal(actor_key, shape),
        jax.random.normal(critic_key, shape[:1]),
        jnp.ones(()),
        jnp.ones(()),
    )


@pytest.fixture(scope="module")
def trainers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_policy", make_fragile)
        patch.setitem(tasks.SUITES, "probe", replace(tasks.SUITES["probe"], tasks=("fragile",)))
        patch.setitem(probes.PROBES, "fragile", partial(Bribed))
        yield {
            how: train.make_train(replace(CONFIG, on_non_finite=how))
            for how in ("stop", "skip", "rollback")
        }


def bribe(state):
    return state.actors.env_state.env_state[1]


PLANTS = {
    "parameter critic": lambda s: (s.policy.critic, jnp.nan),
    "observation.agents_view": lambda s: (s.actors.observation.agents_view, jnp.inf),
    "reward": lambda s: (bribe(s), jnp.nan),
    "loss": lambda s: (s.policy.loud, 2.0),
    "gradient of steep": lambda s: (s.policy.steep, 0.0),
}


def plant(state, what, seed):
    """The state with a number in one place of one seed that breaks the next update."""
    where = lambda s: PLANTS[what](s)[0]  # noqa: E731
    leaf, number = PLANTS[what](state)
    return eqx.tree_at(where, state, leaf.at[(seed,) + (0,) * (leaf.ndim - 1)].set(number))


def to_numpy(tree):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: np.array(jax.random.key_data(x) if is_key(x) else x), tree)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, to_numpy(a), to_numpy(b))


def seed_of(tree, k):
    return jax.tree.map(lambda x: x[k], to_numpy(tree))


@pytest.mark.parametrize("update", np.random.default_rng(0).integers(0, 6, 3).tolist())
@pytest.mark.parametrize("what", PLANTS)
def test_what_is_planted_is_found_in_that_update_and_nothing_is_lost(trainers, what, update):
    trainer, state = trainers["stop"], trainers["stop"].init(SEEDS)
    for _ in range(update):
        state, values = trainer.train_step(state)
        assert values["non_finite"].tolist() == [NO_FAULT, NO_FAULT]
        assert trainer.first_nonfinite(state, values) == {}
    state = plant(state, what, seed=1)
    before = to_numpy(state)
    state, values = trainer.train_step(state)
    assert trainer.first_nonfinite(state, values) == {1: what}
    assert_same(state, before)


@pytest.mark.parametrize("how", ["skip", "rollback"])
@pytest.mark.parametrize("what", PLANTS)
def test_the_other_seeds_go_on(trainers, what, how):
    trainer = trainers[how]
    state = trainer.init(SEEDS)
    healthy, _ = trainer.train_step(jax.tree.map(jnp.copy, state))
    state = plant(state, what, seed=1)
    before = to_numpy(state)
    state, values = trainer.train_step(state)
    assert trainer.first_nonfinite(state, values) == {1: what}
    assert_same(seed_of(state, 0), seed_of(healthy, 0))
    np.testing.assert_array_equal(
        state.num_updates, 1
    )  # with which the seed draws other random numbers
    for part in ("policy", "actors", "key", "best_policy"):
        assert_same(seed_of(getattr(state, part), 1), seed_of(getattr(before, part), 1))
    rate = CONFIG.ppo.lr * (0.5 if how == "rollback" else 1)
    np.testing.assert_allclose(
        optax.tree.get(state.opt_state, "learning_rate"), [CONFIG.ppo.lr, rate]
    )


def test_half_the_learning_rate_takes_half_the_step(trainers):
    trainer = trainers["rollback"]
    state = trainer.init(SEEDS)
    rate = optax.tree.get(state.opt_state, "learning_rate")
    half = eqx.tree_at(
        lambda s: s.opt_state, state, optax.tree.set(state.opt_state, learning_rate=rate * 1e-3)
    )
    start = np.array(state.policy.actor)
    slow, _ = trainer.train_step(jax.tree.map(jnp.copy, half))
    fast, _ = trainer.train_step(state)
    moved = [np.abs(np.asarray(s.policy.actor) - start).max() for s in (slow, fast)]
    assert moved[0] < 2e-3 * moved[1]


def test_the_first_flag_counts():
    flags = [jnp.asarray(x) for x in (False, True, True)]
    assert int(first_nonfinite(flags)) == 1
    assert int(first_nonfinite(flags[:1])) == NO_FAULT


def test_the_dead_may_see_anything():
    x = jnp.array([[1.0, jnp.nan], [jnp.inf, 2.0]])
    alive = jnp.array([[True, False], [False, True]])
    assert bool(is_nonfinite(x))
    assert not bool(is_nonfinite(x, alive))
    assert not bool(is_nonfinite(x[..., None], alive))
    assert not bool(is_nonfinite(jnp.arange(3)))


@pytest.mark.parametrize("number", [1e30, -1e38, np.float32(3.4e38)])
def test_what_is_large_is_finite(number):
    x = jnp.full(1000, number, jnp.float32)
    assert not bool(is_nonfinite(x))
    assert bool(is_nonfinite(x.at[7].set(jnp.inf)))
    assert bool(is_nonfinite(x.at[7].set(jnp.nan)))
