import csv
import errno
import io
import json
import re
import sqlite3
import textwrap
from contextlib import ExitStack, closing
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from mam.config import EvalConfig
from mam.errors import UserError
from mam.learning.train import make_train
from mam.runs import loop
from mam.runs.loggers import find_sink
from mam.runs.sinks import (
    JsonLines,
    Progress,
    Record,
    Sink,
    TensorBoard,
    mean_and_spread,
    read_records,
    seed_means,
    training_speed,
    write_atomically,
)
from mam.types import EnvSpec
from small_run import CONFIG

SPEC = EnvSpec("suite/task", num_agents=2, obs_dim=3, num_actions=4, time_limit=None)


def train(update, **values):
    return Record(
        "train", update, update * 100, update * 2.0, {k: np.asarray(v) for k, v in values.items()}
    )


def evaluation(update, returns):
    return Record(
        "evaluation",
        update,
        update * 100,
        update * 2.0 + 1 / 3,
        {"episode_return": np.asarray(returns)},
    )


def write(path, records, append_at=None):
    """Writes records; returns the position behind each of them."""
    sink = JsonLines(path, append_at=append_at)
    positions = [sink.write(record) or sink.sync() for record in records]
    sink.close()
    return positions


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a.kind, a.update, a.step_count, a.elapsed) == (
            b.kind,
            b.update,
            b.step_count,
            b.elapsed,
        )
        assert list(a.values) == list(b.values)
        for name in b.values:
            np.testing.assert_array_equal(
                a.values[name], b.values[name], strict=a.values[name].dtype == np.float64
            )


def test_json_lines_round_trip_exactly(tmp_path):
    rng = np.random.default_rng(0)
    records = [
        train(1, loss=rng.normal(size=2), small=[5e-324, 0.1 + 0.2], count=[1, 2]),
        evaluation(1, rng.normal(size=(2, 3))),
        Record("absolute", 2, 200, 1 / 3, {"won": np.array([[True, False], [True, True]])}),
    ]
    write(tmp_path / "metrics.jsonl", records)
    assert_equal(read_records(tmp_path / "metrics.jsonl"), records)


def test_json_lines_keep_float32_exactly(tmp_path):
    value = np.float32([0.1, 1 / 3])
    write(tmp_path / "m", [train(1, loss=value)])
    assert (read_records(tmp_path / "m")[0].values["loss"].astype(np.float32) == value).all()


def test_json_is_strict(tmp_path):
    write(
        tmp_path / "m", [train(1, loss=np.float32([np.nan, np.inf]), all_nan=[[np.nan], [-np.inf]])]
    )

    def refuse(constant):
        raise AssertionError(constant)

    row = json.loads((tmp_path / "m").read_text(), parse_constant=refuse)
    assert row["loss"] == [None, None]
    assert row["all_nan"] == [[None], [None]]
    (record,) = read_records(tmp_path / "m")
    np.testing.assert_array_equal(record.values["loss"], [np.nan, np.nan])
    assert record.values["all_nan"].shape == (2, 1)


def test_each_line_is_flushed(tmp_path):
    sink = JsonLines(tmp_path / "m", append_at=None)
    sink.write(train(1, loss=[0.5]))
    assert len(read_records(tmp_path / "m")) == 1
    sink.close()


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "m"
    first = [
        r for u in (1, 2, 3, 4) for r in (train(u, loss=[u / 3]), evaluation(u, [[u / 7, 1.0]]))
    ]
    positions = write(path, first)
    with path.open("a") as file:
        file.write('{"kind": "train", "upd')  # killed here
    write(path, [train(3, loss=[9.0])], append_at=positions[3])
    assert_equal(read_records(path), [*first[:4], train(3, loss=[9.0])])


def test_resume_goes_on_after_the_last_whole_line_of_a_file_that_lost_its_tail(tmp_path):
    path = tmp_path / "m"
    records = [train(u, loss=[1.0]) for u in (1, 2, 3)]
    *_, end = write(path, records)
    path.write_bytes(path.read_bytes()[:-5])
    write(path, [train(4, loss=[1.0])], append_at=end)
    assert_equal(read_records(path), [*records[:2], train(4, loss=[1.0])])
    path.unlink()
    write(path, [train(4, loss=[1.0])], append_at=end)
    assert [r.update for r in read_records(path)] == [4]


def test_a_fresh_run_starts_a_fresh_file(tmp_path):
    write(tmp_path / "m", [train(1, loss=[1.0])])
    write(tmp_path / "m", [train(5, loss=[1.0])])
    assert [r.update for r in read_records(tmp_path / "m")] == [5]


def test_half_written_last_line_is_ignored_and_other_damage_is_not(tmp_path):
    path = tmp_path / "m"
    write(path, [train(u, loss=[1.0]) for u in (1, 2, 3)])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1] + lines[2][:17])
    assert [r.update for r in read_records(path)] == [1, 2]
    path.write_text(lines[0] + lines[1][:17] + "\n" + lines[2])
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read_records(path)


def read_events(folder):
    """Scalars of an event file by tag: records are length (8 bytes), CRC (4), an Event, CRC (4)."""
    (path,) = folder.iterdir()
    data, scalars = path.read_bytes(), {}
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
        data = data[16 + length :]
    return scalars


def test_tensorboard_has_one_sub_run_per_seed(tmp_path):
    sink = TensorBoard(tmp_path, [4, 5])
    sink.write(train(1, loss=[0.5, 0.25]))
    sink.write(evaluation(1, [[0.0, 1.0], [2.0, 2.0]]))
    sink.write(train(2, loss=[1.5, 1.25]))
    sink.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seed_4", "seed_5"]
    assert read_events(tmp_path / "seed_4") == {
        "train/loss": [(100, 0.5), (200, 1.5)],
        "evaluation/episode_return": [(100, 0.5)],
        "evaluation/episode_return_std": [(100, 0.5)],
    }
    assert read_events(tmp_path / "seed_5")["evaluation/episode_return"] == [(100, 2.0)]


class Kept:
    """A sink of one's own."""

    def __init__(self, folder, config, resume):
        self.opened, self.records = (folder, config, resume), []

    def write(self, record):
        self.records.append(record)

    def close(self):
        pass


@pytest.fixture
def installed(monkeypatch):
    """Packages that add sinks."""
    names = {"kept": f"{__name__}:Kept", "broken": "nowhere.at_all:Sink"}
    points = EntryPoints(EntryPoint(name, value, "mam.sinks") for name, value in names.items())
    monkeypatch.setattr("mam.runs.loggers.entry_points", lambda group: points.select(group=group))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "tensorbord",
            "unknown sink 'tensorbord': did you mean tensorboard? (see `mam train --help`)",
        ),
        ("kep", "unknown sink 'kep': did you mean kept? (see `mam train --help`)"),
        ("broken", "the sink broken cannot be imported: No module named 'nowhere'"),
    ],
)
def test_sinks_that_are_none_are_refused(installed, name, said, tmp_path):
    with pytest.raises(UserError) as refused:
        loop.start(replace(CONFIG, log=("jsonl", name)), tmp_path / "run")
    assert str(refused.value) == said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("log", "files"),
    [
        (("jsonl", "tensorboard"), {"metrics.jsonl", "tensorboard"}),
        (("kept",), {"metrics.jsonl"}),
        (("kept", "tensorboard", "kept"), {"metrics.jsonl", "tensorboard"}),
    ],
)
def test_a_runs_numbers_go_where_it_is_told_and_to_json_lines_always(
    installed, log, files, tmp_path
):
    config, folder = replace(CONFIG, log=log), loop.RunFolder(tmp_path)
    folder.config.write_text("{}")
    progress = Progress(96, num_seeds=2, console=Console(file=io.StringIO()))
    with ExitStack() as stack:
        running = loop._Loop(config, folder, None, make_train(config), ())
        running.open(stack, progress)
        running.write("train", {"loss": np.array([0.5, 0.25])})
    assert {path.name for path in tmp_path.iterdir()} - {"config.json", "checkpoint"} == files
    assert [record.values["loss"].tolist() for record in folder.records()] == [[0.5, 0.25]]
    kept = [sink for sink in running._sinks if isinstance(sink, Kept)]
    assert [sink.opened for sink in kept] == [(tmp_path, config, None)] * ("kept" in log)
    assert all(sink.records[0].kind == "train" for sink in kept)


def test_a_resumed_run_is_told_where_its_sinks_go_on(tmp_path):
    positions = write(tmp_path / "metrics.jsonl", [train(u, loss=[u / 3, u]) for u in (1, 2, 3)])
    for name in ("jsonl", "tensorboard", "csv"):
        find_sink(name)(
            tmp_path, CONFIG, {"metrics_bytes": positions[1], "step_count": 200}
        ).close()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [(row["step_count"], row["seed"], row["value"]) for row in rows] == [
        ("100", "0", repr(1 / 3)),
        ("100", "1", "1.0"),
        ("200", "0", repr(2 / 3)),
        ("200", "1", "2.0"),
    ]
    assert [record.update for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2]
    for seed in (0, 1):
        (path,) = (tmp_path / "tensorboard" / f"seed_{seed}").iterdir()
        assert path.name.endswith(".200")


def test_the_documented_sink_is_one(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "runs.md").read_text()
    code = textwrap.dedent(
        re.search(r"^    import sqlite3\n(?:    .*\n|\n)*", text, re.MULTILINE)[0]
    )
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    sink = names["Database"](tmp_path / "mine", CONFIG, None)
    assert isinstance(sink, Sink)
    sink.write(train(1, loss=[0.5, 1.5]))
    sink.write(evaluation(1, [[0.0, 1.0], [2.0, 2.0]]))
    sink.close()
    with closing(sqlite3.connect("runs.db")) as database:
        rows = database.execute("SELECT * FROM scores").fetchall()
    assert rows == [(str(tmp_path / "mine"), 100, 1.25)]


def run_progress(console, *, fail=False):
    with Progress(1000, num_seeds=2, console=console) as progress:
        with progress.compiling("the update"):
            pass
        for update in range(1, 5):
            values = {"episode_return": np.array([0.1, 0.3]), "entropy": np.array([1.0, 2.0])}
            progress.write(Record("train", update, update * 100, update * 2.0, values))
        progress.write(evaluation(4, [[0.0, 1.0], [1.0, 1.0]]))
        progress.log("note [bold]as it is[/]")
        if fail:
            raise KeyboardInterrupt


def test_progress_in_a_file_is_plain_lines():
    out = io.StringIO()
    run_progress(Console(file=out, width=40))
    text = re.sub(r"in \d+\.\d s", "in … s", out.getvalue())
    assert text.splitlines() == [
        "compiling the update…",
        "compiled the update in … s",
        "400/1.0k · 100 steps/s · 0:00:13 left · return 0.750 ± 0.354 · entropy 1.500 ± 0.707",
        "note [bold]as it is[/]",
    ]


def test_progress_with_forced_colours_in_a_file_has_no_control_characters(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    run_progress(None)
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("fail", [False, True])
def test_progress_gives_the_terminal_back(fail):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    if fail:
        with pytest.raises(KeyboardInterrupt):
            run_progress(console, fail=True)
    else:
        run_progress(console)
    text = out.getvalue()
    hidden, shown = text.rfind("\x1b[?25l"), text.rfind("\x1b[?25h")
    assert 0 <= hidden < shown
    assert "compiled the update in" in text
    assert "return 0.750 ± 0.354" in text


@pytest.mark.parametrize(
    ("settings", "played"),
    [
        (EvalConfig(), "32 episodes, sampled and greedy"),
        (EvalConfig(greedy=True), "32 episodes, greedy and sampled"),
        (EvalConfig(num_episodes=8, both_modes=False), "8 episodes, sampled…"),
    ],
)
def test_an_evaluation_says_how_it_plays(settings, played):
    out = io.StringIO()
    with Progress(1000, num_seeds=1, console=Console(file=out)) as progress:
        progress.evaluating(settings)
    assert played in out.getvalue()


def test_seconds_of_compilation_do_not_slow_the_speed_shown(monkeypatch):
    now = iter([0.0, 60.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    out = io.StringIO()
    with Progress(1000, num_seeds=1, console=Console(file=out)) as progress:
        progress.write(Record("train", 1, 100, 10.0, {}))
        with progress.compiling("the evaluation"):
            pass
        progress.write(Record("evaluation", 2, 200, 80.0, {"episode_return": np.array([[1.0]])}))
    assert "200/1.0k · 10 steps/s · 0:01:20 left · return 1.000" in out.getvalue()


def test_speed_is_that_of_training_however_often_a_run_is_evaluated():
    kinds = [("train", 1, 100, 60.0), ("evaluation", 1, 100, 90.0), ("train", 2, 200, 92.0)]
    kinds += [("evaluation", 2, 200, 120.0), ("train", 3, 300, 122.0), ("absolute", 3, 300, 132.0)]
    records = [Record(*head, {}) for head in kinds]
    assert training_speed(records) == 50.0
    assert np.isnan(training_speed(records[:2]))


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomically(tmp_path / "a", "old")
    monkeypatch.setattr("mam.runs.sinks.os", SimpleNamespace(fsync=full_disk))
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_means():
    np.testing.assert_array_equal(seed_means(np.array([[0.0, 1.0], [2.0, 4.0]])), [0.5, 3.0])
    some = np.array([[np.nan, 7.0, np.nan], [np.nan, np.nan, np.nan], [1.0, 2.0, 3.0]])
    for name in ("info_steps_to_win", "greedy_info_steps_to_win"):
        np.testing.assert_array_equal(seed_means(some, name), [7.0, np.nan, 2.0])
    np.testing.assert_array_equal(seed_means(some, "episode_return"), [np.nan, np.nan, 2.0])
    assert mean_and_spread(np.array([1.0])) == "1.000"
    assert mean_and_spread(np.array([1.0, np.nan, 3.0])) == "2.000 ± 1.414"
    assert mean_and_spread(np.array([np.nan])) == "–"
