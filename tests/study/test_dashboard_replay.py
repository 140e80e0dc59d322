"""Episodes that were played, and playing others."""

import asyncio
import json
import time
from html import escape
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mam.errors import RunError, UserError
from mam.study.dashboard.map import packed, scene
from mam.study.dashboard.player import _course, _decisions, _mixing
from mam.study.dashboard.replay import Players, load, replays_of
from mam.study.dashboard.runs import LiveRun
from report_runs import write_run

ARRAYS = {name: [[0.5, 1.5]] * 3 for name in ("reward", "value", "action", "log_prob", "alive")}
ARRAYS["order"] = [[1, 0]] * 3


@pytest.fixture
def run(tmp_path):
    run = LiveRun(write_run(tmp_path / "run"), "run")
    run.poll()
    return run


def write(path, **changes):
    path.write_text(json.dumps(ARRAYS | {"picture": None, "num_frames": 0} | changes))
    return path


def test_traces_are_found_and_nothing_else(run):
    assert replays_of(run) == {}
    (run.path / "replays").mkdir()
    write(run.path / "episode.json")
    time.sleep(0.01)
    newest = write(run.path / "replays" / "seed0-greedy-0.json")
    assert list(replays_of(run)) == ["seed0-greedy-0", "episode"]
    replay = load(newest)
    assert (replay.length, replay.last, replay.frame(1), replay.reward_so_far(2)) == (
        3,
        3,
        None,
        2.0,
    )


def test_states_that_look_alike_share_a_frame(tmp_path):
    shades = [Image.fromarray(np.full((4, 4), shade, np.uint8)) for shade in (0, 0, 0, 200)]
    shades[0].save(
        tmp_path / "e.gif", save_all=True, append_images=shades[1:], duration=150, loop=0
    )
    replay = load(write(tmp_path / "e.json", picture="e.gif", num_frames=4))
    assert [replay.frame(state) for state in range(5)] == [0, 0, 0, 1, 1]
    assert (len(replay.frames), replay.last) == (2, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": [[1.0]]},
        {"picture": "missing.gif"},
        {"value": None},
        {"order": "no"},
        {"order": [[0, 5]] * 3},
        {"action": [0, 1, 2]},
        {"episode_return": [1]},
        {"mixing": {"encoder 1": [[[1.0, 0.0]]] * 3}},
        {"mixing": [1]},
        {"positions": [[0, 1]] * 3},
        {"positions": [[[0, 1]]] * 3},
        {"positions": [[[], []]] * 3},
        {"positions": 1},
    ],
)
def test_a_trace_that_is_damaged_is_said(tmp_path, changes):
    with pytest.raises(UserError, match=r"e\.json cannot be shown"):
        load(write(tmp_path / "e.json", **changes))


@pytest.mark.parametrize(
    ("agents", "shown"),
    [
        (["wolf_0", "<b>\n"], ["wolf_0", "<b>\\n"]),
        *((unfit, ["0", "1"]) for unfit in (None, ["wolf_0"], "no", {"0": 1, "1": 2})),
    ],
)
def test_agents_have_the_names_of_the_trace_or_their_places(tmp_path, agents, shown):
    replay = load(write(tmp_path / "e.json", agents=agents))
    assert replay.agents == shown
    cells = _decisions(replay, 0)
    assert all(f'<td class="l">{escape(name)}</td>' in cells for name in shown)
    assert [line["name"] for line in _course(replay)["series"][1:]] == [
        f"value of agent {name}" for name in shown
    ]


def test_who_listens_to_whom_is_drawn_at_each_step(tmp_path):
    encoder = [[[1.0, 0.0], [0.25, 0.75]]] * 3
    cross = [[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]] * 3
    mixing = {"encoder 1": encoder, "<cross>": cross}
    replay = load(write(tmp_path / "e.json", agents=["<a>", "b"], mixing=mixing))
    drawn = _mixing(replay, 2)
    assert 'style="--share: 0.250" title="b takes 25% of &lt;a&gt;"' in drawn
    assert 'title="b takes 50% of start"' in drawn
    assert "<figcaption>&lt;cross&gt;</figcaption>" in drawn
    assert drawn.count("<td") == drawn.count("</td>") == 4 + 6
    assert _mixing(load(write(tmp_path / "e.json")), 0) == ""


def drawn(replay):
    """What the canvas is told, and the arrays that it gets."""
    told, numbers = scene("key", replay), np.frombuffer(packed(replay), np.float32)
    arrays, at, shape = {}, 0, replay.trace["reward"].shape
    for name, width in told.get("parts", {}).items():
        size = width * np.prod(shape)
        arrays[name], at = numbers[at : at + size].reshape(*shape, width), at + size
    assert at == len(numbers)
    return told, arrays


@pytest.mark.parametrize(
    ("positions", "box", "second"),
    [
        # Rows and columns: x to the right is the column, y downwards the row.
        ([[0, 4], [2, 1]], [0.5, -0.5, 4.5, 2.5], [1, 2]),
        ([[0.0, 1.0], [0.0, 0.5]], [-0.015, -1.015, 0.015, -0.485], [0, -0.5]),  # x, y upwards
        ([[3], [5]], [2.5, -0.5, 5.5, 0.5], [5, 0]),  # along a line
        ([[1, 2, 9], [None, 2, 9]], [1.5, 0.5, 2.5, 1.5], [np.nan] * 2),  # one of them nowhere
    ],
)
def test_a_map_is_drawn_where_agents_were(tmp_path, positions, box, second):
    told, arrays = drawn(load(write(tmp_path / "e.json", positions=[positions] * 3)))
    assert (told["length"], told["last"], told["agents"]) == (3, 3, ["0", "1"])
    assert told["range"] == [0.5, 1.5]
    np.testing.assert_allclose(told["box"], box, atol=1e-6)
    np.testing.assert_allclose(arrays["positions"][2, 1], second)
    assert arrays["place"][0, :, 0].tolist() == [1, 0]
    assert arrays["action"][1, :, 0].tolist() == [0.5, 1.5]


def test_padding_is_on_no_map(tmp_path):
    changes = {"positions": [[[0, 0], [3, 4]]] * 3, "alive": [[False, True]] * 3}
    told, arrays = drawn(load(write(tmp_path / "e.json", **changes)))
    assert told["box"] == [3.5, 2.5, 4.5, 3.5]
    assert np.isnan(arrays["positions"][:, 0]).all()


@pytest.mark.parametrize("positions", [None, [[[None], [1e300]]] * 3])
def test_without_positions_there_is_no_map(tmp_path, positions):
    told, arrays = drawn(load(write(tmp_path / "e.json", positions=positions)))
    assert (told, arrays) == ({"key": "key", "last": 3}, {})


def test_of_a_crowd_the_extent_of_values_is_drawn(tmp_path):
    crowd = {name: [np.arange(100).tolist()] * 2 for name in ARRAYS}
    crowd["alive"] = [[1] * 100, [0] + [1] * 98 + [0]]
    series = _course(load(write(tmp_path / "e.json", **crowd)))["series"]
    assert [(line["name"], [y for _, y in line["data"]]) for line in series[1:]] == [
        ("highest value", [99, 98]),
        ("mean value", [49.5, 49.5]),
        ("lowest value", [0, 1]),
    ]


def played(run, monkeypatch, tmp_path, script):
    """Plays with a shell script in place of Python; returns the trace and what was said."""
    (tmp_path / "python").write_text("#!/bin/sh\n" + script)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(
        "mam.study.dashboard.replay.sys", SimpleNamespace(executable=str(tmp_path / "python"))
    )
    said = []
    return asyncio.run(
        Players().play(run, policy_seed=2, greedy=True, seed=7, say=said.append)
    ), said


def test_an_episode_is_played_in_a_process_of_its_own(run, monkeypatch, tmp_path):
    path, said = played(run, monkeypatch, tmp_path, 'echo "$@"; echo "on $JAX_PLATFORMS"')
    out = run.path / "replays" / "seed2-greedy-7.gif"
    assert path == out.with_suffix(".json")
    assert said == [
        f"-m mam play {run.path} --out {out} --seed 7 --policy-seed 2 --greedy",
        "on cpu",
    ]


def test_what_goes_wrong_is_the_last_line(run, monkeypatch, tmp_path):
    with pytest.raises(RunError, match=r"^no checkpoint$"):
        played(run, monkeypatch, tmp_path, "echo playing; echo 'mam: no checkpoint' >&2; exit 2")


def test_the_end_of_the_page_ends_what_plays(run, monkeypatch, tmp_path):
    async def close_while_playing():
        players = Players()
        playing = asyncio.create_task(
            players.play(run, policy_seed=0, greedy=False, seed=0, say=lambda line: players.close())
        )
        with pytest.raises(RunError, match="here"):
            await playing

    (tmp_path / "python").write_text("#!/bin/sh\necho here\nexec sleep 60")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(
        "mam.study.dashboard.replay.sys", SimpleNamespace(executable=str(tmp_path / "python"))
    )
    begin = time.monotonic()
    asyncio.run(close_while_playing())
    assert time.monotonic() - begin < 20
