"""The mechanics of a run, with a linear policy in place of a network: seeds, keys, evaluation, resuming, wiring."""

from dataclasses import dataclass, replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam import train
from mam.checkpoint import restore, save
from mam.config import Config, EvalConfig, PPOConfig
from mam.envs import probes
from mam.envs.probes import Identity
from mam.errors import UserError
from mam.losses import PPOLoss
from mam.types import Evaluation, PolicyOutput
from mam.update import make_batch

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # less time compiling
SEEDS = jnp.array([0, 1, 2])
CONFIG = Config(
    env="probe/identity",  # episodes of 8 steps, cut by the time limit; at best 8, at worst 0
    total_timesteps=64,
    ppo=PPOConfig(num_envs=4, rollout_length=4, num_epochs=2, num_minibatches=2, lr=0.1),
    eval=EvalConfig(num_episodes=3, num_absolute_episodes=5),
)
OPTIMUM = 8


class Linear(eqx.Module):
    """Logits and value are linear in what an agent sees."""

    actor: jax.Array
    critic: jax.Array
    tag: jax.Array  # changes nothing

    def init_memory(self, batch=()):
        return ()

    def _log_prob(self, obs, action):
        log_probs = jax.nn.log_softmax(obs.agents_view @ self.actor)
        return jnp.take_along_axis(log_probs, action[..., None], axis=-1)[..., 0]

    def act(self, memory, obs, reset, key, *, greedy=False):
        logits = obs.agents_view @ self.actor
        action = logits.argmax(-1) if greedy else jax.vmap(jax.random.categorical)(key, logits)
        action = action.astype(jnp.int32)
        order = jnp.broadcast_to(jnp.arange(action.shape[-1], dtype=jnp.int32), action.shape)
        return memory, PolicyOutput(action, self._log_prob(obs, action), self.value(memory, obs), order)

    def evaluate(self, memory, obs, action, order, reset):
        log_prob = self._log_prob(obs, action)
        return Evaluation(log_prob, entropy=-log_prob, value=self.value(memory, obs))

    def value(self, memory, obs):
        return obs.agents_view @ self.critic


def make_linear(name, spec, sizes, *, key):
    critic = jax.random.normal(key, (spec.obs_dim,))
    return Linear(0.1 * jax.random.normal(key, (spec.obs_dim, spec.num_actions)), critic, tag=jnp.zeros(()))


@pytest.fixture(autouse=True, scope="module")
def _linear_policy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_policy", make_linear)
        yield


def make_train(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", partial(jax.jit, compiler_options=QUICK))
        return train.make_train(config)


@pytest.fixture(scope="module")
def trainer():
    return make_train(CONFIG)


def run(trainer, seeds, script="tt"):
    """The state and all values after a script of training (t) and evaluating (e)."""
    state, values = trainer.init(jnp.asarray(seeds)), []
    for letter in script:
        state, new = {"t": trainer.train_step, "e": trainer.evaluate_step}[letter](state)
        values.append(new)
    return state, values


def on_host(tree):
    """NumPy arrays, with keys as their bits."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree)


def assert_same(actual, expected):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, on_host(actual), on_host(expected))


def scripted(state, signs, tag=0.0):
    """The state with policies that always answer their cue (+1), or never (−1), one per seed."""
    num_agents, num_actions = 3, 4
    answer = jnp.concatenate([jnp.zeros((num_agents, num_actions)), 50 * jnp.eye(num_actions)])
    actor = jnp.asarray(signs, jnp.float32)[:, None, None] * answer
    return eqx.tree_at(lambda s: (s.policy.actor, s.policy.tag), state, (actor, jnp.full(len(signs), tag)))


def test_a_state_has_one_leading_axis_of_seeds(trainer):
    state = trainer.init(SEEDS)
    assert {leaf.shape[:1] for leaf in jax.tree.leaves(state)} == {(3,)}
    np.testing.assert_array_equal(state.num_updates, 0)
    np.testing.assert_array_equal(state.best_return, -np.inf)
    assert state.actors.reset.all()


def test_values_are_one_per_seed_and_finite(trainer):
    state, (first, second, evaluation) = run(trainer, SEEDS, "tte")
    assert set(first) == {
        *PPOLoss.__dataclass_fields__,
        *("grad_norm", "first_ratio_deviation", "explained_variance"),
        *("num_episodes", "episode_return", "episode_length"),
    }
    for values in (first, second):
        assert {np.shape(value) for value in values.values()} == {(3,)}
    # Episodes take two rollouts: in the first none ends, in the second all do.
    assert first["num_episodes"].tolist() == [0, 0, 0]
    assert second["num_episodes"].tolist() == [4, 4, 4]
    assert second["episode_length"].tolist() == [8, 8, 8]
    assert all(np.isnan(first[name]).all() for name in ("episode_return", "episode_length"))
    finite = set(first) - {"episode_return", "episode_length"}
    assert all(np.isfinite(values[name]).all() for values in (first, second) for name in finite)
    assert np.isfinite(second["episode_return"]).all()
    assert {np.shape(value) for value in evaluation.values()} == {(3, 3)}
    np.testing.assert_array_equal(state.num_updates, 2)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(trainer):
    once = run(trainer, SEEDS, "tet")
    assert_same(run(trainer, SEEDS, "tet"), once)
    assert_same(run(trainer, SEEDS[::-1], "tet")[0].policy.actor[::-1], once[0].policy.actor)
    assert len({seed.tobytes() for seed in np.asarray(once[0].policy.actor)}) == len(SEEDS)


def test_a_seed_does_not_depend_on_its_neighbours(trainer):
    """Seed k beside others is seed k alone, up to rounding: with a seed axis XLA may sum in another order."""
    together = run(trainer, SEEDS, "tte")
    for k in (0, 2):
        alone = run(trainer, SEEDS[k : k + 1], "tte")
        kth = jax.tree.map(lambda x, k=k: x[k : k + 1], on_host(together))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), kth, on_host(alone))


def test_evaluating_does_not_change_training(trainer):
    seldom, often = (run(trainer, SEEDS, script)[0] for script in ("ttt", "etetete"))
    for part in ("policy", "opt_state", "actors", "key", "num_updates"):
        assert_same(getattr(seldom, part), getattr(often, part))


def test_one_compilation_whatever_the_state_went_through(trainer, tmp_path):
    functions = (trainer.init, trainer.train_step, trainer.evaluate_step, trainer.absolute_metric)

    def use(state):
        state, _ = trainer.train_step(state)
        state, _ = trainer.evaluate_step(state)
        trainer.absolute_metric(state)
        return state

    state = use(trainer.init(SEEDS))
    sizes = [function._cache_size() for function in functions]
    state = use(use(state))
    save(tmp_path, state, {})
    state = use(restore(tmp_path, trainer.init(SEEDS + 1)))
    leaves, structure = jax.tree.flatten(state)
    use(jax.tree.unflatten(structure, [jax.device_put(leaf) for leaf in leaves]))
    assert [function._cache_size() for function in functions] == sizes


def test_training_takes_over_the_memory_of_its_state_and_evaluating_does_not(trainer):
    state = trainer.init(SEEDS)
    trainer.evaluate_step(state)
    trainer.absolute_metric(state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    trainer.train_step(state)
    assert state.policy.actor.is_deleted()
    assert state.opt_state[1][0].mu.actor.is_deleted()


def test_resuming_equals_going_on(trainer, tmp_path):
    """Defect 10: the whole state is saved, the optimiser's too, and nothing outside it matters."""
    whole, values = run(trainer, SEEDS, "teteete")
    half, _ = run(trainer, SEEDS, "tet")
    save(tmp_path, half, {})
    resumed = restore(tmp_path, trainer.init(SEEDS + 7))
    assert_same(resumed, half)
    assert np.abs(np.asarray(resumed.opt_state[1][0].mu.actor)).max() > 0
    for letter, expected in zip("eete", values[3:], strict=True):
        resumed, new = (trainer.train_step if letter == "t" else trainer.evaluate_step)(resumed)
        assert_same(new, expected)
    assert_same(resumed, whole)


def test_evaluation_is_of_the_current_weights(trainer):
    """Defect 4."""
    state, _ = run(trainer, SEEDS, "te")
    for signs in ([1, -1, 1], [-1, 1, -1]):
        _, values = trainer.evaluate_step(scripted(state, signs))
        np.testing.assert_array_equal(values["episode_return"].mean(axis=1), [OPTIMUM * (sign > 0) for sign in signs])


def test_the_evaluation_after_an_update_is_of_what_it_learned(trainer):
    """Defect 4, in the order of a run: with the weights of before the update the same episodes go otherwise."""
    state = trainer.init(SEEDS)
    old = jax.tree.map(jnp.copy, state.policy)
    state, _ = trainer.train_step(state)
    assert (np.abs(np.asarray(state.policy.actor - old.actor)).max(axis=(1, 2)) > 0.1).all()
    new, stale = (
        trainer.evaluate_step(eqx.tree_at(lambda s: s.policy, state, policy))[1] for policy in (state.policy, old)
    )
    assert (new["episode_return"] != stale["episode_return"]).any()


def test_the_best_weights_are_remembered_per_seed_and_the_later_of_equals(trainer):
    state = trainer.init(SEEDS)
    for tag, signs in enumerate(([-1, 1, -1], [1, -1, -1], [1, -1, 1], [-1, 1, 1]), start=1):
        state, _ = trainer.evaluate_step(scripted(state, signs, tag))
    np.testing.assert_array_equal(state.best_return, OPTIMUM)
    np.testing.assert_array_equal(state.best_policy.tag, [3, 4, 4])
    assert_same(state.best_policy.actor, scripted(state, [1, 1, 1]).policy.actor)
    np.testing.assert_array_equal(state.policy.tag, 4)  # and training goes on from the current ones


def test_a_return_that_is_no_number_does_not_hide_later_ones(trainer, monkeypatch):
    state = trainer.init(SEEDS[:1])
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *_, **__: {"episode_return": jnp.full(3, jnp.nan)})
        state, _ = make_train(CONFIG).evaluate_step(scripted(state, [1], tag=1.0))
    state, _ = trainer.evaluate_step(scripted(state, [1], tag=2.0))
    assert (state.best_return, state.best_policy.tag) == (OPTIMUM, 2)


def test_the_absolute_metric_is_of_the_best_weights_on_fresh_episodes(trainer):
    state, _ = trainer.evaluate_step(scripted(trainer.init(SEEDS), [1, 1, -1]))
    values = trainer.absolute_metric(scripted(state, [-1, -1, -1]))
    assert values["episode_return"].shape == (3, 5)
    np.testing.assert_array_equal(values["episode_return"].mean(axis=1), [OPTIMUM, OPTIMUM, 0])
    undecided = eqx.tree_at(lambda s: (s.policy, s.best_policy), state, (trainer.init(SEEDS).policy,) * 2)
    fresh, known = trainer.absolute_metric(undecided), trainer.evaluate_step(undecided)[1]
    assert not np.isin(fresh["episode_return"], known["episode_return"]).all()


def test_evaluation_samples_unless_asked_to_be_greedy(trainer):
    state = eqx.tree_at(
        lambda s: s.policy.actor, scripted(trainer.init(SEEDS), [1, 1, 1]), replace_fn=lambda x: x / 1e3
    )
    greedy = make_train(replace(CONFIG, eval=replace(CONFIG.eval, greedy=True)))
    assert (trainer.evaluate_step(state)[1]["episode_return"] < OPTIMUM).any()
    assert (greedy.evaluate_step(state)[1]["episode_return"] == OPTIMUM).all()


@dataclass(frozen=True)
class BothEnds(Identity):
    """Episodes are cut by the time limit, or terminate there if agent 0 then sees an even cue."""

    def step(self, state, action, key):
        state, timestep = super().step(state, action, key)
        terminated = timestep.truncated & (state.cue[0] % 2 == 0)
        return state, replace(timestep, terminated=terminated, truncated=timestep.truncated & ~terminated)


def test_advantages_are_bootstrapped_from_the_true_successor(monkeypatch):
    """Defect 2, as wired: value of `final_observation`, also where a time limit struck; nothing after a termination."""
    seen = []

    def recording(transitions, advantages):
        jax.debug.callback(lambda *numbers: seen.append(jax.tree.map(np.asarray, numbers)), transitions, advantages)
        return make_batch(transitions, advantages)

    monkeypatch.setattr(train, "make_batch", recording)
    monkeypatch.setitem(probes.PROBES, "identity", BothEnds)
    ppo = replace(CONFIG.ppo, rollout_length=12, gamma=0.9, gae_lambda=0.7)
    trainer = make_train(replace(CONFIG, ppo=ppo))
    state = trainer.init(SEEDS[:1])
    critic = np.asarray(state.policy.critic[0], np.float64)
    trainer.train_step(state)
    jax.effects_barrier()
    ((t, advantages),) = seen
    assert (t.terminated.any(), t.truncated.any(), (t.terminated & t.truncated).any()) == (True, True, False)
    goes_on = ~(t.terminated | t.truncated)
    expected, later = np.zeros(t.reward.shape), 0.0
    for step in reversed(range(12)):
        successor = np.where(t.terminated[step, :, None], 0, t.final_observation.agents_view[step] @ critic)
        value = t.observation.agents_view[step] @ critic
        later = t.reward[step] + 0.9 * (successor + 0.7 * goes_on[step, :, None] * later) - value
        expected[step] = later
    np.testing.assert_allclose(advantages.advantage, expected, atol=1e-5)
    np.testing.assert_allclose(advantages.target, expected + t.observation.agents_view @ critic, atol=1e-5)


def test_explained_variance():
    target = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    for value, explained in ((target, 1), (target + 3, 1), (np.zeros_like(target), 0), (-target, -3)):
        assert float(train._explained_variance(jnp.asarray(value), jnp.asarray(target))) == pytest.approx(
            explained, abs=1e-5
        )


def test_unknown_tasks_are_refused():
    with pytest.raises(UserError, match="probe/identity"):
        make_train(replace(CONFIG, env="probe/identiti"))
