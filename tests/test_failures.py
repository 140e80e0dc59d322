"""What can happen to a run: files that cannot be written, memory, numbers, signals. Each ends in one line."""

import errno
import json
import shutil
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest

from mam import cli
from mam import run as runs
from mam.checkpoint import CheckpointError, newest
from mam.config import CheckpointConfig, Config, EvalConfig, NetworkConfig, PPOConfig
from mam.errors import RunError, UserError
from mam.train import make_train

CONFIG = Config(
    policy="ippo",
    env="probe/matrix",
    total_timesteps=96,
    network=NetworkConfig(d_model=8),
    ppo=PPOConfig(num_envs=4, rollout_length=4, num_epochs=1, num_minibatches=1),
    eval=EvalConfig(num_evaluations=3, num_episodes=3, num_absolute_episodes=5),
    checkpoint=CheckpointConfig(seconds=0.0),
)


@pytest.fixture(scope="module")
def trainer():
    """Compiled once: its steps are plain functions, which a run does not compile again."""
    jitted = make_train(CONFIG)
    return replace(jitted, train_step=lambda s: jitted.train_step(s), evaluate_step=lambda s: jitted.evaluate_step(s))


@pytest.fixture
def start(trainer, tmp_path, monkeypatch):
    """Starts a run, of which something may be replaced, and goes on with it."""
    monkeypatch.setattr(runs, "make_train", lambda config: trainer)

    def start(config=CONFIG, **changes):
        folder, own = runs.start(config, tmp_path / "run")
        return runs.run(config, folder, replace(own, **changes))

    return start


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


def saved_updates(path):
    return newest(path / "checkpoint").meta["update"]


def at_update(update, act):
    """A replacement for a sink's `write` that does something in an update."""
    write = runs.JsonLines.write

    def writing(self, record):
        write(self, record)
        if (record.kind, record.update) == ("train", update):
            act()

    return writing


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_metrics_that_cannot_be_written(start, path, monkeypatch):
    monkeypatch.setattr(runs.JsonLines, "write", at_update(4, full_disk))
    with pytest.raises(
        RunError, match=r"cannot write the run to .*run: No space left on device; what was saved"
    ) as told:
        start()
    assert "\n" not in str(told.value)
    assert saved_updates(path) == 3


def test_a_checkpoint_that_cannot_be_written(start, path, monkeypatch):
    monkeypatch.setattr(
        runs.JsonLines, "write", at_update(4, lambda: monkeypatch.setattr("mam.checkpoint._write_arrays", full_disk))
    )
    with pytest.raises(CheckpointError, match=r"cannot write a checkpoint to .*: .*No space left on device"):
        start()
    monkeypatch.undo()
    assert saved_updates(path) in (2, 3)  # that of update 3 may have been under way


def test_the_last_checkpoint_that_cannot_be_written(start, monkeypatch):
    monkeypatch.setattr(
        runs.JsonLines, "write", at_update(6, lambda: monkeypatch.setattr("mam.checkpoint._write_arrays", full_disk))
    )
    with pytest.raises(CheckpointError, match="No space left on device"):
        start()


def test_a_folder_that_vanishes(start, path, monkeypatch):
    monkeypatch.setattr(runs.JsonLines, "write", at_update(3, lambda: path.rename(path.with_name("gone"))))
    with pytest.raises(RunError, match=r"cannot write"):
        start()


def test_a_folder_that_cannot_be_made(start, path):
    path.write_text("a file")
    with pytest.raises(RunError, match=r"cannot write the run to .*run: (File exists|Not a directory)"):
        start()


def test_running_out_of_memory_ends_with_advice(start, path, trainer):
    def greedy(state):
        if int(state.num_updates[0]) == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 10 bytes.\nmore")
        return trainer.train_step(state)

    with pytest.raises(RunError, match=r"out of memory .*10 bytes.*try --ppo.num-minibatches 2; `mam plan`") as told:
        start(train_step=greedy)
    assert "\n" not in str(told.value)
    assert saved_updates(path) == 2


def unhealthy(trainer, updates):
    """A train step that says that something in these updates was not finite, and a name for it."""

    def step(state):
        number = int(state.num_updates[0]) + 1
        state, values = trainer.train_step(state)
        return state, dict(values) | {"non_finite": np.array([0 if number in updates else -1])}

    return step


def test_a_number_that_is_not_finite_ends_the_run(start, path, trainer):
    with pytest.raises(RunError, match=r"update 3 met numbers that are not finite, first in: parameter .*; the state"):
        start(train_step=unhealthy(trainer, {3}))
    assert saved_updates(path) == 2
    assert [json.loads(row)["update"] for row in (path / "metrics.jsonl").read_text().splitlines()][-1] == 2


def test_or_is_left_out_and_said(start, path, trainer, capsys):
    skip = replace(CONFIG, on_non_finite="skip")
    assert start(skip, train_step=unhealthy(trainer, {3})) == "finished"
    assert "update 3 met numbers that are not finite, first in: parameter" in capsys.readouterr().out
    assert "non_finite" not in (path / "metrics.jsonl").read_text()


def test_but_not_for_ever(start, trainer, monkeypatch):
    monkeypatch.setattr(runs, "MOST_SKIPPED", 3)
    skip = replace(CONFIG, on_non_finite="rollback")
    with pytest.raises(RunError, match=r"update 5 met .*, as in the 2 updates before"):
        start(skip, train_step=unhealthy(trainer, {1, 3, 4, 5}))


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_goes_on_to_the_same_numbers(
    start, path, trainer, tmp_path, monkeypatch, capsys
):
    assert start() == "finished"
    whole = path.rename(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(runs.JsonLines, "write", at_update(4, lambda: signal.raise_signal(signal.SIGTERM)))
        assert start() == "stopped"
    damaged = newest(path / "checkpoint").path
    file = damaged / "arrays.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    assert runs.run(CONFIG, *runs.resume(path, CONFIG)) == "finished"
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if "is damaged" in line]) == 1
    rows, expected = (
        [
            {name: value for name, value in json.loads(line).items() if name != "elapsed"}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in (path, whole)
    )
    assert rows == expected
    states = [newest(run / "checkpoint").restore(trainer.shapes(np.arange(1))) for run in (path, whole)]
    keyless = [jax.tree.leaves((s.policy, s.opt_state, s.actors.observation, s.best_policy)) for s in states]
    assert all(np.array_equal(a, b) for a, b in zip(*keyless, strict=True))


def failing(step, update, error):
    """A step that fails after so many updates."""

    def fail(state):
        if int(state.num_updates[0]) == update:
            raise error
        return step(state)

    return fail


@pytest.mark.parametrize("what", ["train_step", "evaluate_step", "absolute_metric"])
def test_an_environment_that_fails_ends_the_run_with_a_save(start, path, trainer, what):
    update = {"train_step": 3, "evaluate_step": 4, "absolute_metric": 6}[what]
    error = UserError("task: stepping environment 3 raised ValueError: no cheese\n  File mine.py")
    with pytest.raises(RunError) as told:
        start(
            replace(CONFIG, checkpoint=CheckpointConfig(seconds=1e9)),
            **{what: failing(getattr(trainer, what), update, error)},
        )
    first, *rest = str(told.value).splitlines()
    assert first == f"{str(error).splitlines()[0]}; the run is saved up to update {update}"
    assert rest == ["  File mine.py"]
    assert told.value.exit_code == 1
    assert saved_updates(path) == update


def test_other_mistakes_are_saved_too(start, path, trainer):
    with pytest.raises(ZeroDivisionError):
        start(
            replace(CONFIG, checkpoint=CheckpointConfig(seconds=1e9)),
            evaluate_step=failing(trainer.evaluate_step, 4, ZeroDivisionError()),
        )
    assert saved_updates(path) == 4


def test_a_save_comes_before_the_first_evaluation(start, path, trainer, capsys):
    def endless(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(replace(CONFIG, checkpoint=CheckpointConfig(seconds=1e9)), evaluate_step=endless)
    assert saved_updates(path) == 2
    assert "evaluating: 3 episodes" in capsys.readouterr().out


def test_unfinished_episodes_are_said_once(start, trainer, capsys):
    def cut(state):
        state, values = trainer.evaluate_step(state)
        return state, dict(values) | {"unfinished": np.array([[1.0, 0.0, 1.0]])}

    assert start(evaluate_step=cut) == "finished"
    said = [line for line in capsys.readouterr().out.splitlines() if "evaluated episodes" in line]
    assert len(said) == 1
    assert said[0].startswith("2 of 6 evaluated episodes had not ended after 10,000 steps")


def test_a_resume_says_where_it_goes_on(start, path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(runs.JsonLines, "write", at_update(4, lambda: signal.raise_signal(signal.SIGTERM)))
        start()
    assert runs.run(CONFIG, *runs.resume(path, CONFIG)) == "finished"
    assert "going on after update 4 of 6 (64 steps)" in capsys.readouterr().out


def test_a_resume_without_a_save_says_so(start, path, capsys):
    start()
    shutil.rmtree(path / "checkpoint")
    runs.resume(path, CONFIG)
    assert "holds no checkpoint: the run starts again at step 0, and metrics.jsonl is written anew" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGUSR1, 75)])
def test_exit_codes_of_signals(start, path, monkeypatch, number, code, capsys):
    monkeypatch.setattr(runs.JsonLines, "write", at_update(2, lambda: signal.raise_signal(number)))
    options = "--policy ippo --env probe/matrix --total-timesteps 96 --network.d-model 8 --ppo.num-envs 4"
    options += " --ppo.rollout-length 4 --ppo.num-epochs 1 --ppo.num-minibatches 1 --eval.num-evaluations 3"
    options += " --eval.num-episodes 3 --eval.num-absolute-episodes 5"
    assert cli.main(["train", *options.split(), "--out", str(path)]) == code
    assert f"mam train --resume {path}" in capsys.readouterr().out
    assert saved_updates(path) == 2


def test_what_may_change_on_a_resume(start, path):
    start()
    runs.resume(path, replace(CONFIG, num_devices=1, checkpoint=CheckpointConfig(seconds=5.0, keep=7)))
    other = replace(CONFIG, seed=3, ppo=replace(CONFIG.ppo, lr=0.1))
    with pytest.raises(UserError, match=r"other settings: seed was 0, is 3; ppo.lr was 0.0005, is 0.1"):
        runs.resume(path, other)
