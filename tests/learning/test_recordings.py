"""A dataset as experience: which episodes, which windows, what is held out, and what is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import CloningConfig, Config, EvalConfig, NetworkConfig, PPOConfig
from mam.data.steps import spec_without_ids
from mam.data.store import Writer
from mam.envs.registry import make_batched
from mam.errors import UserError
from mam.learning.cloning import BehaviourCloning
from mam.learning.normalise import as_normalised
from mam.learning.objective import OnOther
from mam.learning.recordings import Recordings
from mam.learning.sharding import WHOLE
from mam.learning.train import RECORDED, _key, init_policy, make_train
from mam.networks.clock import counts_of
from mam.runs.record import Controller, record
from mam.types import EnvSpec, Observation, Transition
from small_run import CONFIG as SMALL

SPEC = EnvSpec("own/count", num_agents=2, obs_dim=1, num_actions=3, time_limit=None)
NETWORK = NetworkConfig(d_model=8, d_state=2)


def episode(length, quality, spec=SPEC):
    """An episode whose views count steps from quality · 100, and whose return is the quality."""
    n = spec.num_agents
    count = np.arange(length + 1, dtype=np.float32) + 100 * quality
    view = np.repeat(count[:, None, None], n, axis=1)
    seen = Observation(view, np.ones((length + 1, n, 3), bool), np.ones((length + 1, n), bool))
    last = np.arange(length) == length - 1
    return Transition(
        observation=jax.tree.map(lambda x: x[:-1], seen),
        reset=np.arange(length) == 0,
        action=np.full((length, n), quality % 3, np.int32),
        log_prob=None,
        value=None,
        order=np.zeros((length, n), np.int32),
        reward=np.repeat(last[:, None] * np.float32(quality), n, axis=1),
        terminated=last,
        truncated=~last & last,
        final_observation=jax.tree.map(lambda x: x[1:], seen),
        metrics={},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten episodes of 3 to 12 steps, of rising quality."""
    path = tmp_path_factory.mktemp("data") / "d"
    with Writer(path, SPEC) as writer:
        for quality in range(10):
            writer.append(episode(3 + quality, quality))
    return path


def recordings(folder, policy="ippo", cloning=CloningConfig(), **changes):  # noqa: B008
    ppo = PPOConfig(num_envs=4, rollout_length=8, sequence_length=4, num_minibatches=1)
    config = Config(
        policy=policy, network=NETWORK, ppo=ppo, learn="bc", data=str(folder), cloning=cloning
    )
    config = replace(config, agent_id="none")
    return Recordings(replace(config, **changes), lambda: changes.get("spec", SPEC))


def policies(config, num_seeds=2):
    keys = jax.random.split(jax.random.key(0), num_seeds)
    return jax.vmap(lambda key: init_policy(config, SPEC, key=key))(keys)


def qualities(steps):
    return sorted({int(x) // 100 for x in np.ravel(steps.observation.agents_view)})


def test_the_best_episodes_are_taken_and_some_of_them_held_out(folder):
    source = recordings(folder, cloning=CloningConfig(top_fraction=0.5, held_out=0.4))
    learned, held_out = (qualities(x) for x in (source._learned[0], source._held_out))
    assert sorted(learned + held_out) == [5, 6, 7, 8, 9]
    assert len(held_out) == 2
    nothing = recordings(folder, cloning=CloningConfig(held_out=0.0))
    assert qualities(nothing._learned[0]) == [*range(10)]
    assert nothing.held_out(policies(nothing.config)) == {}


def test_random_orders_are_drawn_anew_at_every_step_as_in_acting(folder):
    source = recordings(folder, network=replace(NETWORK, order="random"))
    keys = jax.random.split(jax.random.key(1), 2)
    _, rollout, _ = source.collect(policies(source.config), (), keys, WHOLE)
    order = rollout.transitions.order
    for drawn in (order, source._held_out.order):
        assert (np.sort(drawn, axis=-1) == np.arange(2)).all()
        assert 0.2 < drawn[..., 0].mean() < 0.8
    assert (order[0] != order[1]).any()
    _, again, _ = source.collect(policies(source.config), (), keys, WHOLE)
    np.testing.assert_array_equal(again.transitions.order, order)


@pytest.mark.parametrize("policy", ["ippo", "rec_ippo", "sable"])
def test_windows_are_steps_in_a_row_and_with_memory_start_where_it_is_known(policy, folder):
    source = recordings(folder, policy, CloningConfig(held_out=0.0))
    keys = jax.random.split(jax.random.key(1), 2)
    carry, rollout, _ = source.collect(policies(source.config), (), keys, WHOLE)
    steps, count = rollout.transitions, rollout.transitions.observation.agents_view[..., 0, 0]
    assert carry == ()
    assert steps.reset.shape == (2, 4, 8)  # seeds, steps, windows: 4 · 8 steps in all
    goes_on = ~steps.reset[:, 1:]
    np.testing.assert_array_equal(np.diff(count, axis=1)[goes_on], 1)
    np.testing.assert_array_equal(steps.action[..., 0], count // 100 % 3)
    first = count[:, 0] % 100
    assert (first % 4 == 0).all() == (policy != "ippo")
    for counted in counts_of(rollout.memory):
        np.testing.assert_array_equal(counted, first[:, None])
    assert len({*np.ravel(first)}) > 1
    assert not np.array_equal(count[0], count[1])  # every seed draws its own
    again = source.collect(policies(source.config), (), keys, WHOLE)[1]
    np.testing.assert_array_equal(again.transitions.action, steps.action)


def test_steps_are_counted_on_beside_ppo_as_well(folder):
    plain = replace(NETWORK, observation_norm="layer")  # which leaves observations as they are
    source = recordings(folder, "sable", CloningConfig(held_out=0.0), network=plain)
    policy, keys = policies(source.config), jax.random.split(jax.random.key(1), 2)
    rollout = source.collect(policy, (), keys, WHOLE)[1]
    policy, rollout = jax.tree.map(lambda x: jnp.asarray(x[0]), (policy, rollout))
    own = jax.tree.map(lambda x: x.reshape(8, 4, *x.shape[2:]), rollout.transitions)
    own = replace(rollout, transitions=own)
    rows = OnOther(BehaviourCloning(), rollout).prepare(as_normalised(policy), own, None)
    before = rows.observation.agents_view[..., 0, 0] % 100
    np.testing.assert_array_equal(rows.num_steps, before)
    assert before.max() > 4


def shifted(window, generator):
    """An augmentation, by its name: another number for each window."""
    shift = generator.normal(size=(window.reset.shape[1], 1, 1)).astype(np.float32)
    view = window.observation.agents_view + shift
    return replace(window, observation=replace(window.observation, agents_view=view))


def test_windows_may_be_augmented(folder):
    """By numbers that a seed draws for itself, whichever seeds are beside it."""
    named = CloningConfig(augment=f"{__name__}:shifted")
    keys = jax.random.split(jax.random.key(1), 2)

    def views(cloning, keys):
        config = recordings(folder, cloning=cloning).config
        source = Recordings.of(config, lambda: SPEC)
        _, rollout, _ = source.collect(policies(config, len(keys)), (), keys, WHOLE)
        return rollout.transitions.observation.agents_view

    changed = views(named, keys)
    shift = changed - views(CloningConfig(), keys)
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1, :, :1], shift.shape), atol=1e-3)
    assert len({*np.round(shift[:, 0, :, 0, 0], 3).ravel()}) > 8
    np.testing.assert_array_equal(views(named, keys[1:]), changed[1:])
    with pytest.raises(UserError, match="no augmentation nowhere:none, expected"):
        views(CloningConfig(augment="nowhere:none"), keys)


def test_another_task_is_refused_with_what_differs(folder):
    other = replace(SPEC, obs_dim=4, num_actions=5)
    source = recordings(folder)
    source = replace(source, spec=lambda: other)
    message = "is of own/count, not of own/count: obs_dim is 1 instead of 4, num_actions"
    with pytest.raises(UserError, match=message):
        source.init(policies(source.config), jax.random.key(0), WHOLE)


def test_illegal_actions_are_refused(tmp_path):
    one = episode(3, 1)
    one.observation.action_mask[1, 0, 1] = False
    with Writer(tmp_path / "d", SPEC) as writer:
        writer.append(one)
    source = recordings(tmp_path / "d")
    with pytest.raises(UserError, match="has 1 illegal actions: no policy can imitate"):
        _ = source._learned


def test_what_the_dead_did_is_nothing(tmp_path):
    """Even if it is no number: it would be in gradients, however it is masked."""
    spec = replace(SPEC, num_actions=3, continuous=True)
    one = episode(3, 1, spec)
    action = np.full((3, 2, 3), 0.5, np.float32)
    one.observation.alive[1:, 0] = one.final_observation.alive[:, 0] = False
    action[1:, 0] = np.nan
    with Writer(tmp_path / "d", spec) as writer:
        writer.append(replace(one, action=action))
    steps = replace(recordings(tmp_path / "d"), spec=lambda: spec)._learned[0]
    np.testing.assert_array_equal(steps.action, np.where(np.isnan(action), 0, action))


@pytest.fixture(scope="module")
def matrix_game(tmp_path_factory):
    """What a controller does in the game that small runs play."""
    path, envs = tmp_path_factory.mktemp("data") / "matrix", make_batched(SMALL.env, 4, "none")
    choose = Controller(lambda observation: np.arange(envs.spec.num_agents) % 2, envs.spec)
    with Writer(path, spec_without_ids(envs.spec)) as writer:
        record(envs, choose, writer, 40)
    return path


@pytest.mark.parametrize(
    ("policy", "sequence_length"), [("ippo", None), ("rec_ippo", None), ("rec_ippo", 2)]
)
def test_beside_ppo_recorded_steps_are_imitated_less_and_less(policy, sequence_length, matrix_game):
    """The first loss is that of the first weights on as many recorded steps as a rollout has."""
    network = replace(SMALL.network, observation_norm="layer")
    ppo = replace(SMALL.ppo, sequence_length=sequence_length, lr=0.01)
    config = replace(SMALL, policy=policy, network=network, ppo=ppo, data=str(matrix_game))
    config = replace(config, cloning=CloningConfig(nll_coef=10.0, nll_until=0.5))
    trainer = make_train(config)
    state = trainer.init(np.arange(2))
    key = jax.vmap(_key, in_axes=(0, None))(state, RECORDED)
    assert trainer.recordings is not None
    recorded = trainer.recordings.collect(state.policy, (), key, WHOLE)[1]
    reported, expected = [], nll(state.policy, recorded)
    for _ in range(config.num_updates):
        state, values = trainer.train_step(state)
        reported.append(jax.device_get(values))
    np.testing.assert_allclose(reported[0]["cloning_loss"], expected, rtol=1e-5)
    assert (reported[2]["cloning_loss"] < 0.9 * expected).all()
    for weight, values in zip((10, 20 / 3, 10 / 3, 0, 0, 0), reported, strict=True):
        assert values["first_ratio_deviation"].max() < 1e-5
        own = values["policy_loss"] - 0.01 * values["entropy"] + 0.5 * values["value_loss"]
        np.testing.assert_allclose(
            values["loss"], own + weight * values["cloning_loss"], rtol=1e-4, atol=1e-5
        )
    _, values = trainer.evaluate_step(state)
    assert values["held_out_nll"].shape == (2,)


@jax.vmap
def nll(policy, recorded):
    """Return the mean −log π of recorded actions, all of whose agents live."""
    steps, memory = recorded.transitions, jax.tree.map(lambda x: x[0], recorded.memory)
    seen = (steps.observation, steps.action, steps.order, steps.reset)
    return -policy.evaluate(memory, *seen).log_prob.mean()


EXPERTS = {
    "probe/identity": lambda observation: jnp.argmax(observation.agents_view, axis=-1),
    "probe/target": lambda observation: observation.agents_view,
    "probe/components": lambda observation: jnp.stack(
        [jnp.argmax(x, axis=-1) for x in jnp.split(observation.agents_view, [3], axis=-1)], axis=-1
    ),
}


@pytest.mark.parametrize("env", EXPERTS)
def test_every_kind_of_action_is_imitated(env, tmp_path):
    envs = make_batched(env, 8, "none")
    with Writer(tmp_path / "d", spec_without_ids(envs.spec)) as writer:
        record(envs, Controller(EXPERTS[env], envs.spec), writer, 32)
    config = Config(
        policy="ippo",
        env=env,
        agent_id="none",
        learn="bc",
        data=str(tmp_path / "d"),
        total_timesteps=20 * 128,
        network=NETWORK,
        ppo=PPOConfig(num_envs=16, rollout_length=8, num_epochs=4, num_minibatches=2, lr=0.02),
        eval=EvalConfig(num_episodes=8, both_modes=False),
    )
    trainer = make_train(config)
    state, before = trainer.evaluate_step(trainer.init(np.arange(1)))
    for _ in range(20):
        state, values = trainer.train_step(state)
        assert np.isfinite(values["loss"]).all()
    _, after = trainer.evaluate_step(state)
    assert after["held_out_nll"] < before["held_out_nll"]
    if "held_out_error" in after:
        assert after["held_out_error"] < 0.5 * before["held_out_error"]
    else:
        assert after["held_out_accuracy"] > 0.95
    assert after["episode_return"].mean() > before["episode_return"].mean()
