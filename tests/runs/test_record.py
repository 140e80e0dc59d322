"""Episodes of policies and controllers, recorded: whole, as many as asked for, by the same seed."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.cli.main import main
from mam.data.steps import spec_without_ids, with_ids
from mam.data.store import Dataset, Writer
from mam.envs.external.pool import ExternalPool
from mam.envs.probes import Identity
from mam.envs.registry import make_batched
from mam.errors import RunError, UserError, import_function
from mam.learning.train import init_policy
from mam.runs.record import Controller, record
from small_run import CONFIG

ENVS = make_batched("probe/identity", 3, "none")


def expert(observation):
    return jnp.argmax(observation.agents_view, axis=-1)


def expert_numpy(observation, state):
    assert not isinstance(observation.agents_view, jax.Array)
    return np.argmax(observation.agents_view, axis=-1)


def play(path, actor, envs=ENVS, episodes=7, **how):
    optional = () if isinstance(actor, Controller) else ("log_prob", "value", "order")
    with Writer(path, spec_without_ids(envs.spec), optional=optional) as writer:
        record(envs, actor, writer, episodes, **how)
    return Dataset.open(path)


class Alternating:
    """A controller that remembers what it did."""

    def __init__(self):
        self.calls = 0

    def __call__(self, observation):
        self.calls += 1
        return np.full(3, self.calls % 2)


@pytest.mark.parametrize("function", [expert, jax.jit(expert), expert_numpy])
def test_a_controller_plays_whether_it_is_jax_or_numpy(function, tmp_path):
    data = play(tmp_path / "d", Controller(function, ENVS.spec))
    assert data.lengths.tolist() == [8] * 7
    np.testing.assert_allclose(data.returns, Identity().optimal_return)


def test_a_controller_may_read_the_environment_s_state(tmp_path):
    def cue(state, key, reset):
        return state.cue

    data = play(tmp_path / "d", Controller(cue, ENVS.spec))
    np.testing.assert_allclose(data.returns, Identity().optimal_return)


def test_a_controller_may_draw_numbers_and_remember(tmp_path):
    generator = np.random.default_rng(0)
    drawn = Controller(lambda observation: generator.integers(4, size=3), ENVS.spec)
    actions = play(tmp_path / "drawn", drawn).read().action
    assert all((actions == choice).mean() > 0.15 for choice in range(4))
    alternating = Controller(Alternating(), ENVS.spec)
    data = play(tmp_path / "alternating", alternating, make_batched("probe/identity", 1, "none"))
    assert (np.abs(np.diff(data.read().action, axis=0)) == 1).all()


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("action", "words"),
    [
        ([0, 4, 0], "action of agent 1 is 4: expected one of [0, 1, 2, 3]"),
        ([0, 0, -1], "action of agent 2 is -1: expected one of"),
        ([0.5, 0.0, 0.0], "returns actions of float32, probe/identity takes indices"),
    ],
)
def test_a_controller_s_actions_that_are_none_are_refused(jit, action, words, tmp_path):
    action = jnp.array(action)
    function = (jax.jit if jit else lambda x: x)(lambda observation: action)
    with pytest.raises(UserError) as error:
        play(tmp_path / "d", Controller(function, ENVS.spec))
    assert words in str(error.value)
    assert not (tmp_path / "d").exists()  # and no empty dataset stays
    play(tmp_path / "d", Controller(expert, ENVS.spec))


def test_a_controller_that_raises_is_one_line(tmp_path):
    def broken(observation):
        return observation.nothing

    with pytest.raises(RunError, match=r"^the controller raised AttributeError: .*test_record.py"):
        play(tmp_path / "d", Controller(broken, ENVS.spec))


@pytest.mark.parametrize("policy", ["ippo", "rec_ippo"])
def test_a_policy_s_steps_are_those_it_would_evaluate(policy, tmp_path):
    config = replace(CONFIG, env="probe/identity", policy=policy)
    envs = make_batched(config.env, 3, config.agent_id)
    weights = init_policy(config, envs.spec, key=jax.random.key(0))
    data = play(tmp_path / "d", weights, envs)
    assert (data.spec.obs_dim, data.spec.id_dim) == (envs.spec.obs_dim - envs.spec.id_dim, 0)
    steps, _ = with_ids(data.read([0]), data.spec, config.agent_id)
    steps = jax.tree.map(lambda x: jnp.asarray(x)[:, None], steps)
    seen = (steps.observation, steps.action, steps.order, steps.reset)
    again = weights.evaluate(weights.init_memory((1,)), *seen)
    np.testing.assert_allclose(again.log_prob, steps.log_prob, atol=1e-5)
    assert len(data.lengths) == 7
    same = play(tmp_path / "again", weights, envs)
    other = play(tmp_path / "other", weights, envs, seed=1)
    assert same.fingerprint == data.fingerprint != other.fingerprint


def test_external_environments_are_recorded_alike(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "envs")
    from host_environments import Lives

    with ExternalPool("own/lives", Lives, 2, 1, "none") as envs:
        action = envs.spec.joint_action
        controller = Controller(lambda observation: np.zeros(action.shape, int), envs.spec)
        data = play(tmp_path / "d", controller, envs, 3)
        weights = init_policy(replace(CONFIG, policy="ippo"), envs.spec, key=jax.random.key(0))
        played = play(tmp_path / "policy", weights, envs, 3)
    steps = data.read()
    assert len(data.lengths) == len(played.lengths) == 3
    assert (steps.action == 0).all()
    assert np.isfinite(played.read().log_prob).all()
    assert np.flatnonzero(steps.reset).tolist() == (np.cumsum(data.lengths) - data.lengths).tolist()


def test_what_cannot_be_recorded_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mam.runs.record.CHUNK", 2)
    with pytest.raises(RunError, match="has not ended after 4 steps: only whole episodes"):
        play(tmp_path / "a", Controller(expert, ENVS.spec), max_steps=4)
    with pytest.raises(UserError, match=r"the controller returns actions \[\], .* takes \[3\]"):
        play(tmp_path / "b", Controller(lambda observation: jnp.zeros(()), ENVS.spec))
    with pytest.raises(UserError, match="a controller takes observation, state, key, reset, not x"):
        play(tmp_path / "c", Controller(lambda x: x, ENVS.spec))
    with pytest.raises(UserError, match="no controller nowhere:act, expected package"):
        import_function("controller", "nowhere:act")
    assert main(["record"]) == 2
    assert "record needs what plays: mam record RUN" in capsys.readouterr().err


def test_the_command_records_and_appends(tmp_path, capsys):
    out, line = tmp_path / "d", "record --controller test_record:expert --env probe/identity"
    for seed in (0, 1):
        words = [*line.split(), "--out", str(out), "--episodes", "3", "--seed", str(seed)]
        assert main(words) == 0
    assert f"in {out}: 6 episodes, 48 steps" in capsys.readouterr().out
    assert main(["data", "info", str(out)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("probe/identity: 6 episodes, 48 steps, 3 agents, 4 features, 4 choices")
    assert "controller: test_record:expert" in told
    assert main([*line.split(), "--out", str(out), "--episodes", "0"]) == 2
    assert "--episodes must be positive, got 0" in capsys.readouterr().err
