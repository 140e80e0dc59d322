"""Memory before a run: what XLA says, what would help, and how it is told."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from mam.cli import main as cli
from mam.config import Config, NetworkConfig, PPOConfig
from mam.errors import RunError, UserError
from mam.learning.train import make_train
from mam.runs import footprint as plans
from mam.runs.footprint import Footprint, footprint, gigabytes, out_of_memory, plan

CONFIG = Config(
    policy="ippo",
    env="probe/matrix",
    network=NetworkConfig(d_model=32),
    ppo=PPOConfig(num_envs=64, rollout_length=16, num_epochs=1, num_minibatches=1),
)


@pytest.fixture(scope="module")
def compiled():
    trainer = make_train(CONFIG)
    return trainer.compile(trainer.shapes(np.arange(1)))


def test_a_footprint_is_the_state_and_what_the_step_needs_besides(compiled):
    found = Footprint.of(compiled.train_step)
    state = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(compiled.shapes(np.arange(1)))
    )
    assert found.state == pytest.approx(state, rel=0.05)
    assert (
        found.temporary > 16 * 64 * 2 * 32 * 4
    )  # the activations of one layer: 1024 steps, 2 agents, float32
    assert found.total == found.state + found.temporary


def test_a_run_says_what_it_needs(compiled, monkeypatch):
    assert "a train step needs" in footprint(compiled)
    assert "may not fit" not in footprint(compiled)
    monkeypatch.setattr(plans, "device_memory", lambda: 1000)
    assert "it may not fit. `mam plan`" in footprint(compiled)
    assert footprint(replace(compiled, train_step=lambda state: state)) == ""


@pytest.fixture(scope="module")
def planned():
    (found,) = plan(CONFIG)
    return found


def test_smaller_minibatches_are_tried_until_there_are_no_more(planned, monkeypatch):
    assert planned.changes == "as asked for"
    monkeypatch.setattr(plans, "device_memory", lambda: 1000)
    monkeypatch.setattr(plans, "_smaller", lambda config: list(smaller(config))[:1])
    first, second = plan(CONFIG)
    assert second.changes == "--ppo.num-minibatches 2"
    assert second.footprint.temporary < 0.8 * first.footprint.temporary
    assert second.compile_seconds > 0


smaller = plans._smaller


def test_what_could_be_changed():
    assert [words for words, _ in smaller(CONFIG)] == [
        f"--ppo.num-minibatches {2**k}" for k in range(1, 5)
    ]
    ppo = replace(CONFIG.ppo, num_envs=6)
    whole_rollouts = replace(
        CONFIG, policy="ippo", ppo=ppo, network=replace(CONFIG.network, memory="gru")
    )
    for config in (whole_rollouts, replace(CONFIG, policy="rec_ippo", ppo=ppo)):
        assert [words for words, _ in smaller(config)] == ["--ppo.num-minibatches 2"]
    halves = replace(ppo, sequence_length=ppo.rollout_length // 2)
    assert [words for words, _ in smaller(replace(whole_rollouts, ppo=halves))] == [
        f"--ppo.num-minibatches {count}" for count in (2, 4)
    ]


def test_the_command(monkeypatch, capsys):
    options = [
        "plan",
        "--policy",
        "ippo",
        "--env",
        "probe/matrix",
        "--ppo.num-envs",
        "8",
        "--network.d-model",
        "8",
    ]
    assert cli.main(options) == 0
    said = capsys.readouterr().out
    assert "as asked for" in said
    assert "fits as asked for" in said
    monkeypatch.setattr(plans, "device_memory", lambda: 1000)
    monkeypatch.setattr(plans, "_smaller", lambda config: [])
    assert cli.main(options) == 2
    assert "nothing tried fits" in capsys.readouterr().err


def test_numbers_of_agents_side_by_side(planned, monkeypatch, capsys):
    asked = []

    def noted(config):
        asked.append(config.env)
        yield replace(planned, num_agents=len(asked))

    monkeypatch.setattr(plans, "plan", noted)
    assert cli.main(["plan", "--env", "lbf/auto:grid=8", "--sweep", "agents=20,40"]) == 0
    assert asked == ["lbf/auto:grid=8,agents=20", "lbf/auto:grid=8,agents=40"]
    said = capsys.readouterr().out
    assert "agents=20: fits as asked for\nagents=40: fits as asked for\n" in said
    assert f" {gigabytes(planned.acting.total)} " in said


def test_a_joint_action_needs_less_than_a_train_step(planned):
    assert 0 < planned.acting.total < planned.footprint.total
    assert planned.num_agents == 2


def test_only_memory_errors_are_turned_into_advice():
    with pytest.raises(RunError, match="out of memory"), out_of_memory(CONFIG):
        raise jax.errors.JaxRuntimeError("INTERNAL: Failed, out of memory")
    with pytest.raises(jax.errors.JaxRuntimeError), out_of_memory(CONFIG):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_environments_on_the_host_are_not_planned():
    with pytest.raises(UserError, match="is an external environment"):
        next(plan(replace(CONFIG, env="pettingzoo/mpe2:simple_spread_v3", num_workers=1)))


def test_sizes_to_read():
    assert [gigabytes(size) for size in (1_234, 52_000_000, 1_250_000_000)] == [
        "0.00123 MB",
        "52 MB",
        "1.25 GB",
    ]
