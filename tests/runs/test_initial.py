"""Runs that start from earlier ones: from their weights, or from a dataset of their episodes."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import CloningConfig, FinetuneConfig
from mam.data.steps import spec_without_ids
from mam.data.store import Writer
from mam.envs.registry import make_batched
from mam.errors import UserError
from mam.learning.normalise import as_normalised
from mam.learning.train import make_train
from mam.runs import loop
from mam.runs.initial import started_from
from mam.runs.load import load_weights
from mam.runs.record import Controller, record
from mam.types import Observation
from small_run import CONFIG as SEQUENCE
from small_run import INDEPENDENT as CONFIG

# The same with a network for values alone.
POOLED = replace(SEQUENCE, network=replace(SEQUENCE.network, critic="pooled"))


def leaves(tree):
    keys = jax.dtypes.prng_key
    return [
        np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, keys) else x)
        for x in jax.tree.leaves(tree)
    ]


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A finished run of two seeds."""
    folder, trainer = loop.start(CONFIG, tmp_path_factory.mktemp("earlier"))
    loop.run(CONFIG, folder, trainer)
    return folder.path


def test_every_seed_starts_from_the_best_weights_of_the_same_seed(earlier):
    config, best = replace(CONFIG, seed=7, init=str(earlier)), load_weights(earlier)
    trainer = started_from(config, make_train(config))
    state = trainer.init(np.array([7, 8]))
    assert same(state.policy, best.policies)
    assert same(state.best_policy, best.policies)
    alone = replace(config, num_seeds=1)
    state = started_from(alone, make_train(alone)).init(np.array([7]))
    one = int(np.argmax(best.best_return))
    assert same(state.policy, jax.tree.map(lambda x: x[one : one + 1], best.policies))


def test_what_does_not_fit_is_named_or_drawn(earlier):
    config = replace(CONFIG, env="probe/identity", agent_id="none", init=str(earlier))
    with pytest.raises(UserError, match=r"do not fit: .*actor.*; --init-partial takes the others"):
        started_from(config, make_train(config))
    config, told = replace(config, init_partial=True), []
    fresh = make_train(config).init(np.arange(2)).policy
    policy = started_from(config, make_train(config), told.append).init(np.arange(2)).policy
    (line,) = told
    assert line.startswith(f"not taken from {earlier}, but drawn: ")
    best = as_normalised(load_weights(earlier).policies)
    assert (best.statistics.features.count > 0).all()
    assert not as_normalised(policy).statistics.features.count.any()  # of a mean that was drawn
    old = best.network.actor.head.hidden.weight
    assert np.array_equal(as_normalised(policy).network.actor.head.hidden.weight, old)
    taken = [
        a.shape == b.shape and not np.array_equal(a, b)
        for a, b in zip(leaves(fresh), leaves(policy), strict=True)
    ]
    assert any(taken)
    assert not all(taken)


def test_a_clock_is_drawn_beside_a_memory_that_had_none(earlier, tmp_path):
    """And nothing else of it."""
    network = replace(CONFIG.network, memory="gru")
    config = replace(CONFIG, network=network)
    folder, trainer = loop.start(config, tmp_path / "without")
    loop.run(config, folder, trainer)
    clock = replace(network, recurrence=replace(network.recurrence, clock="on"))
    config = replace(config, network=clock, init=str(folder.path))
    with pytest.raises(UserError, match=r"--network\.recurrence\.clock off does without a clock$"):
        started_from(config, make_train(config))
    config, told = replace(config, init_partial=True), []
    policy = started_from(config, make_train(config), told.append).init(np.arange(2)).policy
    assert told[0].count("memory") == told[0].count("memory.dense.weight") == 2  # actor and critic
    old, new = load_weights(folder.path).policies, as_normalised(policy).network.actor.memory
    assert same(new.recurrence, as_normalised(old).network.actor.memory)


def values_of(policies, spec):
    """What every seed's critic says of some observations, in units of reward."""
    obs = Observation(
        jax.random.normal(jax.random.key(0), (8, spec.num_agents, spec.obs_dim)),
        jnp.ones((8, spec.num_agents, spec.num_actions), bool),
        jnp.ones((8, spec.num_agents), bool),
    )

    def value(policy):
        keys = jax.random.split(jax.random.key(1), 8)
        return policy.act(policy.init_memory((8,)), obs, jnp.ones(8, bool), keys)[1].value

    return jax.vmap(value)(as_normalised(policies))


def test_values_mean_the_same_without_their_normalisation(earlier):
    plain = replace(CONFIG, ppo=replace(CONFIG.ppo, normalise_value=False), init=str(earlier))
    trainer, best = started_from(plain, make_train(plain)), load_weights(earlier)
    old = values_of(best.policies, trainer.spec)
    units = as_normalised(best.policies).statistics.values
    assert (abs(units.mean) > 1e-3).all()
    policy = trainer.init(np.arange(2)).policy
    np.testing.assert_allclose(values_of(policy, trainer.spec), old, rtol=1e-5, atol=1e-6)


def test_values_that_were_learned_as_they_are_are_kept_by_the_first_rollout(earlier, tmp_path):
    plain = replace(CONFIG, ppo=replace(CONFIG.ppo, normalise_value=False))
    folder, trainer = loop.start(plain, tmp_path / "plain")
    loop.run(plain, folder, trainer)
    config = replace(CONFIG, init=str(folder.path), init_partial=True)
    trainer = started_from(config, make_train(config), lambda line: None)
    policy = as_normalised(trainer.init(np.arange(2)).policy)
    old = values_of(load_weights(folder.path).policies, trainer.spec)
    np.testing.assert_allclose(values_of(policy, trainer.spec), old, rtol=1e-5, atol=1e-6)
    target = 50 + 10 * jax.random.normal(jax.random.key(2), (2, 16, trainer.spec.num_agents))
    after = jax.vmap(lambda p, x: p.update_values(x, jnp.ones(x.shape, bool)))(policy, target)
    assert (after.statistics.values.mean > 10).all()
    np.testing.assert_allclose(values_of(after, trainer.spec), old, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "base", [CONFIG, SEQUENCE, POOLED], ids=["independent", "sequence", "pooled"]
)
def test_a_start_is_eased_in(base, tmp_path):
    """At first only the critic learns, at a rate that rises; then the policy stays close."""
    easing = FinetuneConfig(critic_warmup=1, kl_coef=0.5, kl_until=1.0, lr_warmup=2)
    config = replace(base, num_seeds=1, init="unread", finetune=easing)
    trainer = make_train(config)
    state = trainer.init(np.arange(1))
    before = jax.device_get(as_normalised(state.policy).network)
    state, values = trainer.train_step(state)
    after = jax.device_get(as_normalised(state.policy).network)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    assert all(jax.tree.leaves(moved.critic))
    assert sum(jax.tree.leaves(moved)) == sum(jax.tree.leaves(moved.critic))
    np.testing.assert_allclose(values["start_kl"], 0, atol=1e-5)
    np.testing.assert_allclose(values["learning_rate"], config.ppo.lr / 2)
    state, values = trainer.train_step(state)
    later = jax.device_get(as_normalised(state.policy).network)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), after, later)
    assert sum(jax.tree.leaves(moved)) > sum(jax.tree.leaves(moved.critic))
    np.testing.assert_allclose(values["learning_rate"], config.ppo.lr)
    _, values = trainer.train_step(state)
    assert values["start_kl"] > 0


def test_a_resumed_run_does_not_read_the_earlier_one_again(earlier, tmp_path):
    source = shutil.copytree(earlier, tmp_path / "source")
    config = replace(CONFIG, init=str(source), finetune=FinetuneConfig(kl_coef=0.1))

    class Stop(loop.Callback):
        def on_update(self, event):
            return True

    folder, trainer = loop.start(config, tmp_path / "run")
    assert loop.run(config, folder, trainer, callbacks=[Stop()]) == "stopped"
    shutil.rmtree(source)
    folder, trainer = loop.resume(tmp_path / "run", config)
    assert loop.run(config, folder, trainer) == "finished"


@pytest.fixture
def dataset(tmp_path):
    envs = make_batched(CONFIG.env, 4, "none")
    action = envs.spec.joint_action
    controller = Controller(lambda observation: np.zeros(action.shape, int), envs.spec)
    with Writer(tmp_path / "data", spec_without_ids(envs.spec)) as writer:
        record(envs, controller, writer, 40)
    return tmp_path / "data"


@pytest.mark.parametrize("learn", ["bc", "ppo"])
def test_an_imitating_run_is_a_run(learn, dataset, tmp_path):
    """Stopped and resumed it equals one that was not; on another dataset it does not go on."""
    config = replace(CONFIG, learn=learn, data=str(dataset))
    folder, trainer = loop.start(config, tmp_path / "whole")
    assert loop.run(config, folder, trainer) == "finished"
    whole = folder.load_state(config, make_train(config))

    class Stop(loop.Callback):
        def on_update(self, event):
            return event.update == 2

    folder, trainer = loop.start(config, tmp_path / "parts")
    assert loop.run(config, folder, trainer, callbacks=[Stop()]) == "stopped"
    folder, trainer = loop.resume(tmp_path / "parts", config)
    assert loop.run(config, folder, trainer) == "finished"
    assert same(whole, folder.load_state(config, make_train(config)))
    evaluations = [record for record in folder.records() if record.kind == "evaluation"]
    nll = np.stack([record.values["held_out_nll"] for record in evaluations])
    assert nll.shape[1] == 2
    assert (nll[-1] < nll[0]).all()

    (dataset / "episodes.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no episodes|is not what it was when"):
        loop.resume(tmp_path / "parts", replace(config, total_timesteps=200))


def test_logs_of_what_cannot_be_played_are_imitated(dataset, tmp_path):
    """The best weights are those that predict best what is held out."""
    config = replace(CONFIG, env="dataset", learn="bc", data=str(dataset))
    folder, trainer = loop.start(config, tmp_path / "run")
    assert loop.run(config, folder, trainer) == "finished"
    records = [record.values for record in folder.records() if record.kind == "evaluation"]
    for values in records:
        np.testing.assert_allclose(values["episode_return"][:, 0], -values["held_out_nll"])
    best = load_weights(folder.path).best_return
    np.testing.assert_allclose(best, np.max([v["episode_return"][:, 0] for v in records], axis=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learn": "bc"}, "--learn bc learns from a dataset: give --data"),
        (
            {"learn": "distill", "teacher": "somewhere", "data": "somewhere"},
            "does not learn from a dataset: drop --data",
        ),
        ({"env": "dataset", "data": "somewhere"}, "cannot be played: --learn bc, not ppo"),
        ({"data": "d", "cloning": CloningConfig(value_coef=0.5)}, "beside PPO the critic learns"),
        ({"cloning": CloningConfig(nll_until=0.0)}, r"cloning.nll_until must lie in \(0, 1\]"),
        ({"env": "dataset"}, "is the task of a dataset: give --data"),
        ({"init_partial": True}, "need --init"),
        ({"finetune": FinetuneConfig(kl_until=0.0)}, r"finetune.kl_until must lie in \(0, 1\]"),
        ({"finetune": FinetuneConfig(lr_warmup=-1)}, "finetune.lr_warmup must not be negative"),
        (
            {"learn": "bc", "data": "d", "finetune": FinetuneConfig(critic_warmup=1)},
            "a critic to warm up only with cloning.value_coef above 0",
        ),
    ],
)
def test_settings_that_no_run_could_have(changes, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **changes)
