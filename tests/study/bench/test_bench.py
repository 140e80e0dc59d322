"""`mam bench`, as it is typed."""

import csv
import json
from dataclasses import fields, replace

import jax
import pytest

from mam.cli import main as cli
from mam.config import NetworkConfig
from mam.study.bench.cases import cases
from mam.study.bench.measure import Cell, Skip
from mam.study.bench.results import Row

SIZES = NetworkConfig(d_model=8, d_state=2)
CASES = cases()
SMALL = ("--batch", "2", "--rounds", "2", "--network.d-model", "8", "--network.d-state", "2")
NAMES = [(what, name, None) for what, case in CASES.items() for name in case.candidates]
REMEMBERING = [
    ("act", "mat"),
    ("act", "mat-uncached"),
    ("update", "mat"),
    ("train", "mat"),
    ("train", "mat/update"),
]
NAMES += [(what, name, "gru") for what, name in REMEMBERING]


def read_rows(folder):
    return list(csv.DictReader((folder / "results.csv").read_text().splitlines()))


@pytest.mark.parametrize(("what", "name", "memory"), NAMES)
def test_every_candidate_is_a_program(what, name, memory, request):
    if what == "serve":
        request.getfixturevalue("symbolic_sizes")
    try:
        candidate = CASES[what].candidates[name](Cell(2, 2, replace(SIZES, memory=memory)))
    except Skip as reason:
        pytest.skip(str(reason))
    if candidate.ready:
        action, *_ = candidate.function(*candidate.args)
        assert action.shape == (2, 2)
        return
    steps = () if candidate.steps is None else (candidate.steps,)
    outputs = jax.eval_shape(candidate.function, *candidate.args, *steps)
    assert candidate.baseline in CASES[what].candidates
    if what in ("scan", "block"):
        y, gradients = outputs
        shapes = jax.tree.map(lambda x: x.shape, (y, *gradients))
        assert shapes == jax.tree.map(lambda x: x.shape, candidate.args)


@pytest.mark.parametrize(
    ("what", "candidates"),
    [
        ("scan", ("sequential", "associative", "pairwise")),
        ("block", ("attention/encoder", "attention/cross")),
        ("image", ("cnn/5x5", "cnn-matched/5x5")),
        ("act", ("mat", "mat-uncached")),
        ("decode", ("mam", "mat")),
        ("update", ("mat",)),
        ("train", ("mat/acting",)),
        ("serve", ("ippo/jit", "ippo/onnx")),
    ],
)
def test_every_bench_leaves_its_results(what, candidates, tmp_path, capsys, request):
    if what == "serve":
        request.getfixturevalue("symbolic_sizes")
    sizes = ("2", "4") if what == "scan" else ("2",)
    args = ("--num-agents", *sizes, "--candidates", *candidates, "--out", str(tmp_path / "out"))
    assert cli.main(["bench", what, *SMALL, *args]) == 0
    out = capsys.readouterr().out
    assert f"{what} · N = 2 · batch 2" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.csv",
        "plot.png",
        "options.json",
    }
    rows = read_rows(tmp_path / "out")
    assert list(rows[0]) == [field.name for field in fields(Row)]
    assert {row["candidate"] for row in rows} == set(candidates)
    for row in rows:
        if row["candidate"] == "pairwise" and row["num_agents"] == "4":
            assert row["note"].startswith("skipped")
            continue
        assert row["what"] == what
        assert 0 < float(row["min_ms"]) <= float(row["median_ms"])
        if what == "serve":
            assert float(row["p99_ms"]) >= float(row["median_ms"])
        else:
            assert float(row["temp_mb"]) >= 0
        assert float(row["compile_s"]) > 0
        assert (row["rounds"], row["extrapolated"], row["jax"]) == ("2", "False", jax.__version__)
        assert bool(row["ratio"]) == (row["baseline"] in candidates)
        assert bool(row["parameters"]) == (what != "scan")
        assert bool(row["per_agent_us"]) == (what in ("act", "decode"))
        assert bool(row["env_steps_per_s"]) == (what == "train")
    options = json.loads((tmp_path / "out" / "options.json").read_text())
    assert (options["what"], options["network"]["d_model"]) == (what, 8)


def test_tokens_decide_the_batch(tmp_path, capsys):
    args = (
        "--num-agents",
        "8",
        "2",
        "--tokens",
        "20",
        "--candidates",
        "ssd",
        "--rounds",
        "1",
        "--out",
        str(tmp_path),
    )
    assert cli.main(["bench", "scan", "--network.d-model", "8", *args]) == 0
    out = capsys.readouterr().out
    assert out.index("N = 2 · batch 10") < out.index("N = 8 · batch 2")
    assert "batch × N ≈ 20" in out


def test_an_interrupted_bench_keeps_what_it_has(tmp_path, capsys, monkeypatch):
    def interrupted(cell):
        if cell.num_agents > 2:
            raise KeyboardInterrupt
        return build(cell)

    build = CASES["scan"].candidates["ssd"]
    monkeypatch.setattr("mam.study.bench.cases.cases", lambda: CASES)
    monkeypatch.setitem(CASES["scan"].candidates, "ssd", interrupted)
    args = ("--num-agents", "2", "4", "--candidates", "ssd", "--out", str(tmp_path))
    assert cli.main(["bench", "scan", *SMALL, *args]) == 0
    assert "interrupted" in capsys.readouterr().out
    assert len(read_rows(tmp_path)) == 1
    assert (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["bench needs what to time", "WHAT"]),
        (["skan"], ["unknown bench 'skan'", "did you mean scan"]),
        (
            ["act", "--candidates", "mat", "mma"],
            ["unknown candidate 'mma'", "act has mam,", "mat-uncached"],
        ),
        (["act", "--num-agents", "4", "x"], ["--num-agents takes a whole number, got 'x'"]),
        (["act", "--num-agents=x"], ["--num-agents takes a whole number, got 'x'"]),
        (["act", "--num-agents", "4", "0"], ["--num-agents must be positive, got 0"]),
        (["act", "--num-agents", "--batch", "2"], ["--num-agents needs a value"]),
        (["act", "--batch", "2", "--tokens", "8"], ["drop one of --batch and --tokens"]),
        (["act", "--max-seconds", "-1"], ["--max-seconds must be positive"]),
        (["act", "--network.d-model", "0"], ["network.d_model must be positive"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_line_and_exit_code_2(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *args]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    for word in words:
        assert word in err
    assert not list(tmp_path.iterdir())
