"""Run folders that hold anything: bad ones are reported, the others go on, and nothing hangs."""

import json
import os
import threading
import time

import orjson
import pytest

from mam.config import to_json
from mam.errors import UserError
from mam.study.dashboard import reading
from mam.study.dashboard.charts import _series
from mam.study.dashboard.curves import Curves, groups, labels_of, metrics_of
from mam.study.dashboard.details import Logs, Settings
from mam.study.dashboard.reading import Reader
from mam.study.dashboard.replay import load, replays_of
from mam.study.dashboard.runs import LiveRun, tail
from mam.study.dashboard.watch import Watcher
from report_runs import CONFIG, write_run

GOOD = json.dumps(to_json(CONFIG))
DEEP = "[" * 100_000 + "]" * 100_000
CONFIGS = {
    "list": "[]",
    "null": "null",
    "number": "3",
    "string": '"text"',
    "deep": DEEP,
    "deep group": '{"ppo": ' * 2000 + "1" + "}" * 2000,
    "digits": json.dumps(to_json(CONFIG)).replace('"num_seeds": 5', f'"num_seeds": {"9" * 400}'),
    "float of digits": GOOD.replace('"lr": 0.0005', f'"lr": {"9" * 400}'),
    "seeds": GOOD.replace('"num_seeds": 5', '"num_seeds": 1e30'),
    "not UTF-8": b"\xff\xfe{",
    "surrogate": GOOD.replace("lbf/small", "\\udcff"),
    "control": GOOD.replace("lbf/small", "\\u001b[31m"),
    "empty": "",
    "NUL": "\0" * 100,
}
HEAD = {"kind": "train", "update": 1, "step_count": 16, "elapsed": 1.0}
LINES = {
    "steps": json.dumps(HEAD | {"step_count": 1e300}),
    "digits": json.dumps(HEAD).replace("16", "9" * 400),
    "64 bits": json.dumps(HEAD | {"step_count": 2**64 - 1}),
    "text as steps": json.dumps(HEAD | {"step_count": "16"}),
    "true as steps": json.dumps(HEAD | {"step_count": True}),
    "no time": json.dumps(HEAD | {"elapsed": None}),
    "list": "[]",
    "null": "null",
    "deep": json.dumps(HEAD)[:-1] + ', "loss": ' + "[" * 900 + "]" * 900 + "}",
    "deeper": DEEP,
    "no seeds": json.dumps(HEAD | {"loss": []}),
    "text": json.dumps(HEAD | {"loss": ["a"]}),
    "objects": json.dumps(HEAD | {"loss": [{}]}),
    "ragged": json.dumps(HEAD | {"loss": [[1], [2, 3]]}),
    "unknown kind": json.dumps(HEAD | {"kind": "__class__"}),
    "kind of a list": json.dumps(HEAD | {"kind": []}),
    "not UTF-8": b'{"kind": "\xff"}',
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_is_none_is_a_failed_run(tmp_path, name):
    text = CONFIGS[name]
    write_run(tmp_path / "good")
    write_run(tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_bytes(
        text if isinstance(text, bytes) else text.encode()
    )
    table = looked(tmp_path).table
    assert (table["good"]["state"], table["bad"]["state"]) == ("finished", "failed")
    assert len(table["bad"]["why"].splitlines()) == 1


def looked(root):
    """A watcher that has looked once; what it found can be sent to a browser."""
    watcher = Watcher(root)
    watcher.refresh()
    orjson.dumps(watcher.table)
    return watcher


def seen(run):
    """All that the page makes of a run."""
    Settings._describe([run, run])
    Settings._describe([run])
    Logs._read(run)
    replays_of(run)
    curves = Curves()
    for labels in groups([run], labels_of([run])).values():
        for metric in metrics_of([run]):
            for axis in ("steps", "time"):
                for label, some in labels.items():
                    curve = curves.of(some, metric, axis)[1]
                    orjson.dumps([] if curve is None else _series(label, curve, "#000", "-"))


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_is_none_is_counted_and_the_others_are_read(tmp_path, name):
    path, line = write_run(tmp_path / "run") / "metrics.jsonl", LINES[name]
    good = path.read_bytes()
    path.write_bytes(good + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    run = looked(tmp_path).runs["run"]
    assert run.metrics.damaged == (name != "no seeds")
    assert len(run.metrics.train) >= 2 * CONFIG.num_updates
    seen(run)


@pytest.mark.parametrize("value", [1e300, -1e308, 1e-320, None, 10**18])
def test_extreme_numbers_are_shown(tmp_path, value):
    path = write_run(tmp_path / "run") / "metrics.jsonl"
    rows = [
        HEAD
        | {
            "kind": kind,
            "elapsed": 1e300,
            "step_count": 2**62,
            "episode_return": [value] * 5,
            "loss": [value] * 5,
        }
        for kind in ("train", "evaluation", "absolute")
    ]
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    watcher = looked(tmp_path)
    assert watcher.runs["run"].metrics.damaged == 0
    seen(watcher.runs["run"])


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "metrics.jsonl",
        "versions.json",
        "output.log",
        "marl_eval.json",
        "episode.json",
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "endless", "folder", "link to nothing", "loop"])
def test_only_files_are_read(tmp_path, name, kind):
    write_run(tmp_path / "good")
    path = write_run(tmp_path / "bad") / name
    if path.exists():
        path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "endless": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "link to nothing": lambda: path.symlink_to("nothing"),
        "loop": lambda: path.symlink_to(path.name),
    }[kind]()
    watcher = looked(tmp_path)
    assert watcher.table["good"]["state"] == "finished"
    if "bad" in watcher.runs:
        seen(watcher.runs["bad"])
        assert tail(path) == ""
        for replay in replays_of(watcher.runs["bad"]).values():
            with pytest.raises(UserError):
                load(replay)


@pytest.mark.parametrize("name", [b"\xff\xfe", b"line\nbreak", b"\x1b[31m", "\u202egnp".encode()])
def test_a_folder_may_have_any_name(tmp_path, name):
    write_run(tmp_path / os.fsdecode(name))
    watcher = looked(tmp_path)
    ((shown, run),) = watcher.runs.items()
    assert shown.isprintable()
    assert watcher.table[shown]["state"] == "finished"
    seen(run)


@pytest.mark.parametrize(
    "content", ["[]", "null", '{"device": {"a": [1, {}]}}', '{"device": 3}', DEEP, "9" * 5000]
)
def test_versions_of_any_shape(tmp_path, content):
    (write_run(tmp_path / "run") / "versions.json").write_text(content)
    seen(looked(tmp_path).runs["run"])


def test_lines_that_are_too_long_are_skipped_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 64)
    monkeypatch.setattr(reading, "MAX_LINE", 300)
    good = json.dumps(HEAD | {"loss": [1.0]}).encode() + b"\n"
    path = tmp_path / "metrics.jsonl"
    reader = Reader(path)
    parse = Reader._parse
    monkeypatch.setattr(
        Reader, "_parse", lambda self, lines: seen_lines.extend(lines) or parse(self, lines)
    )
    seen_lines = []
    content = (
        good
        + b"x" * 5000
        + b"\n"
        + good
        + b"y" * 301
        + b"\n"
        + b"z" * 300
        + b"\n"
        + good
        + b"w" * 900
    )
    with path.open("wb") as file:
        for begin in range(0, len(content), 97):
            file.write(content[begin : begin + 97])
            file.flush()
            reader.poll()
    assert (len(reader.metrics.train), reader.metrics.damaged) == (3, 3)
    assert max(map(len, seen_lines)) <= 300
    with path.open("ab") as file:
        file.write(b"\n" + good)
    reader.poll()
    assert (len(reader.metrics.train), reader.metrics.damaged) == (4, 4)


def test_a_large_file_is_read_in_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 64)
    monkeypatch.setattr(reading, "MAX_READ", 200)
    path = write_run(tmp_path / "run") / "metrics.jsonl"
    reader, looks = Reader(path), 0
    while reader.poll():
        looks += 1
    assert looks > 5
    assert len(reader.metrics.train) == CONFIG.num_updates


def test_numbers_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BYTES", 4000)
    path = tmp_path / "metrics.jsonl"
    rows = [HEAD | {"loss": [0.0] * 20, f"m{index}": [0.0] * 20} for index in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = Reader(path)
    reader.poll()
    assert reader.metrics.damaged > 50
    assert reader.metrics.nbytes < 3 * 4000


def test_a_run_that_cannot_be_read_says_so_and_the_thread_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("mam.study.dashboard.watch.INTERVAL", 0.01)
    write_run(tmp_path / "bad")
    write_run(tmp_path / "good")
    poll = LiveRun.poll
    monkeypatch.setattr(LiveRun, "poll", lambda self: 1 / 0 if self.name == "bad" else poll(self))
    watcher = Watcher(tmp_path)
    watcher.start()
    until(lambda: "good" in watcher.table and "bad" in watcher.table)
    assert (watcher.table["bad"]["state"], watcher.table["bad"]["why"]) == (
        "failed",
        "ZeroDivisionError: division by zero",
    )
    assert watcher.table["good"]["state"] == "finished"
    assert watcher.trouble == ""
    monkeypatch.setattr(Watcher, "refresh", lambda self: 1 / 0)
    until(lambda: watcher.trouble == "reading failed: ZeroDivisionError: division by zero")
    watcher.stop()
    assert watcher.trouble == "" or "ZeroDivision" in watcher.trouble


def test_a_reader_that_waits_or_is_gone_is_said(tmp_path, monkeypatch):
    write_run(tmp_path / "slow")
    watcher = Watcher(tmp_path)
    going = threading.Event()
    monkeypatch.setattr(LiveRun, "poll", lambda self: going.wait(20))
    monkeypatch.setattr("mam.study.dashboard.watch._PATIENCE", 0.05)
    monkeypatch.setattr(Watcher, "_watch", Watcher.refresh)  # a thread that ends after a look
    watcher.start()
    until(lambda: watcher.trouble.startswith("slow takes more than"))
    going.set()
    until(lambda: watcher.trouble.startswith("nothing is read any more"))


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
