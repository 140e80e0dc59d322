"""`mam report`: what it finds, what it warns about, what it leaves."""

import csv
import json
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

from mam.cli import main as cli
from mam.config import FinetuneConfig
from mam.errors import UserError
from mam.statistics import estimate, iqm
from mam.study.report.checks import load
from mam.study.report.collect import find_runs, read_run
from mam.study.report.page import write_report
from mam.study.report.results import THRESHOLDS
from mam.study.report.tables import tables
from report_runs import CONFIG, write_run


def write_matrix(folder):
    """Two algorithms on two tasks; on one of them one is far ahead."""
    for index, (task, name, quality) in enumerate(
        [
            ("lbf/a_b", "mam", 0.9),
            ("lbf/a_b", "mat", 0.2),
            ("rware/b", "mam", 5.0),
            ("rware/b", "mat", 5.0),
        ]
    ):
        config = replace(CONFIG, env=task, policy=name)
        write_run(folder / task / name, config, quality, seed=min(index, 2), won=task == "lbf/a_b")
    return folder


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return write_matrix(tmp_path_factory.mktemp("runs"))


def test_runs_are_found_below_folders_once(matrix):
    assert len(find_runs([matrix, matrix / "lbf"])) == 4
    assert find_runs([matrix / "lbf" / "a_b" / "mam"]) == [matrix / "lbf" / "a_b" / "mam"]
    with pytest.raises(UserError, match="does not exist"):
        find_runs([matrix / "none"])


def test_a_run_is_read_seed_by_seed(matrix):
    seeds = read_run(matrix / "lbf" / "a_b" / "mam")
    assert [(seed.algorithm, seed.task, seed.seed) for seed in seeds] == [
        ("mam", "lbf/a_b", k) for k in range(5)
    ]
    rows = [
        json.loads(line) for line in (matrix / "lbf/a_b/mam/metrics.jsonl").read_text().splitlines()
    ]
    assert seeds[2].steps.tolist() == [32, 64, 96, 128]
    assert seeds[2].minutes.tolist() == [
        row["elapsed"] / 60 for row in rows if row["kind"] == "evaluation"
    ]
    assert seeds[2].absolute["episode_return"] == pytest.approx(
        np.mean(rows[-1]["episode_return"][2])
    )
    assert (seeds[2].run.finished, seeds[2].run.steps_per_second) == (True, 5 * 16 / 2)


def test_scores_are_normalised_per_task_over_everything_seen(matrix):
    results, _ = load([matrix])
    for task in results.tasks:
        low, high = results.bounds[task]
        cells = [results.cells[task, name] for name in ("mam", "mat")]
        everything = [
            x for cell in cells for s in cell for x in (*s.returns, s.absolute["episode_return"])
        ]
        assert (low, high) == (min(everything), max(everything))
        np.testing.assert_allclose(results.normalise(task, np.array([low, high])), [0, 1])


def test_aggregates_curves_and_profiles_fit_together(matrix):
    results, warnings = load([matrix])
    assert warnings == []
    expected = estimate(iqm, results.scores("mam"))
    assert results.aggregates["IQM"]["mam"].value == expected.value
    profile = results.profiles["mam"].value
    assert np.all(np.diff(profile) <= 0)
    assert profile[0] == np.mean(np.concatenate(results.scores("mam")) > THRESHOLDS[0])
    assert results.efficiency["mam"].at.tolist() == [32, 64, 96, 128]
    curve = results.curves["lbf/a_b", "mam"]
    assert curve.returns.value[-1] == pytest.approx(
        np.mean([s.returns[-1] for s in results.cells["lbf/a_b", "mam"]])
    )
    assert np.all(curve.returns.low <= curve.returns.value)


def test_a_seed_with_an_evaluation_that_is_no_number_is_left_out_of_sample_efficiency(tmp_path):
    folder = write_matrix(tmp_path)
    file = next(folder.rglob("a_b/mam/metrics.jsonl"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    next(row for row in rows if row["kind"] == "evaluation")["episode_return"][1][0] = None
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results, warnings = load([folder])
    assert any("no numbers, left out: mam on lbf/a_b, seed 1" in line for line in warnings)
    assert np.isfinite(results.efficiency["mam"].returns.value).all()


def test_bold_is_what_lies_clearly_above_the_others(matrix):
    results, _ = load([matrix])
    table = next(table for table in tables(results) if table.title.startswith("Absolute"))
    assert [[cell.bold for cell in row] for row in table.rows] == [
        [False, True, False],
        [False, False, False],
    ]
    gap = next(table for table in tables(results) if table.title == "Aggregates")
    assert gap.header[-1] == "optimality gap"
    mam, mat = (row[-1].bold for row in gap.rows)
    assert not mat
    assert mam == results.aggregates["optimality gap"]["mat"].above(
        results.aggregates["optimality gap"]["mam"]
    )


def warnings_of(folder):
    return "\n".join(load([folder])[1])


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        (
            {"num_seeds": 2},
            {},
            ["(2)", "below 3 there are no intervals", "ragged: not every algorithm has 5 seeds"],
        ),
        (
            {"total_timesteps": 256},
            {},
            ["unequal budgets on rware/b", "mat 256 steps", "mam 128 steps"],
        ),
        (
            {},
            {"updates": 4},
            ["unfinished runs", "mat (50 %)", "left out of everything that sums up", "rware/b"],
        ),
        (
            {},
            {"quality": float("nan")},
            ["returns that are no numbers", "mat on rware/b, seed 0", "left out of"],
        ),
        ({}, {"device": "gpu: H100"}, ["different devices", "cpu: cpu, gpu: H100"]),
        (
            {"eval": replace(CONFIG.eval, num_episodes=7)},
            {},
            ["evaluated differently on rware/b", "num_episodes 7"],
        ),
    ],
    ids=["seeds", "budget", "unfinished", "nan", "device", "evaluation"],
)
def test_doubts_are_said(changes, options, words, tmp_path):
    folder = write_matrix(tmp_path)
    shutil.rmtree(folder / "rware" / "b" / "mat")
    config = replace(CONFIG, env="rware/b", policy="mat", **changes)
    write_run(folder / "rware" / "b" / "mat", config, **({"quality": 5.0} | options))
    text = warnings_of(folder)
    for word in words:
        assert word in text


def test_duplicates_and_mixed_settings_are_said_and_counted_once(tmp_path):
    write_run(tmp_path / "one", updates=4)
    write_run(tmp_path / "two")
    write_run(tmp_path / "more", replace(CONFIG, seed=5, ppo=replace(CONFIG.ppo, lr=1.0)))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    text = warnings_of(tmp_path)
    assert f"mam on lbf/small, seed 0: {tmp_path / 'two'} instead of {tmp_path / 'one'}" in text
    assert (
        "mam on lbf/small is of several settings, taken as one (--by ppo.lr tells them apart)"
        in text
    )
    assert f"left out: {tmp_path / 'broken' / 'config.json'} is damaged" in text
    assert len(load([tmp_path])[0].cells["lbf/small", "mam"]) == 10


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"init": "runs/imitated"}, "init"),
        ({"finetune": FinetuneConfig(lr_warmup=5)}, "finetune.lr_warmup"),
        ({"learn": "bc", "data": "data/large"}, "data"),
        ({"env": "lbf/auto:agents=4", "curriculum": ("agents=2@32",)}, "curriculum"),
        ({"on_non_finite": "skip"}, "on_non_finite"),
    ],
)
def test_whatever_is_learned_otherwise_is_of_another_setting(changes, setting, tmp_path):
    likewise = {
        "data": {"learn": "bc", "data": "data/small"},
        "curriculum": {"env": "lbf/auto:agents=4", "curriculum": ("agents=3@32",)},
    }
    one = replace(CONFIG, **likewise.get(setting, {}))
    write_run(tmp_path / "one", one)
    write_run(tmp_path / "two", replace(CONFIG, **changes, seed=CONFIG.num_seeds))
    assert f"taken as one (--by {setting} tells them apart)" in warnings_of(tmp_path)
    write_run(tmp_path / "three", replace(CONFIG, **changes))
    text = warnings_of(tmp_path)
    assert "runs of other settings, left out for having equal seeds" in text
    assert "found more than once" not in text


def test_settings_may_make_algorithms(tmp_path):
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", replace(CONFIG, ppo=replace(CONFIG.ppo, lr=1.0)))
    assert (
        f"{tmp_path / 'two'} instead of {tmp_path / 'one'} (--by ppo.lr tells them apart)"
        in warnings_of(tmp_path)
    )
    results, warnings = load([tmp_path], by=["ppo.lr"])
    assert results.algorithms == [f"mam lr={CONFIG.ppo.lr}", "mam lr=1.0"]
    assert not any("lr" in line or "more than once" in line for line in warnings)
    with pytest.raises(UserError, match=r"did you mean ppo\.lr"):
        load([tmp_path], by=["ppo.lrr"])


def test_curves_go_as_far_as_any_seed(tmp_path):
    write_run(tmp_path / "whole", seed=1)
    write_run(tmp_path / "half", replace(CONFIG, seed=5), updates=4, seed=2)
    results, _ = load([tmp_path])
    seeds, curve = results.cells["lbf/small", "mam"], results.curves["lbf/small", "mam"]
    assert curve.at.tolist() == [32, 64, 96, 128]
    for point, count in ((1, 10), (2, 5)):
        values = [seed.returns[point] for seed in seeds if len(seed.returns) > point]
        assert len(values) == count
        assert curve.returns.value[point] == pytest.approx(np.mean(values))
        assert results.clock_curves["lbf/small", "mam"].returns.value[point] == pytest.approx(
            np.mean(values)
        )


def test_the_report_needs_nothing_else_and_is_the_same_every_time(matrix, tmp_path):
    results, warnings = load([matrix])
    for name in ("one", "two"):
        write_report(tmp_path / name, results, [*warnings, "a <b>bold</b> claim"])
    one, two = ((tmp_path / name / "report.html").read_bytes() for name in ("one", "two"))
    assert one == two
    page = one.decode()
    references = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')>\s]+)", page)
    assert all(reference.startswith("#") for reference in references)
    assert "<script" not in page
    assert "a &lt;b&gt;bold&lt;/b&gt; claim" in page
    assert page.count("<svg") == page.count('role="img"') == 4 + 3 + 2 * 2
    names = re.findall(r'\sid="([^"]+)"', page)
    assert len([name for name in names if not name.startswith(("s", "t"))]) > 100
    pictures = {path.name for path in (tmp_path / "one" / "figures").iterdir()}
    assert {"aggregate_iqm.png", "curve_lbf_a_b.png", "clock_lbf_a_b.png"} <= pictures
    markdown = (tmp_path / "one" / "report.md").read_text()
    assert all(f"figures/{name}" in markdown for name in pictures)
    assert re.search(r"\| lbf/a\\_b \| \*\*0\.\d+ \\\[", markdown)
    tex = (tmp_path / "one" / "tables.tex").read_text()
    assert re.search(r"lbf/a\\_b & \\textbf\{0\.\d+ \[.*\} & .* \\\\", tex)
    assert tex.count(r"\begin{tabular}") == tex.count(r"\bottomrule") == len(tables(results))


def test_csv_files_hold_every_number(matrix, tmp_path):
    results, _ = load([matrix])
    write_report(tmp_path, results, [])
    rows = {
        path.name: list(csv.DictReader(path.read_text().splitlines()))
        for path in (tmp_path / "data").iterdir()
    }
    assert len(rows["scores.csv"]) == 20
    value = next(
        r for r in rows["aggregates.csv"] if (r["statistic"], r["algorithm"]) == ("IQM", "mat")
    )
    scores = [
        [float(r["score"]) for r in rows["scores.csv"] if (r["algorithm"], r["task"]) == ("mat", t)]
        for t in results.tasks
    ]
    found = estimate(iqm, [np.array(task) for task in scores])
    np.testing.assert_allclose(
        [float(value[k]) for k in ("value", "low", "high")], [found.value, found.low, found.high]
    )
    assert len(rows["learning_curves.csv"]) == len(rows["wall_clock.csv"]) == 2 * 2 * 4
    assert len(rows["performance_profiles.csv"]) == 2 * len(THRESHOLDS)


def test_commits_and_settings_are_shown(tmp_path):
    base = replace(CONFIG, ppo=replace(CONFIG.ppo, lr=1e-3))
    write_run(tmp_path / "a", base)
    write_run(tmp_path / "b", replace(base, seed=5, ppo=replace(base.ppo, lr=2e-3)))
    (tmp_path / "b" / "versions.json").write_text(
        json.dumps({"git": f"{'0123456789ab' + 28 * 'f'}-dirty"})
    )
    results, _ = load([tmp_path])
    (table,) = (table for table in tables(results) if table.title == "Settings")
    ((task, name, commit, settings),) = ([cell.text for cell in row] for row in table.rows)
    assert (task, name, commit) == ("lbf/small", "mam", "unknown, 0123456789ab-dirty")
    assert "ppo.lr=0.001 or 0.002" in settings
    assert "seed" not in settings


@pytest.mark.parametrize("updates", [0, 4])
def test_a_report_of_unfinished_runs_only(updates, tmp_path, capsys):
    write_run(tmp_path / "run", updates=updates or 1)
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "warning: no run is finished" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").exists()


def test_mistakes_get_one_line(tmp_path, capsys, monkeypatch):
    assert cli.main(["report"]) == 2
    assert "mam report RUNS" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no runs in" in capsys.readouterr().err
    write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert 'pip install "multi-agent-mamba[report]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def doubled(rows):
    return rows[:4] + rows[2:]


def changed(index, **values):
    return lambda rows: [*rows[:index], rows[index] | values, *rows[index + 1 :]]


@pytest.mark.parametrize(
    "damage",
    [
        doubled,
        changed(2, episode_return=[[0.5]]),
        changed(2, episode_return=0.5),
        changed(2, episode_return=[["a"]] * CONFIG.num_seeds),
        changed(2, episode_return=[{}] * CONFIG.num_seeds),
        changed(2, episode_return=[[]] * CONFIG.num_seeds),
        changed(2, episode_return=[[0.5], [0.5, 0.5], [0.5], [0.5], [0.5]]),
        changed(2, step_count="16"),
        changed(2, elapsed=None),
    ],
)
def test_runs_that_cannot_be_are_left_out_and_said(damage, tmp_path):
    write_run(tmp_path / "good", replace(CONFIG, policy="mat"))
    metrics = write_run(tmp_path / "bad") / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in damage(rows)))
    results, warnings = load([tmp_path])
    assert results.algorithms == ["mat"]
    (said,) = [line for line in warnings if "left out" in line]
    assert str(tmp_path / "bad") in said
    assert "metrics.jsonl" in said


@pytest.mark.parametrize(("greedy", "factor"), [(False, 0.5), (True, 2.0), (False, 1.0)])
def test_how_a_policy_acts_is_said_and_which_way_is_better(tmp_path, greedy, factor):
    config = replace(CONFIG, eval=replace(CONFIG.eval, greedy=greedy))
    path = write_run(tmp_path / "run", config, quality=5.0) / "metrics.jsonl"
    counts, beside = ("greedy", "sampled") if greedy else ("sampled", "greedy")
    *lines, last = path.read_text().splitlines()
    row = json.loads(last)
    row[f"{beside}_episode_return"] = (factor * np.array(row["episode_return"])).tolist()
    path.write_text("\n".join([*lines, json.dumps(row)]) + "\n")
    results, warnings = load([tmp_path])
    said = [line for line in warnings if "acts otherwise" in line]
    assert len(said) == (factor != 1)
    if said:
        assert f"acts otherwise {beside}: " in said[0]
        assert said[0].endswith(f"use it {counts if factor < 1 else beside}")
    notes = {table.title: table.note for table in tables(results)}
    assert ("most likely" if greedy else "sampled") in notes["Absolute metric: mean episode return"]


def test_the_probability_of_improvement_goes_both_ways(matrix):
    results, _ = load([matrix])
    assert results.improvements["mam", "mat"].value + results.improvements["mat", "mam"].value == 1
    (table,) = (table for table in tables(results) if table.title == "Probability of improvement")
    assert [[cell.text == "–" for cell in row] for row in table.rows] == [
        [False, True, False],
        [False, False, True],
    ]
    assert all(
        len(table.align) == len(table.header) == len(row)
        for table in tables(results)
        for row in table.rows
    )
