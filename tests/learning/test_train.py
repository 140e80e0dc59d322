"""The mechanics of a run, with a linear policy: seeds, keys, evaluation, resuming, wiring."""

from dataclasses import dataclass, replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import Config, EvalConfig, NetworkConfig, PPOConfig
from mam.envs import probes
from mam.envs.probes import Identity
from mam.errors import UserError
from mam.learning import experience, train
from mam.learning.estimates import estimate
from mam.learning.ppo import PPOLoss
from mam.learning.train import make_train
from mam.networks.layers import Dense
from mam.runs.checkpoint import Writer, newest
from mam.types import Evaluation, PolicyOutput

SEEDS = jnp.array([0, 1, 2])
CONFIG = Config(
    env="probe/identity",  # episodes of 8 steps, cut by the time limit; at best 8, at worst 0
    total_timesteps=64,
    network=NetworkConfig(observation_norm="layer"),
    ppo=PPOConfig(
        num_envs=4, rollout_length=4, num_epochs=2, num_minibatches=2, lr=0.1, normalise_value=False
    ),
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
        action = jnp.where(greedy, logits.argmax(-1), jax.vmap(jax.random.categorical)(key, logits))
        action = action.astype(jnp.int32)
        order = jnp.broadcast_to(jnp.arange(action.shape[-1], dtype=jnp.int32), action.shape)
        return memory, PolicyOutput(
            action, self._log_prob(obs, action), self.value(memory, obs), order
        )

    def evaluate(self, memory, obs, action, order, reset):
        log_prob = self._log_prob(obs, action)
        return Evaluation(log_prob, entropy=-log_prob, value=self.value(memory, obs))

    def value(self, memory, obs):
        return obs.agents_view @ self.critic

    def successor_values(self, memory, obs, action, reset, successor):
        return self.value(memory, successor)


class Layered(Linear):
    """Its value comes from a layer, whose units may change."""

    value_layer: Dense

    def value(self, memory, obs):
        return self.value_layer(obs.agents_view)[..., 0]


class Counting(Linear):
    """Remembers how many steps of the episode it has seen, its value being a point each."""

    def init_memory(self, batch=()):
        return jnp.full(batch, 99, jnp.int32)  # as if left over from an earlier episode

    def act(self, memory, obs, reset, key, *, greedy=False):
        memory = jnp.where(reset, 0, memory)
        return memory + 1, super().act(memory, obs, reset, key, greedy=greedy)[1]

    def _counts(self, memory, reset):
        def step(memory, reset):
            memory = jnp.where(reset, 0, memory)
            return memory + 1, memory

        return jax.lax.scan(step, memory, reset)[1]

    def evaluate(self, memory, obs, action, order, reset):
        return super().evaluate(self._counts(memory, reset), obs, action, order, reset)

    def value(self, memory, obs):
        return super().value(memory, obs) + memory[..., None]

    def successor_values(self, memory, obs, action, reset, successor):
        return self.value(1 + self._counts(memory, reset), successor)


class Imprecise(Linear):
    """Acts with less precise log-probabilities than it learns with, and reports decode passes."""

    def act(self, memory, obs, reset, key, *, greedy=False):
        memory, output = super().act(memory, obs, reset, key, greedy=greedy)
        metrics = {"passes": jnp.full(reset.shape, 3.0)}
        return memory, replace(output, log_prob=output.log_prob + 0.5, metrics=metrics)


def make_linear(name, spec, sizes, decoding, *, key):
    critic = jax.random.normal(key, (spec.obs_dim,))
    actor, tag = 0.1 * jax.random.normal(key, (spec.obs_dim, spec.num_actions)), jnp.zeros(())
    if name == "layered":
        return Layered(actor, critic, tag, Dense(spec.obs_dim, 1, key=key))
    return {"counting": Counting, "imprecise": Imprecise}.get(name, Linear)(actor, critic, tag)


@pytest.fixture(autouse=True, scope="module")
def _linear_policy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_policy", make_linear)
        yield


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


def save(folder, state):
    with Writer(folder) as writer:
        writer.save(state, {})


def to_numpy(tree):
    """NumPy arrays, with keys as their bits."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree)


def assert_same(actual, expected):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, to_numpy(actual), to_numpy(expected))


def scripted(state, signs, tag=0.0):
    """The state with policies that always answer their cue (+1), or never (−1), one per seed."""
    num_agents, num_actions = 3, 4
    answer = jnp.concatenate([jnp.zeros((num_agents, num_actions)), 50 * jnp.eye(num_actions)])
    actor = jnp.asarray(signs, jnp.float32)[:, None, None] * answer
    return eqx.tree_at(
        lambda s: (s.policy.actor, s.policy.tag), state, (actor, jnp.full(len(signs), tag))
    )


def test_a_state_has_one_leading_axis_of_seeds(trainer):
    state = trainer.init(SEEDS)
    assert {leaf.shape[:1] for leaf in jax.tree.leaves(state)} == {(3,)}
    np.testing.assert_array_equal(state.num_updates, 0)
    np.testing.assert_array_equal(state.best_return, -np.inf)
    assert state.actors.reset.all()


@pytest.mark.parametrize(("recompute", "deviation"), [(False, 1 - np.exp(-0.5)), (True, 0.0)])
def test_log_probabilities_of_acting_may_be_replaced_by_the_learners(recompute, deviation):
    ppo = replace(CONFIG.ppo, recompute_log_prob=recompute)
    trainer = make_train(replace(CONFIG, policy="imprecise", ppo=ppo))
    _, values = trainer.train_step(trainer.init(SEEDS))
    np.testing.assert_allclose(values["first_ratio_deviation"], deviation, atol=1e-5)
    np.testing.assert_array_equal(values["passes"], 3.0)  # what the policy reports of itself


def test_steps_keep_the_types_of_the_state_in_double_precision():
    """Else programs compiled for the first would not take the next (JAX_ENABLE_X64)."""
    with jax.enable_x64(True):
        trainer = make_train(CONFIG)
        before = trainer.shapes(np.arange(2))
        for step in (trainer.train_step, trainer.evaluate_step):
            after, _ = jax.eval_shape(step, before)
            assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)


def test_the_learning_rate_falls_to_nothing_if_asked_to(trainer):
    annealed = make_train(replace(CONFIG, ppo=replace(CONFIG.ppo, anneal_lr=True)))  # four updates
    _, values = run(annealed, SEEDS, "tttt")
    rates = np.stack([v["learning_rate"] for v in values])
    np.testing.assert_allclose(rates, np.tile([[0.1], [0.075], [0.05], [0.025]], 3), rtol=1e-6)
    np.testing.assert_allclose(run(trainer, SEEDS, "t")[1][0]["learning_rate"], 0.1)


def test_values_are_one_per_seed_and_finite(trainer):
    state, (first, second, evaluation) = run(trainer, SEEDS, "tte")
    assert set(first) == {
        *PPOLoss.__dataclass_fields__,
        *("grad_norm", "first_ratio_deviation", "explained_variance"),
        *("num_episodes", "episode_return", "episode_length"),
        *("learning_rate", "non_finite"),
    }
    for values in (first, second):
        assert {np.shape(value) for value in values.values()} == {(3,)}
    # Episodes take two rollouts: in the first none ends, in the second all do.
    assert first["num_episodes"].tolist() == [0, 0, 0]
    assert second["num_episodes"].tolist() == [4, 4, 4]
    assert second["episode_length"].tolist() == [8, 8, 8]
    for name in ("episode_return", "episode_length"):
        assert np.isinf(first[name]).all()  # no NaN: JAX_DEBUG_NANS
        assert np.isnan(train.on_host(first)[name]).all()
    finite = set(first) - {"episode_return", "episode_length"}
    assert all(np.isfinite(values[name]).all() for values in (first, second) for name in finite)
    assert np.isfinite(second["episode_return"]).all()
    assert {np.shape(value) for value in evaluation.values()} == {(3, 3)}
    np.testing.assert_array_equal(state.num_updates, 2)


def test_on_the_host_only_what_no_episode_or_stage_gave_is_nan():
    of_seeds = np.float32([np.inf, np.inf, 0.5])
    found = train.on_host(
        {
            "num_episodes": np.int32([0, 2, 1]),
            "episode_return": of_seeds,
            "loss": -of_seeds,
            train.NON_FINITE: np.int32([0, 0, 0]),
        }
    )
    assert {name: x.dtype for name, x in found.items()} == {
        "num_episodes": np.int32,
        "episode_return": np.float32,
        "loss": np.float32,
    }
    np.testing.assert_array_equal(found["episode_return"], [np.nan, np.inf, 0.5])
    np.testing.assert_array_equal(found["loss"], -of_seeds)
    stage = train.on_host({"hidden_distance": of_seeds, "num_episodes": np.ones(3)})
    np.testing.assert_array_equal(stage["hidden_distance"], [np.nan, np.nan, 0.5])
    episodes = np.float32([[np.inf, 1.0]])  # of an evaluation
    of_episodes = train.on_host({"episode_return": episodes})["episode_return"]
    np.testing.assert_array_equal(of_episodes, episodes)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(trainer):
    once = run(trainer, SEEDS, "tet")
    assert_same(run(trainer, SEEDS, "tet"), once)
    assert_same(run(trainer, SEEDS[::-1], "tet")[0].policy.actor[::-1], once[0].policy.actor)
    assert len({seed.tobytes() for seed in np.asarray(once[0].policy.actor)}) == len(SEEDS)


def test_a_seed_does_not_depend_on_its_neighbours(trainer):
    """Seed k beside others is seed k alone, up to rounding: XLA makes another program of one."""
    together = run(trainer, SEEDS, "tte")
    for k in (0, 2):
        alone = run(trainer, SEEDS[k : k + 1], "tte")
        kth = jax.tree.map(lambda x, k=k: x[k : k + 1], to_numpy(together))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            kth,
            to_numpy(alone),
        )


def test_a_seed_has_the_same_bits_beside_any_others(trainer):
    """On CPU, where seeds take turns."""
    together, others = run(trainer, SEEDS, "tte"), run(trainer, jnp.array([7, 2, 0]), "tte")
    for k, place in ((0, 2), (2, 1)):
        assert_same(
            *(
                jax.tree.map(lambda x, i=i: x[i], to_numpy(of))
                for of, i in ((together, k), (others, place))
            )
        )


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
    save(tmp_path, state)
    state = use(newest(tmp_path).restore(trainer.init(SEEDS + 1)))
    leaves, structure = jax.tree.flatten(state)
    use(jax.tree.unflatten(structure, [jax.device_put(leaf) for leaf in leaves]))
    assert [function._cache_size() for function in functions] == sizes


def test_compiled_ahead_it_does_the_same(trainer):
    compiled = trainer.compile(trainer.init(SEEDS))
    assert all(
        isinstance(f, jax.stages.Compiled) for f in (compiled.train_step, compiled.evaluate_step)
    )
    assert compiled.absolute_metric is trainer.absolute_metric
    assert_same(run(compiled, SEEDS, "te"), run(trainer, SEEDS, "te"))


def test_training_takes_over_the_memory_of_its_state_and_evaluating_does_not(trainer):
    state = trainer.init(SEEDS)
    trainer.evaluate_step(state)
    trainer.absolute_metric(state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    trainer.train_step(state)
    assert state.policy.actor.is_deleted()
    assert state.opt_state[1].inner_state[0].mu.actor.is_deleted()


def test_resuming_equals_going_on(trainer, tmp_path):
    """Defect 10: the whole state is saved, the optimiser's too, and nothing outside it matters."""
    whole, values = run(trainer, SEEDS, "teteete")
    half, _ = run(trainer, SEEDS, "tet")
    save(tmp_path, half)
    resumed = newest(tmp_path).restore(trainer.init(SEEDS + 7))
    assert_same(resumed, half)
    assert np.abs(np.asarray(resumed.opt_state[1].inner_state[0].mu.actor)).max() > 0
    for letter, expected in zip("eete", values[3:], strict=True):
        resumed, new = (trainer.train_step if letter == "t" else trainer.evaluate_step)(resumed)
        assert_same(new, expected)
    assert_same(resumed, whole)


def test_evaluation_is_of_the_current_weights(trainer):
    """Defect 4."""
    state, _ = run(trainer, SEEDS, "te")
    for signs in ([1, -1, 1], [-1, 1, -1]):
        _, values = trainer.evaluate_step(scripted(state, signs))
        np.testing.assert_array_equal(
            values["episode_return"].mean(axis=1), [OPTIMUM * (sign > 0) for sign in signs]
        )


def test_the_evaluation_after_an_update_is_of_what_it_learned(trainer):
    """Defect 4, in the order of a run: with the weights before the update, episodes differ."""
    state = trainer.init(SEEDS)
    old = jax.tree.map(jnp.copy, state.policy)
    state, _ = trainer.train_step(state)
    assert (np.abs(np.asarray(state.policy.actor - old.actor)).max(axis=(1, 2)) > 0.1).all()
    new, stale = (
        trainer.evaluate_step(eqx.tree_at(lambda s: s.policy, state, policy))[1]
        for policy in (state.policy, old)
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


def test_each_mode_has_best_weights_of_its_own(trainer, monkeypatch):
    """Sampled play is best at the first evaluation, greedy play at the second."""
    state, returns = trainer.init(SEEDS[:1]), iter([[3.0, 1.0], [2.0, 2.0]])

    def found(*_):
        sampled, greedy = next(returns)
        return {
            "episode_return": jnp.full(4, sampled),
            "greedy_episode_return": jnp.full(4, greedy),
        }

    monkeypatch.setattr(train._Steps, "_play", found)
    for tag in (1.0, 2.0):
        state, _ = make_train(CONFIG).evaluate_step(scripted(state, [1], tag))
    for beside, expected in ((False, (1.0, 3.0)), (True, (2.0, 2.0))):
        best = state.best(beside=beside)
        assert (best.policy.tag, best.mean_return) == expected


def test_a_return_that_is_no_number_does_not_hide_later_ones(trainer, monkeypatch):
    state = trainer.init(SEEDS[:1])
    with monkeypatch.context() as patch:
        patch.setattr(
            experience, "evaluate", lambda *_, **__: {"episode_return": jnp.full(3, jnp.nan)}
        )
        state, _ = make_train(CONFIG).evaluate_step(scripted(state, [1], tag=1.0))
    state, _ = trainer.evaluate_step(scripted(state, [1], tag=2.0))
    assert (state.best_return, state.best_policy.tag) == (OPTIMUM, 2)


def test_the_absolute_metric_is_of_the_best_weights_on_fresh_episodes(trainer):
    state, _ = trainer.evaluate_step(scripted(trainer.init(SEEDS), [1, 1, -1]))
    values = trainer.absolute_metric(scripted(state, [-1, -1, -1]))
    assert values["episode_return"].shape == (3, 5)
    np.testing.assert_array_equal(values["episode_return"].mean(axis=1), [OPTIMUM, OPTIMUM, 0])
    undecided = eqx.tree_at(
        lambda s: (s.policy, s.best_policy), state, (trainer.init(SEEDS).policy,) * 2
    )
    fresh, known = trainer.absolute_metric(undecided), trainer.evaluate_step(undecided)[1]
    assert not np.isin(fresh["episode_return"], known["episode_return"]).all()


def test_evaluation_samples_unless_asked_to_be_greedy_and_reports_the_other_beside(trainer):
    state = eqx.tree_at(
        lambda s: s.policy.actor,
        scripted(trainer.init(SEEDS), [1, 1, 1]),
        replace_fn=lambda x: x / 1e3,
    )
    greedy = make_train(replace(CONFIG, eval=replace(CONFIG.eval, greedy=True)))
    sampled, greedy = (made.evaluate_step(state)[1] for made in (trainer, greedy))
    assert (sampled["episode_return"] < OPTIMUM).any()
    assert (greedy["episode_return"] == OPTIMUM).all()
    np.testing.assert_array_equal(sampled["greedy_episode_return"], greedy["episode_return"])
    np.testing.assert_array_equal(greedy["sampled_episode_return"], sampled["episode_return"])


@dataclass(frozen=True)
class Mortal(Identity):
    """Episodes are cut by the time limit, or terminate there if agent 0 then sees an even cue.

    Agent 0 dies in the third step, agent 1 in the fourth, to come back two steps later; what they
    see meanwhile would be worth a billion. Rewards are a team's, or each agent's own. If agent 1
    parts, it is truncated in the fourth step, and back one step later.
    """

    team_reward: bool = True
    parts: bool = False

    @property
    def spec(self):
        return replace(super().spec, team_reward=self.team_reward)

    def reset(self, key):
        state, timestep = super().reset(key)
        return state, self._bury(state, timestep)

    def step(self, state, action, key):
        answered, alive = action == state.cue, self._alive(state)
        state, timestep = super().step(state, action, key)
        terminated = timestep.truncated & (state.cue[0] % 2 == 0)
        timestep = replace(
            timestep, terminated=terminated, truncated=timestep.truncated & ~terminated
        )
        if not self.team_reward:
            timestep = replace(timestep, reward=(answered & alive).astype(float))
        return state, self._bury(state, timestep)

    def _alive(self, state):
        t = state.step_count
        return jnp.stack([t < 3, (t < 4) | (t >= (5 if self.parts else 6)), t >= 0])

    def _bury(self, state, timestep):
        alive = self._alive(state)
        parts = alive.at[1].set(alive[1] | (self.parts & (state.step_count == 4)))

        def bury(alive):
            view = jnp.where(alive[:, None], timestep.observation.agents_view, 1e9)
            return replace(timestep.observation, alive=alive, agents_view=view)

        return replace(timestep, observation=bury(alive), final_observation=bury(parts))


@pytest.mark.parametrize(("team_reward", "parts"), [(True, False), (False, False), (False, True)])
def test_advantages_are_bootstrapped_from_the_true_successor(monkeypatch, team_reward, parts):
    """Defect 2, as wired: the value of `final_observation` with the memory after the step.

    It counts also where a time limit struck, and nothing after a termination. The dead are worth
    what the living are on average, or nothing if rewards are their own: then to die is to
    terminate, and to be truncated alone is to be cut off.
    """
    seen = []

    def recording(*args):
        found = estimate(*args)
        jax.debug.callback(lambda *numbers: seen.append(jax.tree.map(np.asarray, numbers)), *found)
        return found

    monkeypatch.setattr(train, "estimate", recording)
    monkeypatch.setitem(
        probes.PROBES, "identity", partial(Mortal, team_reward=team_reward, parts=parts)
    )
    ppo = replace(CONFIG.ppo, rollout_length=12, gamma=0.9, gae_lambda=0.7)
    trainer = make_train(replace(CONFIG, policy="counting", ppo=ppo))
    state = trainer.init(SEEDS[:1])
    critic = np.asarray(state.policy.critic[0], np.float64)
    trainer.train_step(state)
    jax.effects_barrier()
    ((t, advantages),) = seen
    assert (t.terminated.any(), t.truncated.any(), (t.terminated & t.truncated).any()) == (
        True,
        True,
        False,
    )
    alive, still_alive = t.observation.alive, t.final_observation.alive
    dies = alive & ~still_alive
    assert (dies.any(), still_alive.all()) == (True, False)

    def worth(observation, num_seen):
        value = observation.agents_view @ critic + num_seen[:, None, None]
        value = np.where(observation.alive, value, np.nan)
        return np.where(
            observation.alive, value, np.nanmean(value, -1, keepdims=True) if team_reward else 0
        )

    num_seen = np.arange(12) % 8
    value, successor = worth(t.observation, num_seen), worth(t.final_observation, num_seen + 1)
    terminated, ended = (
        np.broadcast_to(x[..., None], value.shape)
        for x in (t.terminated, t.terminated | t.truncated)
    )
    if not team_reward:
        terminated, ended = terminated | ~still_alive, ended | ~still_alive
        parted = still_alive[:-1] & ~alive[1:]
        assert parted[~ended[:-1]].any() == parts
        ended[:-1] |= parted
    expected, later = np.zeros(value.shape), 0.0
    for step in reversed(range(12)):
        future = np.where(terminated[step], 0, successor[step] + 0.7 * ~ended[step] * later)
        later = expected[step] = t.reward[step] + 0.9 * future - value[step]
    target = expected + value
    np.testing.assert_allclose(advantages.advantage, np.where(alive, expected, 0), atol=1e-5)
    np.testing.assert_allclose(advantages.target, np.where(alive, target, 0), atol=1e-5)
    if not team_reward:
        np.testing.assert_allclose(advantages.target[dies], t.reward[dies], atol=1e-5)


def test_statistics_are_of_rollouts_seen_and_stand_still_meanwhile(tmp_path):
    """Each train step is taken with those of the rollouts before it; what is best keeps its own."""
    ppo = replace(CONFIG.ppo, normalise_value=True)
    trainer = make_train(replace(CONFIG, policy="layered", network=NetworkConfig(), ppo=ppo))
    state = trainer.init(SEEDS)
    for _ in range(3):
        state, values = trainer.train_step(state)
        assert values["first_ratio_deviation"].max() < 1e-5
    assert (
        state.policy.statistics.features.count == 3 * 4 * 4 * 3
    ).all()  # rollouts, steps, environments, agents
    assert (
        np.abs(state.policy.statistics.features.mean - 0.25) < 0.15
    ).all()  # one of four cues, and no ids
    evaluated, _ = trainer.evaluate_step(state)
    assert_same((evaluated.policy, evaluated.best_policy), (state.policy, state.policy))
    best = to_numpy(state.policy)
    later, _ = trainer.train_step(evaluated)
    assert_same(later.best_policy, best)
    save(tmp_path, later)
    resumed = newest(tmp_path).restore(trainer.init(SEEDS + 7))
    assert_same(trainer.train_step(resumed)[0], trainer.train_step(later)[0])


def test_explained_variance_is_over_the_living():
    target = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    alive = np.random.default_rng(1).random(target.shape) < 0.7
    for value, explained in (
        (target, 1),
        (target + 3, 1),
        (np.zeros_like(target), 0),
        (-target, -3),
    ):
        for garbage in (0.0, 1e9, np.nan):
            dirty = (jnp.asarray(np.where(alive, x, np.float32(garbage))) for x in (value, target))
            actual = train._explained_variance(*dirty, jnp.asarray(alive))
            assert float(actual) == pytest.approx(explained, abs=1e-5)


def test_unknown_tasks_are_refused():
    with pytest.raises(UserError, match="probe/identity"):
        make_train(replace(CONFIG, env="probe/identiti"))
