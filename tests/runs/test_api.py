"""Runs from Python: callbacks, stops, and policies that play without an environment."""

import json
import signal
import threading
from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mam
from mam.cli import main as cli
from mam.config import NetworkConfig, from_json, to_json
from mam.errors import RunError, UserError
from mam.learning.train import init_policy, make_train
from mam.runs import api, loop
from mam.runs import load as loading
from mam.runs.load import load_weights
from small_run import INDEPENDENT as CONFIG


class Listener(mam.Callback):
    """Notes what it hears, and what there is to see at that moment."""

    def __init__(self):
        self.heard, self.handlers = [], set()

    def on_update(self, event):
        assert event.metrics["policy_loss"].shape == (2,)
        self.note("update", event)

    def on_evaluation(self, event):
        assert event.metrics["episode_return"].shape == (2, 3)
        event.log(f"heard of step {event.step_count}")
        self.note("evaluation", event)

    def note(self, kind, event):
        self.heard.append((kind, event.update, event.step_count))
        self.handlers.add(signal.getsignal(signal.SIGTERM))
        assert np.asarray(event.state.num_updates).tolist() == [event.update] * 2


class Until(mam.Callback):
    """Ends a run after an update: by what it returns, by asking, or by raising something."""

    def __init__(self, update, how):
        self.update, self.how = update, how

    def on_update(self, event):
        if event.update < self.update:
            return False
        if self.how == "ask":
            event.stop()
        elif self.how != "return":
            raise self.how
        return self.how == "return"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run to its end outside the main thread, what a callback heard of it, and its output."""
    listener, results = Listener(), []
    path = tmp_path_factory.mktemp("api") / "run"
    thread = threading.Thread(
        target=lambda: results.append(
            mam.train(CONFIG, out=str(path), callbacks=[listener], signals=True)
        )
    )
    thread.start()
    thread.join()
    return results[0], listener


def rows(path):
    keep = ("kind", "update", "step_count", "values")
    return [
        {name: getattr(record, name) for name in keep} for record in loop.RunFolder(path).records()
    ]


def test_callbacks_hear_of_every_update_and_evaluation(finished):
    result, listener = finished
    assert listener.heard == [
        *(
            ("evaluation", 0, 0),
            ("update", 1, 16),
            ("update", 2, 32),
            ("evaluation", 2, 32),
            ("update", 3, 48),
        ),
        *(
            ("update", 4, 64),
            ("evaluation", 4, 64),
            ("update", 5, 80),
            ("update", 6, 96),
            ("evaluation", 6, 96),
        ),
    ]
    assert (result.outcome, result.config) == ("finished", CONFIG)
    assert [record.kind for record in result.records].count("train") == 6
    assert (result.returns.shape, result.absolute_metric.shape) == ((4, 2), (2,))


@pytest.mark.parametrize("how", ["return", "ask"])
def test_a_callback_ends_a_run_that_goes_on_later(how, finished, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    listener = Listener()
    stopped = mam.train(CONFIG, out=tmp_path / "run", callbacks=[Until(3, how), listener])
    assert stopped.outcome == "stopped"
    assert stopped.absolute_metric is None
    assert listener.heard[-1] == ("update", 3, 48)
    assert listener.handlers == {before}
    assert "heard of step 32" in capsys.readouterr().out
    if how == "ask":
        result = mam.train(resume=stopped.folder)
        assert result.outcome == "finished"
        np.testing.assert_equal(rows(result.folder), rows(finished[0].folder))


@pytest.mark.parametrize(
    ("error", "seen"),
    [(KeyError("mine"), KeyError), (UserError("not so"), RunError)],
    ids=["any", "of a user"],
)
def test_what_a_callback_raises_ends_the_run_with_everything_saved(error, seen, tmp_path):
    with pytest.raises(seen, match=r"mine|^not so; the run is saved up to update 2$"):
        mam.train(CONFIG, out=tmp_path / "run", callbacks=[Until(2, error)])
    assert loop.RunFolder(tmp_path / "run").newest_save(CONFIG).meta["update"] == 2


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "nothing to train"),
        ({"config": CONFIG, "out": "a", "resume": "b"}, "drop out"),
        ({"resume": "nowhere"}, "holds no run"),
    ],
    ids=["nothing", "both", "nowhere"],
)
def test_mistakes(how, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        mam.train(**how)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_environment(monkeypatch):
    """Nothing may ask for an environment."""
    monkeypatch.setattr(loading, "make_train", None)


def same(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("greedy", [None, False, True])
@pytest.mark.parametrize("which", ["best", "latest"])
def test_weights_are_those_of_the_run(greedy, which, finished, monkeypatch):
    folder = loop.RunFolder(finished[0].folder)
    state = folder.load_state(CONFIG, make_train(CONFIG))
    monkeypatch.setattr(loading, "make_train", None)
    weights = load_weights(folder.path, greedy=greedy, which=which)
    best = state.best(beside=bool(greedy))
    assert same(weights.policies, best.policy if which == "best" else state.policy)
    np.testing.assert_array_equal(weights.best_return, best.mean_return)
    seed, policy = weights.of_seed(None)
    assert seed == np.argmax(best.mean_return)
    assert same(policy, jax.tree.map(lambda x: x[seed], weights.policies))
    with pytest.raises(UserError, match=r"one of the run's seeds 0…1, got 7"):
        weights.of_seed(7)


def test_a_loaded_policy_plays_without_an_environment(finished, no_environment):
    policy = mam.load(finished[0].folder)
    assert (policy.spec.name, policy.greedy, policy.config) == ("probe/matrix", False, CONFIG)
    views = np.zeros((policy.spec.num_agents, policy.spec.obs_dim - policy.spec.id_dim))
    actions = [policy.act(views) for _ in range(8)]
    assert {action.shape for action in actions} == {(policy.spec.num_agents,)}
    again = mam.load(str(finished[0].folder))
    on_device = [again.act(jnp.asarray(views)) for _ in range(8)]
    np.testing.assert_array_equal(on_device, actions)
    assert {type(action) for action in actions} == {np.ndarray}
    assert all(isinstance(action, jax.Array) for action in on_device)


def test_memory_and_ids_are_kept_by_the_policy():
    """Acting step by step equals the policy's pure functions, ids and memory passed by hand."""
    spec = mam.EnvSpec(
        "suite/task", num_agents=3, obs_dim=5, num_actions=4, time_limit=None, id_dim=3
    )
    config = replace(CONFIG, policy="rec_ippo", network=NetworkConfig(d_model=8))
    pure = init_policy(config, spec, key=jax.random.key(1))
    policy = mam.LoadedPolicy(config, spec, pure, policy_seed=0, greedy=True)
    views = np.random.default_rng(0).normal(size=(4, 2, 3, 2)).astype(np.float32)
    resets = np.array([[1, 1], [0, 0], [0, 1], [0, 0]], bool)
    memory, act = pure.init_memory((2,)), jax.jit(lambda *args: pure.act(*args, greedy=True))
    for view, reset in zip(views, resets, strict=True):
        ids = np.broadcast_to(np.eye(3, dtype=np.float32), (2, 3, 3))
        shape = (2, 3)
        obs = mam.Observation(
            np.concatenate([ids, view], -1), np.ones((*shape, 4), bool), np.ones(shape, bool)
        )
        memory, output = act(memory, obs, reset, jax.random.split(jax.random.key(0), 2))
        np.testing.assert_array_equal(policy.act(view, reset=reset), output.action)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), policy._memory, memory)
    with pytest.raises(UserError, match=r"batch and agents were \[2, 3\] and are \[1, 3\]"):
        policy.act(views[0, :1])
    policy.act(views[0, :1], reset=True)
    with pytest.raises(
        UserError, match=r"agents' views are \[…, 3, 5\] or \[…, 3, 2\] in suite/task, got \[3, 4\]"
    ):
        policy.act(np.zeros((3, 4)))


def test_a_policy_says_where_it_comes_from(finished):
    result = finished[0]
    metadata = mam.load(result.folder, policy_seed=1).metadata
    assert (metadata["task"], metadata["algorithm"]) == ("probe/matrix", CONFIG.algorithm)
    assert metadata["scores"] == {
        "best_return": result.returns[:, 1].max(),
        "absolute_metric": result.absolute_metric[1],
    }
    assert "jax" in metadata["versions"]["packages"]


def loaded(policy="mam", order="index", **fields):
    """A policy of random weights for three agents that take one of four actions."""
    spec = mam.EnvSpec("suite/task", num_agents=3, obs_dim=16 + 5, num_actions=4, time_limit=None)
    spec = replace(spec, id_dim=16, **fields)
    config = replace(CONFIG, policy=policy, agent_id="sinusoid", decode="sequential")
    config = replace(config, network=replace(config.network, order=order))
    pure = init_policy(config, spec, key=jax.random.key(1))
    return mam.LoadedPolicy(config, spec, pure, policy_seed=0, greedy=False)


def test_masks_the_dead_and_greedy_are_arguments():
    policy, views = loaded(), np.random.default_rng(0).normal(size=(2, 3, 5))
    mask = np.zeros((2, 3, 4), bool)
    mask[..., 2] = True
    assert (policy.act(views, mask=mask) == 2).all()
    greedy = {policy.act(views, greedy=True).tobytes() for _ in range(4)}
    assert len(greedy) == 1
    alive = np.array([[True, True, False]] * 2)
    other = np.where(alive[..., None], views, np.nan)
    np.testing.assert_array_equal(
        policy.act(other, alive=alive, greedy=True)[alive],
        policy.act(views, alive=alive, greedy=True)[alive],
    )


def test_it_plays_with_any_number_of_agents_that_its_weights_fit():
    policy = loaded("rec_mam")
    assert policy.act(np.zeros((2, 3, 5))).shape == (2, 3)
    with pytest.raises(UserError, match=r"were \[2, 3\] and are \[2, 7\]: begin all"):
        policy.act(np.zeros((2, 7, 5)))
    policy.reset()
    assert policy.act(np.zeros((2, 7, 5))).shape == (2, 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mask": np.ones((3, 5), bool)},
            r"^action_mask is \[3, 4\] beside these views: got \[3, 5\]",
        ),
        ({"alive": np.ones(2, bool)}, r"^alive is \[3\] beside these views: got \[2\]"),
    ],
)
def test_arrays_of_other_sizes_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        loaded().act(np.zeros((3, 5)), **fields)


@pytest.mark.parametrize(
    ("views", "fields", "message"),
    [
        (np.zeros((2, 3, 5)), {"reset": np.ones(3, bool)}, r"one bool or \[2\] of them, got \[3\]"),
        ({"a": np.zeros(5)}, {}, "are one array .* not a dictionary: stack them in the order"),
        (np.zeros((2, 3, 5)), {"reset": 2}, "reset holds 2: expected 1 at the first step of an ep"),
        (np.full((2, 3, 5), np.nan), {}, "agents_view holds numbers that are not finite"),
    ],
)
def test_what_a_policy_cannot_act_on_is_refused(views, fields, message):
    with pytest.raises(UserError, match=message):
        loaded().act(views, **fields)


LEGAL = np.array([True, False, True, True] * 3).reshape(3, 4)


def seen(**fields):
    """What three agents see, the last of which is dead, in fields of any type."""
    views = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    obs = mam.Observation(views, LEGAL, np.array([True, True, False]))
    names = list(fields)
    return eqx.tree_at(
        lambda obs: [getattr(obs, name) for name in names],
        obs,
        list(fields.values()),
        is_leaf=lambda x: x is None,
    )


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_ones_and_zeros_are_bools(dtype, array):
    policy, obs = loaded(), seen()
    mask, alive = array(LEGAL.astype(dtype)), array(obs.alive.astype(dtype))
    action = policy.act(obs, greedy=True)
    for how in (
        {"observation": seen(action_mask=mask, alive=alive)},
        {"observation": obs.agents_view, "mask": mask, "alive": alive},
    ):
        policy.reset()
        np.testing.assert_array_equal(policy.act(**how, reset=dtype(1), greedy=True), action)
    traced = jax.jit(policy.complete)(seen(action_mask=mask, alive=alive))
    assert (traced.action_mask.dtype, traced.alive.dtype) == (bool, bool)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("field", "given", "message"),
    [
        ("action_mask", np.where(LEGAL, 0, -np.inf), "holds -inf: expected 1 for legal, 0 for ill"),
        ("action_mask", jnp.where(LEGAL, 0, -1e9), r"holds -1000000000\.0: expected 1 for legal"),
        ("action_mask", np.where(LEGAL, 1, np.nan), "holds nan: expected 1 for legal"),
        ("alive", np.array([1, 2, 0]), "holds 2: expected 1 for the living, 0 for the dead"),
        ("alive", np.array(["True", "True", "False"]), "holds 'True': expected 1 for the living"),
    ],
)
def test_what_is_no_bool_is_refused(field, given, message, whole):
    if whole:
        obs, how = seen(**{field: given}), {}
    else:
        obs, how = np.zeros((3, 5)), {field.removeprefix("action_"): given}
    with pytest.raises(UserError, match=f"^{field} {message}"):
        loaded().act(obs, **how)


NOT_FINITE = np.array([[0, 0], [0, np.nan], [0, 0]], np.float32)


def test_what_the_living_see_is_finite():
    """Positions and images, too."""
    policy = loaded("mam", "hilbert", position_dim=2, grid_shape=(1, 2, 1), grid_dtype="float32")
    fine = {"positions": np.zeros((3, 2), np.float32), "grid": np.zeros((3, 1, 2, 1), np.float32)}
    action = policy.act(seen(**fine), greedy=True)
    for name, array in fine.items():
        bad = NOT_FINITE.reshape(array.shape)
        with pytest.raises(UserError, match=f"^{name} holds numbers that are not finite"):
            policy.act(seen(**fine | {name: bad}))
        of_the_dead = seen(**fine | {name: bad[[0, 2, 1]]})
        np.testing.assert_array_equal(policy.act(of_the_dead, greedy=True)[:2], action[:2])
    assert loaded(position_dim=2).act(seen(positions=NOT_FINITE)).shape == (3,)  # not read


def test_a_state_that_is_not_given_decides_no_action():
    """As many numbers as the embeddings of all agents, in place of which it stands."""
    policy = loaded("mappo", state_dim=3 * CONFIG.network.d_model)
    obs = seen(state=np.ones(policy.spec.state_dim, np.float32))
    action = policy.act(obs, greedy=True)
    without = seen()
    np.testing.assert_array_equal(policy.act(without, greedy=True), action)
    views = policy.act(obs.agents_view, mask=LEGAL, alive=obs.alive, greedy=True)
    np.testing.assert_array_equal(views, action)
    memory, key = policy.policy.init_memory(), jax.random.key(0)
    zeros = seen(state=np.zeros(policy.spec.state_dim, np.float32))
    first = np.array(True)
    values = [policy.apply(memory, x, first, key)[1].value for x in (without, zeros, obs)]
    np.testing.assert_array_equal(values[0], values[1])
    assert not np.allclose(values[0], values[2])
    with pytest.raises(UserError, match=r"^state is \[24\] beside these views: got \[5\]"):
        policy.act(seen(state=np.ones(5, np.float32)))


def by_place(obs):
    """Return keys of one environment's agents: those on the left first."""
    return obs.positions[..., 0]


def by_state(obs):
    """Return keys of one environment's agents: they stand in its state."""
    return obs.state


def test_an_order_of_ones_own_reads_positions_where_there_are_some():
    policy, key = loaded(order="test_api:by_place", position_dim=2), jax.random.key(0)
    with pytest.raises(UserError, match=r"^positions is \[3, 2\] beside .*: there is none"):
        policy.act(np.zeros((3, 5)))
    obs = seen(positions=np.array([[3, 0], [1, 0], [2, 0]], np.float32), alive=np.ones(3, bool))
    order = policy.apply(policy.policy.init_memory(), obs, np.array(True), key)[1].order
    assert order.tolist() == [1, 2, 0]


def test_an_order_of_ones_own_reads_no_state_that_is_made_up():
    policy = loaded(order="test_api:by_state", state_dim=3)
    state = np.array([3, 1, 2], np.float32)
    assert policy.act(seen(state=state)).shape == (3,)
    assert policy.complete(seen()).state is None


def test_mistakes_are_told_at_once():
    with pytest.raises(UserError, match=r"train takes a mam\.Config, got 'probe'"):
        api._check_arguments("probe", [])
    for callbacks in (mam.Callback(), [print]):
        with pytest.raises(UserError, match=r"callbacks are a list of mam\.Callback, got"):
            api._check_arguments(CONFIG, callbacks)


def test_evaluating_a_run_and_a_policy(finished):
    metrics = mam.evaluate(finished[0].folder, episodes=4)
    assert metrics["episode_return"].shape == (2, 4)
    assert mam.evaluate(finished[0].policy(), episodes=4)["episode_return"].shape == (4,)
    with pytest.raises(UserError, match="must be positive, got 0"):
        mam.evaluate(finished[0].folder, episodes=0)


def test_another_task_is_played_whatever_code_the_folder_names(tmp_path, capsys):
    run = str(tmp_path / "run")
    mam.train(replace(CONFIG, env="mam.envs.probes:Matrix"), out=run)
    for command in ("evaluate", "play", "export", "record"):
        words = [command, run, *["--episodes", "2"] * (command in ("evaluate", "record"))]
        assert cli.main(words) == 2
        assert "'mam.envs.probes:Matrix', which is code" in capsys.readouterr().err
        assert cli.main([*words, "--env", "probe/matrix"]) == 0, command
    with pytest.raises(UserError, match=r"'mam\.envs\.probes:Matrix', which is code"):
        mam.evaluate(run)
    assert mam.evaluate(run, env="probe/matrix", episodes=2)["episode_return"].shape == (2, 2)


def test_a_run_that_does_not_say_its_sizes_imports_code_only_if_trusted(finished, monkeypatch):
    """As runs of early versions."""
    save = loop.RunFolder(finished[0].folder).newest_save(CONFIG)
    save = replace(save, meta={name: value for name, value in save.meta.items() if name != "spec"})
    monkeypatch.setattr(loop.RunFolder, "newest_save", lambda *_: save)
    assert mam.load(finished[0].folder).spec.name == "probe/matrix"
    monkeypatch.setattr(loop.RunFolder, "load_config", lambda _: replace(CONFIG, env="nobody:make"))
    with pytest.raises(UserError, match="'nobody:make', which is code"):
        mam.load(finished[0].folder)
    with pytest.raises(UserError, match="nobody is not in"):
        mam.load(finished[0].folder, trust=True)


@pytest.mark.parametrize("spec", [{"num_agents": "three"}, {"nothing": 1}, {}], ids=str)
def test_sizes_that_are_none_are_refused(spec, finished, monkeypatch):
    save = loop.RunFolder(finished[0].folder).newest_save(CONFIG)
    monkeypatch.setattr(
        loop.RunFolder, "newest_save", lambda *_: replace(save, meta=save.meta | {"spec": spec})
    )
    with pytest.raises(RunError, match="is damaged, or of a later version"):
        mam.load(finished[0].folder)


def test_sizes_travel_as_json():
    spec = mam.EnvSpec(
        "a/b", 2, 3, 4, None, grid_shape=(3, 4, 1), state_dim=7, agent_names=("one", "two")
    )
    assert from_json(mam.EnvSpec, json.loads(json.dumps(to_json(spec)))) == spec
    for name, value in {"grid_shape": [3, 4], "agent_names": ["one", 2]}.items():
        with pytest.raises(UserError, match=f"^{name} must be a list of"):
            from_json(mam.EnvSpec, to_json(spec) | {name: value})


@pytest.mark.parametrize(("num_envs", "batch"), [(None, ()), (3, (3,))])
def test_environments_by_name(num_envs, batch):
    env = mam.make_env("probe/matrix", num_envs)
    _, timestep = jax.eval_shape(env.reset, jax.random.key(0))
    assert timestep.reward.shape == (*batch, env.spec.num_agents)
