"""Metrics as columns, while they are written."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mam.runs.sinks import JsonLines, Record, read_records, seed_means
from mam.study.dashboard import reading
from mam.study.dashboard.reading import Columns, Reader, Rows

KINDS = ("train", "evaluation", "absolute")


def line(kind, update, **values):
    head = {"kind": kind, "update": update, "step_count": 16 * update, "elapsed": 0.5 * update}
    return json.dumps(head | values).encode() + b"\n"


def lines(num_updates=6):
    """Rows of every kind, with numbers that are none, and a metric that comes late."""
    for update in range(1, num_updates + 1):
        late = {"late": [1.0, None]} if update > 3 else {}
        yield line("train", update, loss=[update / 3, None if update == 2 else 0.1], **late)
        if update % 2 == 0:
            yield line(
                "evaluation",
                update,
                episode_return=[[update, 1.0], [0.5, None]],
                won=[[True, False]] * 2,
            )
    yield line("absolute", num_updates, episode_return=[[1.0, 2.0, 3.0], [4.0, 5.0, 6.5]])


FILE = b"".join(lines())


def everything(reader):
    """All that was read, as plain lists."""
    found = {}
    for kind in KINDS:
        columns = reader.metrics.of(kind)
        rows = columns.rows(columns.metrics)
        found[kind] = [rows.steps.tolist(), rows.elapsed.tolist()]
        found[kind] += [
            (name, np.nan_to_num(values, nan=-1).tolist()) for name, values in rows.values.items()
        ]
    metrics = reader.metrics
    return found | {
        "last": (metrics.last_kind, metrics.step_count, metrics.longest_gap, metrics.damaged)
    }


def read_at_once(path, content=FILE):
    path.write_bytes(content)
    reader = Reader(path)
    assert reader.poll()
    return everything(reader)


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, len(FILE)), max_size=12).map(sorted),
    chunk=st.sampled_from([7, 64, 1 << 18]),
    most=st.sampled_from([2, 3, 1 << 18]),
)
def test_any_split_gives_the_same_columns(tmp_path_factory, cuts, chunk, most):
    folder = tmp_path_factory.mktemp("split")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK", chunk)
        patch.setattr(reading, "MAX_ROWS", most)
        reader = Reader(folder / "metrics.jsonl")
        with (folder / "metrics.jsonl").open("wb") as file:
            for begin, end in zip([0, *cuts], [*cuts, len(FILE)], strict=True):
                file.write(FILE[begin:end])
                file.flush()
                reader.poll()
        patch.setattr(reading, "CHUNK", 1 << 18)
        assert everything(reader) == read_at_once(folder / "whole")
    assert not reader.poll()


def test_the_columns_are_the_records(tmp_path):
    path, rng = tmp_path / "metrics.jsonl", np.random.default_rng(0)
    sink = JsonLines(path, append_at=None)
    for update in range(1, 30):
        sink.write(
            Record(
                "train",
                update,
                update * 16,
                update / 3,
                {"loss": rng.normal(size=3).astype(np.float32)},
            )
        )
        if update % 5 == 0:
            sink.write(
                Record(
                    "evaluation",
                    update,
                    update * 16,
                    update / 3,
                    {"episode_return": rng.normal(size=(3, 7))},
                )
            )
    sink.close()
    reader = Reader(path)
    reader.poll()
    records = read_records(path)
    for kind, name in (("train", "loss"), ("evaluation", "episode_return")):
        rows, of_kind = (
            reader.metrics.of(kind).rows([name]),
            [record for record in records if record.kind == kind],
        )
        np.testing.assert_array_equal(rows.steps, [record.step_count for record in of_kind])
        np.testing.assert_array_equal(rows.elapsed, [record.elapsed for record in of_kind])
        np.testing.assert_array_equal(
            rows.values[name], [seed_means(record.values[name]) for record in of_kind]
        )


@pytest.mark.parametrize("longer", [False, True])
def test_a_resumed_run_is_read_anew(tmp_path, longer):
    path = tmp_path / "metrics.jsonl"
    before, after = (
        list(lines()),
        [line("train", update, loss=[9.0, update]) for update in range(4, 40 if longer else 5)],
    )
    path.write_bytes(b"".join(before))
    reader = Reader(path)
    reader.poll()
    kept = b"".join(before[:4])
    with path.open("r+b") as file:  # as JsonLines does on a resume
        file.truncate(len(kept))
        file.seek(0, 2)
        file.write(b"".join(after))
    assert reader.poll()
    assert everything(reader) == read_at_once(tmp_path / "whole", kept + b"".join(after))


def test_a_file_that_is_replaced_or_missing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    reader = Reader(path)
    assert not reader.poll()
    path.write_bytes(FILE)
    assert reader.poll()
    (tmp_path / "new").write_bytes(line("train", 1, loss=[1.0, 1.0]))
    (tmp_path / "new").replace(path)
    assert reader.poll()
    assert (len(reader.metrics.train), reader.metrics.step_count) == (1, 16)
    path.unlink()
    assert not reader.poll()


def test_a_half_written_line_waits_and_damage_is_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = line("train", 1, loss=[1.0, 2.0])
    damaged = [
        b'{"kind": "train"}\n',
        b"\0\0\0\n",
        b"[1, 2]\n",
        line("dance", 1),
        line("train", 2, loss=[1.0, 2.0, 3.0]),
    ]
    path.write_bytes(good + b"".join(damaged) + good[:-9])
    reader = Reader(path)
    reader.poll()
    assert (len(reader.metrics.train), reader.metrics.damaged) == (1, len(damaged))
    with path.open("ab") as file:
        file.write(good[-9:])
    reader.poll()
    assert (len(reader.metrics.train), reader.metrics.damaged) == (2, len(damaged))


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(reading, "MAX_ROWS", 100)
    columns = Columns(np.float32)
    for begin in range(0, 5000, 37):
        steps = np.arange(begin, begin + 37)
        columns.append(
            Rows(
                steps,
                steps.astype(float),
                {"loss": np.stack([steps, -steps], axis=1).astype(float)},
            )
        )
    rows = columns.rows(["loss"])
    assert 50 <= len(columns) <= 100
    assert (np.diff(rows.steps) == 64).all()
    assert rows.steps[0] == 0
    np.testing.assert_array_equal(rows.values["loss"], np.stack([rows.steps, -rows.steps], axis=1))
    assert columns.nbytes <= 125 * (8 + 8 + 2 * 4)
