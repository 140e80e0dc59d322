"""A run on the host: stopping, resuming, and what is left behind."""

import json
import shutil
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest

from mam.config import to_json
from mam.errors import UserError
from mam.learning.train import make_train
from mam.runs import loop as runs
from mam.runs.checkpoint import newest
from mam.runs.times import read_times
from small_run import INDEPENDENT as CONFIG


def _state(folder):
    config = folder.load_config()
    return folder.load_state(config, make_train(config))


def _rows(folder):
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "elapsed"} for row in rows]


def _same(a, b):
    a, b = (
        jax.tree.map(
            lambda x: (
                jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            ),
            t,
        )
        for t in (a, b)
    )
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six updates, never interrupted."""
    folder, trainer = runs.start(CONFIG, tmp_path_factory.mktemp("whole"))
    assert runs.run(CONFIG, folder, trainer) == "finished"
    return folder


def test_rows_are_in_order_and_complete(whole):
    rows = _rows(whole)
    assert [(r["kind"], r["update"]) for r in rows] == [
        *(
            ("evaluation", 0),
            ("train", 1),
            ("train", 2),
            ("evaluation", 2),
            ("train", 3),
            ("train", 4),
            ("evaluation", 4),
        ),
        *(("train", 5), ("train", 6), ("evaluation", 6), ("absolute", 6)),
    ]
    assert all(r["step_count"] == 16 * r["update"] for r in rows)
    assert np.shape(rows[3]["episode_return"]) == (2, 3)
    assert np.shape(rows[-1]["episode_return"]) == (2, 5)


@pytest.mark.parametrize("stop_after", [2, 3])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    stop_after, whole, tmp_path, monkeypatch, capsys
):
    folder, trainer = runs.start(CONFIG, tmp_path / "run")
    write = runs.JsonLines.write

    def write_then_interrupt(self, record):
        write(self, record)
        if record.kind == "train" and record.update == stop_after:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(runs.JsonLines, "write", write_then_interrupt)
    assert runs.run(CONFIG, folder, trainer) == "stopped"
    assert "stopping after this step" in capsys.readouterr().out
    assert _rows(folder)[-1]["update"] == stop_after
    monkeypatch.undo()
    before, saved = read_times(folder.times), newest(folder.checkpoint).meta["times"]
    assert 0 < saved["train step"] == before["train step"]  # the wait for the save comes on top

    assert runs.run(CONFIG, *runs.resume(folder.path, CONFIG)) == "finished"
    after = read_times(folder.times)
    assert set(after) == {"compile", "train step", "evaluation", "saving", "logging"}
    assert all(after[part] > seconds for part, seconds in saved.items())
    assert _rows(folder) == _rows(whole)
    assert _same(_state(folder), _state(whole))


def test_a_finished_run_can_be_extended(whole, tmp_path):
    short, trainer = runs.start(
        replace(CONFIG, total_timesteps=64, eval=CONFIG.eval), tmp_path / "run"
    )
    assert runs.run(replace(CONFIG, total_timesteps=64), short, trainer)
    assert runs.run(CONFIG, *runs.resume(short.path, CONFIG))
    assert _same(_state(short).policy, _state(whole).policy)
    assert [r["update"] for r in _rows(short) if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_schedule_over_a_run_that_grows_is_said(whole, tmp_path, capsys):
    folder = shutil.copytree(whole.path, tmp_path / "run")
    longer = replace(CONFIG, total_timesteps=2 * CONFIG.total_timesteps)
    for anneal in (False, True):
        ppo = replace(CONFIG.ppo, anneal_lr=anneal)
        (folder / "config.json").write_text(json.dumps(to_json(replace(CONFIG, ppo=ppo))))
        opened, trainer = runs.resume(folder, replace(longer, ppo=ppo))
        opened.release()
        trainer.close()
        said = "ppo.anneal_lr: a share of the run, which is longer now" in capsys.readouterr().out
        assert said == anneal


def wide(observation):
    return observation.agents_view


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env": "probe/none"}, "unknown task"),
        ({"policy": "none"}, "unknown policy"),
        (
            {"policy": "rec_ippo", "order": "random"},
            "network.order random is for sequence",
        ),
        ({"policy": "mam", "order": "test_loop:nope"}, "no order test_loop:nope"),
        ({"policy": "mam", "order": "test_loop:wide"}, r"returns \[2, .*expected \[2\] keys"),
    ],
)
def test_nothing_is_written_for_a_run_that_cannot_be(change, message, tmp_path):
    network = replace(CONFIG.network, order=change.pop("order", "index"))
    with pytest.raises(UserError, match=message):
        runs.start(replace(CONFIG, network=network, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_config_is_said(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        runs.RunFolder(tmp_path).load_config()
