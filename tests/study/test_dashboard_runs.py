"""What a run's files say about it."""

import json
import os
from dataclasses import replace

import pytest

from mam.config import flat, to_json
from mam.runs.times import write_times
from mam.study.dashboard.charts import Speeds
from mam.study.dashboard.runs import LiveRun, differing, tail
from mam.study.dashboard.watch import Watcher
from report_runs import CONFIG, write_run

NOW = 1_000_000_000.0


def aged(path, **ages):
    """Sets how many seconds ago each file of a run was written; others are older."""
    for file in path.iterdir():
        age = ages.get(file.stem, 5000)
        os.utime(file, (NOW - age, NOW - age))
    run = LiveRun(path, path.name)
    run.poll()
    return run


def test_finished_and_going_on(tmp_path):
    assert aged(write_run(tmp_path / "a")).state(NOW).name == "finished"
    running = aged(write_run(tmp_path / "b", updates=3), metrics=30)
    assert running.state(NOW).name == "running"
    assert running.state(NOW + 40).name == "stopped"
    assert "70 s" not in running.state(NOW + 40).why
    assert "nothing for more than 60 s" in running.state(NOW + 40).why


def test_patience_grows_with_the_longest_silence(tmp_path):
    path = write_run(tmp_path / "a", updates=3)
    slow = json.dumps(
        {
            "kind": "train",
            "update": 4,
            "step_count": 64,
            "elapsed": 316.0,
            "episode_return": [[0.0]] * 5,
        }
    )
    with (path / "metrics.jsonl").open("a") as file:
        file.write(slow + "\n")
    assert aged(path, metrics=2000).state(NOW).name == "running"
    assert aged(path, metrics=4000).state(NOW).name == "stopped"


def test_compiling_may_take_long(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(to_json(CONFIG)))
    assert aged(path, config=600).state(NOW).name == "running"
    assert aged(path, config=1000).state(NOW).name == "stopped"


def test_a_run_that_saved_itself(tmp_path):
    path = write_run(tmp_path / "a", updates=3)
    (path / "marl_eval.json").write_text("{}")
    assert aged(path, metrics=30, marl_eval=29).state(NOW).name == "stopped"
    assert aged(path, metrics=30, marl_eval=29, config=3).state(NOW).name == "running"  # resumed


def test_a_larger_budget_takes_a_finished_run_up_again(tmp_path):
    path = write_run(tmp_path / "a")
    (path / "config.json").write_text(json.dumps(to_json(replace(CONFIG, total_timesteps=1000))))
    assert aged(path, config=1).state(NOW).name == "running"


@pytest.mark.parametrize(
    ("output", "failed"),
    [
        ("mam on x · results in a\ncompiling the update…\n", False),
        ("mam on x · results in a\nmam: cannot write the run to a: no space\n", True),
        (
            "mam on x · results in a\nTraceback (most recent call last):\n  File\nValueError: no\n",
            True,
        ),
        ("mam on x · results in a\nmam: no space\nmam on x · results in a\ncompiling…\n", False),
        ("", False),
    ],
)
def test_an_error_is_what_was_printed_last(tmp_path, output, failed):
    path = write_run(tmp_path / "a", updates=3)
    (path / "output.log").write_text(output)
    state = aged(path, metrics=30, output=20).state(NOW)
    assert (state.name == "failed") == failed
    if failed:
        assert state.why == output.strip().splitlines()[-1]
        assert aged(path, metrics=10, output=20).state(NOW).name == "running"


def test_a_configuration_that_cannot_be_read(tmp_path):
    path = write_run(tmp_path / "a")
    (path / "config.json").write_text('{"polcy": "mam"}')
    state = aged(path).state(NOW)
    assert state.name == "failed"
    assert "polcy" in state.why


def test_where_time_goes(tmp_path):
    run = LiveRun(write_run(tmp_path / "a"), "a")
    assert Speeds._describe([run]).endswith('<td class="l">–</td></tr></tbody></table>')
    write_times(run.path / "times.json", {"acting": 1.0, "environment": 3.0})
    assert "environment 75 %, acting 25 %" in Speeds._describe([run])


def test_what_differs():
    one, other = flat({"a": 1, "b": {"c": 2, "d": 3}}), flat({"a": 1, "b": {"c": 5}})
    assert differing([one, other]) == {"b.c": [2, 5], "b.d": [3, None]}
    assert differing([one, one]) == differing([]) == {}


def test_the_tail_begins_with_a_line(tmp_path):
    path = tmp_path / "log"
    path.write_text("first\nsecond\nthird\n")
    assert tail(path) == "first\nsecond\nthird\n"
    assert tail(path, 10) == "third\n"
    assert tail(tmp_path / "nothing") == ""


def test_runs_come_and_go(tmp_path, monkeypatch):
    monkeypatch.setattr("mam.study.dashboard.watch._SEARCH_INTERVAL", 0.0)
    watcher = Watcher(tmp_path)
    watcher.refresh()
    assert (watcher.table, watcher.progress.runs) == ({}, 0)
    path = write_run(tmp_path / "a" / "b", updates=2)
    watcher.refresh()
    row, version = watcher.table["a/b"], watcher.version
    assert (row["task"], row["algorithm"], row["seeds"], row["steps"], row["state"]) == (
        *("lbf/small", "mam", 5, 32),
        "running",
    )
    assert watcher.progress.nbytes > 0
    watcher.refresh()
    assert watcher.table["a/b"] is row
    assert watcher.version == version
    with (path / "metrics.jsonl").open("a") as file:
        file.write(
            '{"kind": "train", "update": 3, "step_count": 48, "elapsed": 20.0, '
            '"episode_return": [1, 1, 1, 1, 1]}\n'
        )
    write_run(tmp_path / "c")
    watcher.refresh()
    assert watcher.version > version
    assert watcher.table["a/b"]["steps"] == 48
    assert watcher.table["c"]["state"] == "finished"
    (path / "config.json").unlink()
    watcher.refresh()
    assert list(watcher.table) == ["c"]
