import io
import json
import re
import struct
from itertools import product

import numpy as np
import pytest
from rich.console import Console

from mam.config import Config, EvalConfig, NetworkConfig, RecurrenceConfig
from mam.runs.sinks import Record
from mam.runs.summary import (
    bootstrap_interval,
    deployment,
    plot_learning_curve,
    summary_table,
    write_marl_eval,
)


def make_records(num_seeds, *, absolute=True):
    rng = np.random.default_rng(num_seeds)
    records = []
    for i in range(1, 4):
        records.append(Record("train", i, i * 1000, i * 2.0, {"loss": rng.normal(size=num_seeds)}))
        values = {
            "episode_return": i / 3 + rng.normal(size=(num_seeds, 4)),
            "won": rng.random((num_seeds, 4)) > 0.5,
        }
        records.append(Record("evaluation", i, i * 1000, i * 2.0 + 0.5, values))
    if absolute:
        values = {
            "episode_return": np.full((num_seeds, 8), 0.75),
            "won": np.ones((num_seeds, 8), bool),
        }
        records.append(Record("absolute", 3, 3000, 7.0, values))
    return records


def rendered(table):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_bootstrap_interval_is_that_of_all_resamples():
    values = np.array([0.0, 1.0, 5.0])
    means = np.mean(list(product(values, repeat=3)), axis=1)  # all 27 equally likely resamples
    expected = np.quantile(means, [0.1, 0.9], method="inverted_cdf")
    np.testing.assert_allclose(bootstrap_interval(values, confidence=0.8), expected)
    low, high = bootstrap_interval(np.stack([values, values + 10], axis=1))
    np.testing.assert_allclose((low[1], high[1]), (low[0] + 10, high[0] + 10))


def test_marl_eval_shape(tmp_path):
    records = make_records(2)
    path = write_marl_eval(
        tmp_path, records, env="lbf", task="small", algorithm="mam", seeds=[3, 4]
    )
    assert path == tmp_path / "marl_eval.json"
    runs = json.loads(path.read_text())["lbf"]["small"]["mam"]
    assert list(runs) == ["seed_3", "seed_4"]
    for index, run in enumerate(runs.values()):
        assert list(run) == ["step_0", "step_1", "step_2", "absolute_metrics"]
        last = records[-2].values
        assert run["step_2"] == {
            "step_count": 3000,
            "elapsed_time": 6.5,
            "mean_episode_return": last["episode_return"][index].tolist(),
            "won": last["won"][index].tolist(),
        }
        assert run["absolute_metrics"] == {"mean_episode_return": [0.75] * 8, "won": [1.0] * 8}


def test_marl_eval_of_an_unfinished_run(tmp_path):
    path = write_marl_eval(
        tmp_path, make_records(1, absolute=False), env="e", task="t", algorithm="a", seeds=[0]
    )
    assert list(json.loads(path.read_text())["e"]["t"]["a"]["seed_0"]) == [
        "step_0",
        "step_1",
        "step_2",
    ]


def test_summary_of_several_seeds():
    records = make_records(3)
    records[-2].values["episode_return"][:] = [[1.0], [2.0], [3.0]]
    records[-4].values["episode_return"][:] = [[5.0], [1.0], [1.0]]
    records[-6].values["episode_return"][:] = 0.0
    text = rendered(summary_table(records, seeds=[7, 8, 9], title="a run"))
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in text.splitlines()
        if "│" in line
    ]
    assert rows[:4] == [
        ["7", "1.000", "5.000", "0.750"],
        ["8", "2.000", "2.000", "0.750"],
        ["9", "3.000", "3.000", "0.750"],
        ["mean ± std", "2.000 ± 1.000", "3.333 ± 1.528", "0.750 ± 0.000"],
    ]
    assert rows[4][0] == "95 % interval"
    assert rows[4][1:] == ["[1.000, 3.000]", "[2.000, 5.000]", "[0.750, 0.750]"]
    assert "3,000 steps × 3 seeds · 2,000 steps/s · 0:00:07 wall-clock" in " ".join(text.split())


@pytest.mark.parametrize(
    ("greedy", "beside", "words"),
    [
        (
            False,
            {"greedy_episode_return": 0.639},
            "deploy sampled actions: 0.750, with greedy ones 0.639 (each",
        ),
        (
            False,
            {"greedy_episode_return": 0.9},
            "deploy greedy actions: 0.900, with sampled ones 0.750 (each",
        ),
        (
            True,
            {"sampled_episode_return": 0.9},
            "deploy sampled actions: 0.900, with greedy ones 0.750 (each",
        ),
        (False, {}, "deploy sampled actions, the only ones played"),
    ],
)
def test_a_run_says_which_actions_to_deploy(greedy, beside, words):
    records = make_records(2)
    records[-1].values.update({name: np.full((2, 8), value) for name, value in beside.items()})
    config = Config(eval=EvalConfig(greedy=greedy))
    assert re.match(words.replace("(", r"\("), deployment(records, config))
    assert deployment(records[:-1], config) == ""


@pytest.mark.parametrize(
    ("greedy_return", "changes", "hint"),
    [
        (0.5, {}, True),
        (0.7, {}, False),
        (0.5, {"network": NetworkConfig(recurrence=RecurrenceConfig(clock="on"))}, False),
        (0.5, {"policy": "rec_mam"}, False),
        (0.5, {"policy": "rec_ippo"}, True),
        (0.5, {"policy": "sable"}, False),
        (0.5, {"policy": "package.module:make"}, False),
        (0.5, {"policy": "known_to_another_process"}, False),
    ],
)
def test_a_run_that_loses_much_greedily_is_told_of_the_clock(greedy_return, changes, hint):
    records = make_records(2)
    records[-1].values["greedy_episode_return"] = np.full((2, 8), greedy_return)
    assert ("recurrence.clock on" in deployment(records, Config(**changes))) == hint


@pytest.mark.parametrize(("num_seeds", "rows"), [(1, 1), (2, 3), (3, 5)])
def test_summary_has_no_statistic_that_means_nothing(num_seeds, rows):
    text = rendered(summary_table(make_records(num_seeds, absolute=False), seeds=range(num_seeds)))
    assert sum("│" in line for line in text.splitlines()) == rows
    assert "–" in text


def test_summary_of_nothing():
    assert "no records" in rendered(summary_table([], seeds=[0]))


@pytest.mark.parametrize(("num_seeds", "absolute"), [(1, False), (2, True), (3, True)])
@pytest.mark.parametrize("name", ["t", "$_$", r"$\frac{$ $^$", "_^\\{}%"])
def test_learning_curve_is_a_png_of_the_promised_size(tmp_path, num_seeds, absolute, name):
    """Whatever the names are."""
    records = make_records(num_seeds, absolute=absolute)
    plot_learning_curve(
        tmp_path / "c.png", records, title=name, seeds=range(num_seeds), reference={name: 0.9}
    )
    data = (tmp_path / "c.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1200, 750)


def test_learning_curve_needs_an_evaluation(tmp_path):
    with pytest.raises(ValueError, match="no evaluation yet"):
        plot_learning_curve(tmp_path / "c.png", make_records(1)[:1], title="t", seeds=[0])
    assert not (tmp_path / "c.png").exists()
