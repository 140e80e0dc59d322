"""Trackers: one run there per run folder, the same after a resumption, in the real packages."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mam.cli import play as cli
from mam.config import to_json
from mam.errors import RunError, UserError
from mam.runs import loggers
from mam.runs.loggers import find_sink
from mam.runs.sinks import JsonLines, Record
from mam.runs.trackers import IDENTITIES, Tracker
from small_run import CONFIG


class Kept(Tracker):
    """In memory: what it was asked for."""

    name = "kept"
    fails = ()

    def _open(self, title, identity, settings, folder):
        self.opened, self.logged = (title, identity, settings, folder), []
        self._fail("open")
        return identity or "a new one"

    def _log(self, values, step):
        self._fail("log")
        self.logged.append((step, values))

    def _show(self, tag, picture, step):
        self._fail("show")
        self.logged.append((step, tag, picture))

    def _close(self):
        self._fail("close")

    def _fail(self, what):
        if what in self.fails:
            raise ValueError("no\nway")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "mine" / "run"
    path.mkdir(parents=True)
    (path / "versions.json").write_text(json.dumps({"git": "abc-dirty"}))
    return path


RECORD = Record(
    "evaluation",
    1,
    100,
    2.0,
    {"episode_return": np.array([[0.0, 1.0], [2.0, 2.0]]), "broken": np.array([np.nan, 3.0])},
)


def test_a_resumed_run_is_the_same_one_and_a_new_run_another(folder):
    other = {"wandb": "theirs"}
    (folder / IDENTITIES).write_text(json.dumps(other))
    title, identity, settings, where = Kept(folder, CONFIG, resumed=False).opened
    assert (title, identity, where) == ("mine/run", None, folder)
    assert (settings["ppo.num_envs"], settings["commit"]) == (4, "abc-dirty")
    assert json.loads((folder / IDENTITIES).read_text()) == other | {"kept": "a new one"}
    assert Kept(folder, CONFIG, resumed=True).opened[1] == "a new one"
    assert Kept(folder, CONFIG, resumed=False).opened[1] is None


def test_means_and_each_seed_without_what_is_no_number(folder):
    tracker = Kept(folder, replace(CONFIG, seed=4), resumed=False)
    tracker.write(RECORD)
    returns = {"": 1.25, "/seed_4": 0.5, "/seed_5": 2.0}
    expected = {f"evaluation/episode_return{end}": value for end, value in returns.items()}
    assert tracker.logged == [(100, expected | {"evaluation/broken/seed_5": 3.0})]
    single = Kept(folder, replace(CONFIG, num_seeds=1), resumed=False)
    single.write(replace(RECORD, values={"loss": np.array([0.5])}))
    assert single.logged == [(100, {"evaluation/loss": 0.5})]


def test_one_that_cannot_be_opened_ends_the_run_in_one_line(folder, monkeypatch):
    monkeypatch.setattr(Kept, "fails", ("open",))
    with pytest.raises(RunError, match=r"^kept cannot be opened: no way$"):
        Kept(folder, CONFIG, resumed=False)
    assert not (folder / IDENTITIES).exists()


def test_one_that_fails_later_is_said_once_and_the_run_goes_on(folder, monkeypatch, capsys):
    tracker = Kept(folder, CONFIG, resumed=False)
    monkeypatch.setattr(Kept, "fails", ("log", "close"))
    tracker.write(RECORD)
    tracker.write(RECORD)
    tracker.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "kept failed, and the run goes on without it: no way"


def test_a_picture_is_called_as_its_file(folder, monkeypatch, capsys):
    tracker, picture = Kept(folder, CONFIG, resumed=True), folder / "crossing.gif"
    tracker.show(picture, 7)
    assert tracker.logged == [(7, "crossing", picture)]
    monkeypatch.setattr(Kept, "fails", ("show",))
    tracker.show(picture, 8)
    assert "kept failed" in capsys.readouterr().err


def test_mam_play_shows_the_episode_in_the_runs_own_place(folder, monkeypatch):
    """At the steps that the run has come to; what is no tracker or no run is refused before."""
    shown = []
    episode = SimpleNamespace(undrawn="")
    monkeypatch.setattr(loggers, "_TRACKERS", {"kept": Kept})
    monkeypatch.setattr(loggers, "find_spec", lambda package: package)
    monkeypatch.setattr(Kept, "_show", lambda self, *args: shown.append((self.opened, *args)))
    monkeypatch.setattr(cli, "played", lambda args: (episode, None, ""))
    with pytest.raises(UserError, match=r"^--log goes on with a run: there is none in"):
        cli.play(cli.Play(folder, log=("kept",)))
    sink = JsonLines(folder / "metrics.jsonl", append_at=None)
    sink.write(RECORD)
    sink.close()
    (folder / "config.json").write_text(json.dumps(to_json(CONFIG)))
    (folder / IDENTITIES).write_text(json.dumps({"kept": "known"}))
    with pytest.raises(UserError, match="unknown tracker 'jsonl'"):
        cli.play(cli.Play(folder, log=("jsonl",)))
    cli.play(cli.Play(folder, log=("kept",)))
    ((opened, tag, picture, step),) = shown
    assert opened[1] == "known"
    assert (tag, picture, step) == ("episode", folder / "episode.gif", RECORD.step_count)
    episode.undrawn = "no picture was asked for"
    cli.play(cli.Play(folder, log=("kept",)))
    assert len(shown) == 1


TRACKERS = ("wandb", "mlflow", "trackio")


@pytest.mark.parametrize("name", TRACKERS)
def test_one_that_is_not_installed_says_what_installs_it(name, monkeypatch):
    monkeypatch.setattr("mam.runs.loggers.find_spec", lambda package: None)
    with pytest.raises(
        UserError, match=rf'^--log {name} needs {name}: pip install ".*\[{name}\]"$'
    ):
        find_sink(name)


# A run of two records, the second after a resumption, and what the package then has of it.
PROGRAM = """
import json, sys, time
from pathlib import Path
import numpy as np
from mam.config import Config
from mam.runs.loggers import find_sink
from mam.runs.sinks import Record

name, folder = sys.argv[1], Path("mine/run").absolute()
folder.mkdir(parents=True)
(folder / "versions.json").write_text(json.dumps({"git": "abc"}))
config = Config(num_seeds=2, seed=3)
for update, resume in ((1, None), (2, {"step_count": 100})):
    sink = find_sink(name)(folder, config, resume)
    values = {"loss": update * np.array([0.5, 1.5])}
    sink.write(Record("train", update, 100 * update, 1.0, values))
    if resume:
        sink.show(Path(sys.argv[2]), 200)
    sink.close()
    time.sleep(1.1)  # wandb calls its folders by the second
identity = json.loads((folder / "trackers.json").read_text())[name]
"""
READERS = {
    "wandb": """
from wandb.proto import wandb_internal_pb2 as pb

def records(path):  # LevelDB's log: a head of 7 bytes, then blocks of pieces with heads of 7
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its end
            yield pb.Record.FromString(record)
            record = b""

runs, history, settings, shown = set(), [], {}, []
for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
    for record in records(path):
        if record.WhichOneof("record_type") == "run":
            runs.add(record.run.run_id)
            settings |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
        if record.WhichOneof("record_type") == "history":
            named = [(i.key or ".".join(i.nested_key), i) for i in record.history.item]
            row = {name: json.loads(i.value_json) for name, i in named}
            if "crossing._type" in row:
                shown.append([row["step_count"], row["crossing._type"]])
                continue
            history.append([row["step_count"], row["train/loss"], row["train/loss/seed_4"]])
settings = {key: str(settings[key]) for key in ("ppo.lr", "commit")}
assert shown == [[200, "video-file"]] and list(folder.glob("wandb/*/files/media/**/*.gif"))
print(json.dumps([len(runs), runs == {identity}, history, settings]))
""",
    "mlflow": """
from mlflow import MlflowClient

client = MlflowClient()
experiment = client.get_experiment_by_name("mam").experiment_id
(run,) = client.search_runs([experiment])
tags = ("train/loss", "train/loss/seed_4")
one, other = (client.get_metric_history(identity, tag) for tag in tags)
history = [[a.step, a.value, b.value] for a, b in zip(one, other)]
settings = {key: run.data.params[key] for key in ("ppo.lr", "commit")}
assert [i.path for i in client.list_artifacts(identity, "crossing/200")] == [
    "crossing/200/crossing.gif"
]
assert run.data.tags["mlflow.source.git.commit"] == "abc" and run.info.status == "FINISHED"
print(json.dumps([1, run.info.run_id == identity, history, settings]))
""",
    "trackio": """
import trackio
from trackio.sqlite_storage import SQLiteStorage

(run,) = trackio.Api().runs("mam")
logs = SQLiteStorage.get_logs("mam", identity)
history = [
    [row["step"], row["train/loss"], row["train/loss/seed_4"]]
    for row in logs
    if "train/loss" in row
]
(shown,) = (row for row in logs if "crossing" in row)
assert (shown["step"], shown["crossing"]["_type"]) == (200, "trackio.video")
settings = {key: str(run.config[key]) for key in ("ppo.lr", "commit")}
print(json.dumps([1, run.name == identity, history, settings]))
""",
}


@pytest.mark.parametrize("name", TRACKERS)
def test_in_the_real_package_the_same_run_goes_on(name, tmp_path):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    places = {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1",
    }
    picture = tmp_path / "crossing.gif"
    Image.new("L", (8, 8)).save(picture)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + READERS[name], name, picture],
        cwd=tmp_path,
        env=os.environ | places,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("["))
    num_runs, same, history, settings = json.loads(line)
    assert (num_runs, same) == (1, True)
    assert history == [[100, 1.0, 1.5], [200, 2.0, 3.0]]
    assert settings == {"ppo.lr": "0.0005", "commit": "abc"}
