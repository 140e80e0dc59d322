"""What can happen to a run: unwritable files, memory, non-finite values, signals.

Each ends in one line.
"""

import errno
import json
import shutil
import signal
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import jax
import numpy as np
import pytest

from mam.cli import main as cli
from mam.config import CheckpointConfig, Config, EvalConfig, NetworkConfig, PPOConfig
from mam.errors import RunError, UserError
from mam.learning.train import make_train
from mam.runs import loop as runs
from mam.runs.checkpoint import CheckpointError, Writer, newest

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
    return replace(
        jitted,
        train_step=lambda s: jitted.train_step(s),
        evaluate_step=lambda s: jitted.evaluate_step(s),
    )


@pytest.fixture
def start(trainer, tmp_path, monkeypatch):
    """Starts a run, of which something may be replaced, and goes on with it."""
    monkeypatch.setattr(runs, "trainer_at", lambda *_: trainer)

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
        runs.JsonLines,
        "write",
        at_update(4, lambda: monkeypatch.setattr("mam.runs.checkpoint._write_arrays", full_disk)),
    )
    with pytest.raises(
        CheckpointError, match=r"cannot write a checkpoint to .*: .*No space left on device"
    ):
        start()
    monkeypatch.undo()
    assert saved_updates(path) in (2, 3)  # that of update 3 may have been under way
    assert not list((path / "checkpoint").glob("*.partial"))  # which would keep the disk full


def test_the_last_checkpoint_that_cannot_be_written(start, monkeypatch):
    monkeypatch.setattr(
        runs.JsonLines,
        "write",
        at_update(6, lambda: monkeypatch.setattr("mam.runs.checkpoint._write_arrays", full_disk)),
    )
    with pytest.raises(CheckpointError, match="No space left on device"):
        start()


def test_a_folder_that_vanishes(start, path, monkeypatch):
    monkeypatch.setattr(
        runs.JsonLines, "write", at_update(3, lambda: path.rename(path.with_name("gone")))
    )
    with pytest.raises(RunError, match=r"cannot write"):
        start()


def test_a_folder_that_vanishes_before_the_first_step(path, trainer):
    folder, _ = runs.start(CONFIG, path)
    shutil.rmtree(path)
    with pytest.raises(RunError, match=r"cannot write the run to .*: No such file or directory"):
        runs.run(CONFIG, folder, trainer)
    assert not path.exists()


def test_a_folder_that_cannot_be_made(start, path):
    path.write_text("a file")
    with pytest.raises(
        UserError, match=r"cannot make the folder .*run': (File exists|Not a directory)"
    ) as told:
        start()
    assert told.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("x" * 300, "cannot make the folder .*: File name too long"),
        ("file/run", "cannot make the folder .*: Not a directory"),
        ("loop/run", "cannot make the folder .*: Too many levels"),
        ("two\nlines", r"names that can be printed, got '.*two\\nlines'"),
        ("\x1b[2J", "names that can be printed"),
        ("\udcff", "names that can be printed"),
    ],
    ids=ascii,
)
def test_folders_that_no_run_can_have(tmp_path, name, why):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=why) as told:
        runs.start(CONFIG, tmp_path / name)
    assert told.value.exit_code == 2
    assert len(str(told.value).splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "name", ["lr=[0.1],x={a,b}", "a*?#$HOME%20 \\b", "gs:", "s3:", "ü🐍 '\"&;|<>"]
)
def test_a_run_goes_on_under_any_name(trainer, tmp_path, monkeypatch, name):
    monkeypatch.setattr(runs, "trainer_at", lambda *_: trainer)
    monkeypatch.chdir(tmp_path)
    path = Path(name) / "run"
    monkeypatch.setattr(
        runs.JsonLines, "write", at_update(2, lambda: signal.raise_signal(signal.SIGTERM))
    )
    assert runs.run(CONFIG, *runs.start(CONFIG, path)) == "stopped"
    monkeypatch.setattr(runs.JsonLines, "write", at_update(7, full_disk))
    assert runs.run(CONFIG, *runs.resume(path, CONFIG)) == "finished"
    left = {
        "checkpoint",
        "config.json",
        "learning_curve.png",
        "marl_eval.json",
        "metrics.jsonl",
        "run.lock",
        "times.json",
    }
    assert {file.name for file in path.iterdir()} == left | {"tensorboard", "versions.json"}
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_minibatches_that_sequences_do_not_fill_leave_no_folder(path):
    ppo = replace(CONFIG.ppo, num_envs=2, rollout_length=4, num_minibatches=4)
    with pytest.raises(UserError, match=r"sequences of 4 steps: ppo.num_minibatches must divide"):
        runs.start(replace(CONFIG, policy="rec_ippo", ppo=ppo), path)
    assert not path.exists()


def test_one_process_at_a_time(start, path, trainer, monkeypatch):
    monkeypatch.setattr("mam.runs.lock.PATIENCE", 0.0)
    folder, _ = runs.start(CONFIG, path)
    config = folder.config.read_text()
    with pytest.raises(UserError, match=r"run is in use by process \d+ on") as told:
        runs.resume(path, replace(CONFIG, total_timesteps=960))
    assert told.value.exit_code == 2
    with pytest.raises(UserError, match="already holds a run"):
        start()
    assert folder.config.read_text() == config
    assert runs.run(CONFIG, folder, trainer) == "finished"
    runs.resume(path, CONFIG)[0].release()


def test_readers_need_no_lock(start, path, trainer, monkeypatch):
    start()
    folder, _ = runs.resume(path, CONFIG)
    assert folder.load_state(CONFIG, trainer) is not None
    folder.release()


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(
    trainer, tmp_path, monkeypatch
):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(runs, "datetime", Clock)
    monkeypatch.setattr(runs, "trainer_at", lambda *_: trainer)
    monkeypatch.chdir(tmp_path)
    folders = [runs.start(replace(CONFIG, seed=seed))[0] for seed in range(3)]
    assert [folder.path.name for folder in folders] == [
        "2026-01-02_03-04-05",
        "2026-01-02_03-04-05_2",
        "2026-01-02_03-04-05_3",
    ]
    assert [folder.load_config().seed for folder in folders] == [0, 1, 2]
    for folder in folders:
        folder.release()


def edit(path, **changes):
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 3}, "seed was 0, is 3"),
        ({"env": "probe/identity"}, "env was probe/matrix, is probe/identity"),
        (
            {"ppo": asdict(CONFIG.ppo) | {"lr": 0.1, "gamma": 0.5}},
            "ppo.lr was 0.0005, is 0.1; ppo.gamma was 0.99, is 0.5",
        ),
    ],
)
def test_an_edited_configuration_is_refused_with_what_differs(start, path, trainer, changes, said):
    start()
    edit(path / "config.json", **changes)
    config = runs.RunFolder(path).load_config()
    for read in (
        lambda: runs.run(config, *runs.resume(path, config)),
        lambda: runs.RunFolder(path).load_state(config, trainer),
    ):
        with pytest.raises(
            UserError, match=rf"config.json is not what .* was trained with: {said}; undo"
        ) as told:
            read()
        assert told.value.exit_code == 2


def test_free_settings_may_be_edited(start, path):
    start()
    edit(path / "config.json", total_timesteps=112, checkpoint={"seconds": 0.0, "keep": 3})
    config = runs.RunFolder(path).load_config()
    assert runs.run(config, *runs.resume(path, config)) == "finished"


def test_the_save_of_another_run_is_noticed(start, path, tmp_path):
    start()
    path.rename(tmp_path / "one")
    start(replace(CONFIG, seed=7))
    shutil.rmtree(path / "checkpoint")
    shutil.copytree(tmp_path / "one" / "checkpoint", path / "checkpoint")
    config = runs.RunFolder(path).load_config()
    with pytest.raises(UserError, match="was trained with: seed was 0, is 7"):
        runs.run(config, *runs.resume(path, config))


@pytest.mark.parametrize("rows", [0, 3, 3.5])
def test_metrics_that_lost_rows_are_said_in_one_line(start, path, monkeypatch, capsys, rows):
    with monkeypatch.context() as patch:
        patch.setattr(
            runs.JsonLines, "write", at_update(4, lambda: signal.raise_signal(signal.SIGTERM))
        )
        start()
    metrics = path / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    kept = lines[: int(rows)]
    metrics.write_bytes(b"".join(kept) + (lines[int(rows)][:20] if rows % 1 else b""))
    capsys.readouterr()
    assert runs.run(CONFIG, *runs.resume(path, CONFIG)) == "finished"
    whole, lost = len(b"".join(lines)), len(b"".join(lines[int(rows) :]))
    said = [line for line in capsys.readouterr().out.splitlines() if "metrics.jsonl" in line]
    assert len(said) == 1
    assert f"lacks {lost} of the {whole} bytes" in said[0]
    assert metrics.read_bytes().splitlines(keepends=True)[: len(kept)] == kept


NO_POSITIONS = (
    {},
    {"update": "2"},
    {"update": -1},
    {"config": []},
    {"elapsed": None},
    {"times": {"x": 1.0}},
)


@pytest.mark.parametrize("meta", NO_POSITIONS, ids=str)
def test_saves_that_say_nothing_of_a_run_are_passed_over(start, path, monkeypatch, meta):
    start()
    good = newest(path / "checkpoint")
    with Writer(path / "checkpoint", keep=3, after=good) as writer:
        writer.save({"x": np.zeros(1)}, (good.meta | meta) if meta else {})
    assert newest(path / "checkpoint").path != good.path
    assert runs.RunFolder(path).newest_save(CONFIG) == good


def test_running_out_of_memory_ends_with_advice(start, path, trainer):
    def greedy(state):
        if int(state.num_updates[0]) == 2:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 10 bytes.\nmore"
            )
        return trainer.train_step(state)

    with pytest.raises(
        RunError, match=r"out of memory .*10 bytes.*try --ppo.num-minibatches 2; `mam plan`"
    ) as told:
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
    with pytest.raises(
        RunError,
        match=r"update 3 met numbers that are not finite, first in: parameter .*; the state",
    ):
        start(train_step=unhealthy(trainer, {3}))
    assert saved_updates(path) == 2
    assert [json.loads(row)["update"] for row in (path / "metrics.jsonl").read_text().splitlines()][
        -1
    ] == 2


def test_or_is_left_out_and_said(start, path, trainer, capsys):
    skip = replace(CONFIG, on_non_finite="skip")
    assert start(skip, train_step=unhealthy(trainer, {3})) == "finished"
    assert (
        "update 3 met numbers that are not finite, first in: parameter" in capsys.readouterr().out
    )
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
        patch.setattr(
            runs.JsonLines, "write", at_update(4, lambda: signal.raise_signal(signal.SIGTERM))
        )
        assert start() == "stopped"
    damaged = newest(path / "checkpoint").path
    file = damaged / "arrays.safetensors"
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
    states = [
        newest(run / "checkpoint").restore(trainer.shapes(np.arange(1))) for run in (path, whole)
    ]
    keyless = [
        jax.tree.leaves((s.policy, s.opt_state, s.actors.observation, s.best_policy))
        for s in states
    ]
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


def test_a_save_comes_before_the_first_evaluation_of_what_was_learned(start, path, trainer, capsys):
    def endless(state):
        if state.num_updates.any():
            raise KeyboardInterrupt
        return trainer.evaluate_step(state)

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
        patch.setattr(
            runs.JsonLines, "write", at_update(4, lambda: signal.raise_signal(signal.SIGTERM))
        )
        start()
    assert runs.run(CONFIG, *runs.resume(path, CONFIG)) == "finished"
    assert "going on after update 4 of 6 (64 steps)" in capsys.readouterr().out


def test_a_resume_without_a_save_says_so(start, path, capsys):
    start()
    shutil.rmtree(path / "checkpoint")
    runs.resume(path, CONFIG)
    assert (
        "holds no checkpoint: the run starts again at step 0, and metrics.jsonl is written anew"
        in (capsys.readouterr().out)
    )


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGUSR1, 75)]
)
def test_exit_codes_of_signals(start, path, monkeypatch, number, code, capsys):
    monkeypatch.setattr(runs.JsonLines, "write", at_update(2, lambda: signal.raise_signal(number)))
    options = (
        "--policy ippo --env probe/matrix --total-timesteps 96 --network.d-model 8 --ppo.num-envs 4"
    )
    options += (
        " --ppo.rollout-length 4 --ppo.num-epochs 1 --ppo.num-minibatches 1"
        " --eval.num-evaluations 3"
    )
    options += " --eval.num-episodes 3 --eval.num-absolute-episodes 5"
    assert cli.main(["train", *options.split(), "--out", str(path)]) == code
    assert f"mam train --resume {path}" in capsys.readouterr().out
    assert saved_updates(path) == 2


def test_what_may_change_on_a_resume(start, path):
    start()
    runs.resume(
        path, replace(CONFIG, num_devices=1, checkpoint=CheckpointConfig(seconds=5.0, keep=7))
    )
    other = replace(CONFIG, seed=3, ppo=replace(CONFIG.ppo, lr=0.1))
    with pytest.raises(
        UserError, match=r"other settings: seed was 0, is 3; ppo.lr was 0.0005, is 0.1"
    ):
        runs.resume(path, other)
