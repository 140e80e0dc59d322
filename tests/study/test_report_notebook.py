"""The report in a notebook: frames, figures and tables of runs with made-up numbers."""

import builtins
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

import mam
from mam.errors import UserError
from mam.runs.sinks import read_records, seed_means
from report_runs import CONFIG, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "mam", CONFIG, 0.9, seed=1)
    mat = replace(CONFIG, policy="mat", seed=3, num_seeds=2, ppo=replace(CONFIG.ppo, lr=1e-3))
    write_run(folder / "mat", mat, 0.5, seed=2, updates=4, won=True)
    return folder


def test_a_frame_of_runs(folder):
    frame = mam.report.runs(folder)
    assert list(zip(frame["algorithm"], frame["seed"], strict=True)) == [
        *(("mam", seed) for seed in range(5)),
        *(("mat", seed) for seed in (3, 4)),
    ]
    assert frame["run"].unique().tolist() == [str(folder / "mam"), str(folder / "mat")]
    finished, unfinished = frame[frame["finished"]], frame[~frame["finished"]]
    absolute = read_records(folder / "mam" / "metrics.jsonl")[-1].values["episode_return"]
    np.testing.assert_array_equal(finished["absolute_return"], seed_means(absolute))
    assert unfinished["absolute_return"].isna().all()
    assert (frame["best_return"] >= frame["last_return"]).all()
    assert frame.groupby("ppo.lr").size().to_dict() == {5e-4: 5, 1e-3: 2}
    assert mam.report.runs([folder], by=["ppo.lr"])["algorithm"].iloc[-1] == "mat lr=0.001"


def test_a_frame_of_metrics(folder):
    frame = mam.report.metrics(str(folder))
    assert set(frame["kind"]) == {"train", "evaluation", "absolute"}
    evaluations = mam.report.metrics(folder, kind="evaluation")
    assert set(evaluations["kind"]) == {"evaluation"}
    mine = evaluations[(evaluations["algorithm"] == "mat") & (evaluations["seed"] == 4)]
    records = [r for r in read_records(folder / "mat" / "metrics.jsonl") if r.kind == "evaluation"]
    for name in ("episode_return", "won"):
        expected = [seed_means(record.values[name])[1] for record in records]
        np.testing.assert_array_equal(mine[name], expected)
    assert mine["step_count"].tolist() == [record.step_count for record in records]
    assert evaluations[evaluations["algorithm"] == "mam"]["won"].isna().all()


def test_the_reports_pieces(folder):
    with pytest.warns(UserWarning, match=r"^unfinished runs, in learning curves only: "):
        results = mam.report.load(folder)
    figures = mam.report.figures(results)
    assert {"aggregate_iqm", "performance_profiles", "curve_lbf_small"} <= set(figures)
    assert all(isinstance(figure, Figure) for figure in figures.values())
    assert figures["curve_lbf_small"].axes[0].get_xlabel() == "environment steps"
    assert figures["clock_lbf_small"].axes[0].get_xlabel() == "minutes of wall-clock"
    tables = mam.report.tables(results)
    shown = tables["Absolute metric: mean episode return"].loc["lbf/small", "mam"]
    scores = mam.report.numbers(results)["scores"]
    assert shown.startswith(f"{scores['absolute_return'].mean():.3f} [")


def test_a_run_that_cannot_be_read_is_left_out(folder, tmp_path):
    (write_run(tmp_path / "damaged") / "metrics.jsonl").write_text("{\n{}\n")
    write_run(tmp_path / "whole", replace(CONFIG, num_seeds=1))
    for frame in (mam.report.runs, mam.report.metrics):
        with pytest.warns(UserWarning, match="^left out: .*damaged is damaged"):
            found = frame(tmp_path)
        assert set(found["run"]) == {str(tmp_path / "whole")}
    with pytest.raises(UserError, match="nowhere does not exist"):
        mam.report.runs(tmp_path / "nowhere")


def test_without_pandas_one_line_says_what_installs_it(folder, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        UserError, match=r'needs pandas: pip install "multi-agent-mamba\[notebook\]"'
    ):
        mam.report.runs(folder)
