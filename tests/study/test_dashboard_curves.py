"""What is drawn: means, intervals, few points."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mam.study.dashboard.curves import (
    SPEED,
    Curves,
    Series,
    columns_that_count,
    curve_of,
    groups,
    labels_of,
    metrics_of,
    series_of,
    thin,
)
from mam.study.dashboard.runs import LiveRun
from mam.study.report.checks import load
from mam.study.report.figures import styles_of
from report_runs import CONFIG, write_run

RETURN = "evaluation/episode_return"


def live(path, name=None):
    run = LiveRun(path, name or path.name)
    assert run.poll()
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of two algorithms on two tasks, some unfinished, some over different steps."""
    root = tmp_path_factory.mktemp("runs")
    longer = replace(CONFIG, total_timesteps=16 * 16, seed=20)
    for task in ("lbf/small", "lbf/large"):
        for policy in ("mam", "mat"):
            config = replace(CONFIG, env=task, policy=policy)
            write_run(root / task / policy / "a", config, seed=1)
            write_run(
                root / task / policy / "b",
                replace(longer, env=task, policy=policy),
                seed=2,
                updates=12,
            )
    return root


def test_curves_are_those_of_the_report(folder):
    expected = load([folder])[0].curves
    runs = [live(path.parent, str(path.parent)) for path in sorted(folder.rglob("config.json"))]
    found = groups(runs, labels_of(runs))
    assert {(task, label) for task, labels in found.items() for label in labels} == set(expected)
    for (task, algorithm), theirs in expected.items():
        ours = curve_of([series_of(run, RETURN, "steps") for run in found[task][algorithm]])
        np.testing.assert_array_equal(ours.x, theirs.at)
        np.testing.assert_allclose(ours.mean, theirs.returns.value, rtol=1e-12)
        np.testing.assert_allclose(ours.low, theirs.returns.low, rtol=1e-12)
        np.testing.assert_allclose(ours.high, theirs.returns.high, rtol=1e-12)
        assert ours.num_seeds == 2 * CONFIG.num_seeds


def test_runs_may_stand_by_themselves(folder):
    runs = [live(path.parent, str(path.parent)) for path in folder.rglob("config.json")]
    found = groups(runs, {run.name: run.name for run in runs})
    assert sorted(found) == ["lbf/large", "lbf/small"]
    assert all(
        len(labels) == 4 and all(len(some) == 1 for some in labels.values())
        for labels in found.values()
    )
    assert metrics_of(runs) == [RETURN, "train/episode_return", f"train/{SPEED}"]


def test_two_seeds_have_a_range_and_one_has_nothing():
    x, values = np.arange(4.0), np.array([[0.0, 2], [1, 3], [2, 8], [5, 5]])
    curve = curve_of([Series(x, values)])
    assert (curve.mean.tolist(), curve.low.tolist(), curve.high.tolist()) == (
        [1, 2, 5, 5],
        [0, 1, 2, 5],
        [2, 3, 8, 5],
    )
    curve = curve_of([Series(x, values[:, :1])])
    assert np.isnan(curve.low).all()
    assert curve_of([]) is None
    assert curve_of([Series(x, np.full((4, 2), np.nan))]) is None


def test_seeds_without_a_number_do_not_count():
    x, values = (
        np.arange(3.0),
        np.array([[1.0, 3.0, 5.0], [np.nan, 4.0, np.nan], [3.0, 5.0, np.nan]]),
    )
    curve = curve_of([Series(x, values)])
    np.testing.assert_allclose(
        curve.mean, [3.0, (2 + 4) / 2, 4.0]
    )  # on the line; the third has not got there


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(4, 60))
def test_thinning_keeps_ends_and_extremes(values, points):
    values = np.array(values)
    chosen = thin(values, points)
    assert len(chosen) <= points
    assert (np.diff(chosen) > 0).all()
    assert (chosen[0], chosen[-1]) == (0, len(values) - 1)
    assert (values[chosen].min(), values[chosen].max()) == (values.min(), values.max())


def test_a_long_curve_has_few_points_and_more_of_them_where_one_looks():
    x = np.arange(100_000.0)
    values = np.sin(x / 5000)[:, None] + [0.0, 0.5, 1.0]
    values[43_210] = 50
    curve = curve_of([Series(x, values)])
    assert len(curve.x) <= 1000
    assert curve.mean.max() == 50
    assert (curve.low <= curve.mean).all()
    assert (curve.mean <= curve.high).all()
    close = curve_of([Series(x, values)], window=(40_000.0, 40_300.0))
    assert len(close.x) <= 1000
    assert np.isin(np.arange(40_000, 40_301), close.x).all()
    assert (close.x[0], close.x[-1]) == (0, 99_999)
    other = curve_of([Series(x, values), Series(x[:50_000] + 0.5, values[:50_000])])
    assert len(other.x) <= 1000
    assert other.mean.max() > 25


def test_answers_are_kept_until_something_changes(folder):
    curves, run = Curves(), live(next(folder.rglob("config.json")).parent)
    made_of, curve = curves.of([run], RETURN, "time")
    assert curves.of([run], RETURN, "time")[1] is curve
    run.version += 1
    assert curves.of([run], RETURN, "time")[0] != made_of
    assert curve.x[0] == series_of(run, RETURN, "time").x[0]


def test_a_seed_that_was_run_again_counts_once(tmp_path):
    write_run(tmp_path / "a", CONFIG)
    write_run(tmp_path / "b", CONFIG)
    write_run(tmp_path / "c", replace(CONFIG, seed=CONFIG.seed + 1))
    runs = [live(tmp_path / name, name) for name in "abc"]
    assert columns_that_count(runs) == {"b": [0], "c": [*range(CONFIG.num_seeds)]}
    _, curve = Curves().of(runs, RETURN, "steps")
    assert curve.num_seeds == CONFIG.num_seeds + 1
    _, alone = Curves().of(runs[:1], RETURN, "steps")
    assert alone.num_seeds == CONFIG.num_seeds


def test_speed_is_of_all_seeds(folder):
    run = live(next(folder.rglob("config.json")).parent)
    speeds = series_of(run, f"train/{SPEED}", "steps").values
    assert (speeds == CONFIG.num_seeds * CONFIG.steps_per_update / 2).all()
    assert run.median_speed() == run.speed == speeds[0]


def test_runs_of_other_settings_are_other_lines_whatever_is_selected(tmp_path):
    slow = replace(CONFIG.ppo, lr=1e-4)
    for name, config in (
        ("a", CONFIG),
        ("b", replace(CONFIG, seed=7, total_timesteps=512)),
        ("c", replace(CONFIG, ppo=slow)),
        ("d", replace(CONFIG, ppo=slow, env="lbf/large")),
    ):
        write_run(tmp_path / name, config)
    runs = [live(tmp_path / name) for name in "abcd"]
    labels = labels_of(runs)
    assert labels == {"a": "mam lr=0.0005", "b": "mam lr=0.0005", "c": "mam lr=0.0001", "d": "mam"}
    assert {
        task: {label: len(some) for label, some in found.items()}
        for task, found in groups(runs[1:], labels).items()
    } == {
        "lbf/large": {"mam": 1},
        "lbf/small": {"mam lr=0.0001": 1, "mam lr=0.0005": 1},
    }


def test_a_policy_has_one_colour_here_and_in_the_report():
    few, many = (
        styles_of(["mat"]),
        styles_of(["ippo", "mam", "mat", "mam lr=0.1", "mam lr=0.2", "mam lr=0.3"]),
    )
    assert few["mat"] == many["mat"]
    assert len(set(many.values())) == len(many)
    looks = styles_of([str(index) for index in range(28)])
    assert len({look[:2] for look in looks.values()}) == 28
