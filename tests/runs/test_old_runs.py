"""A run folder of the library's first version (ippo on probe/identity) still plays and goes on."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

import mam
from mam.cli import main as cli
from mam.runs.folder import RunFolder
from mam.study.report.collect import read_run

ARCHIVE = Path(__file__).parents[1] / "data" / "run_of_first_version.tar.gz"


@pytest.fixture
def run(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_it_plays_and_goes_on(run, capsys):
    assert cli.main(["evaluate", str(run), "--episodes", "4"]) == 0
    assert "ippo on probe/identity: 4 episodes" in capsys.readouterr().out
    before = (run / "metrics.jsonl").read_text().splitlines()
    assert cli.main(["train", "--resume", str(run), "--total-timesteps", "160"]) == 0
    after = (run / "metrics.jsonl").read_text().splitlines()
    assert (
        after[: len(before) - 1] == before[:-1]
    )  # all but the absolute metric, which the end of a run adds
    assert RunFolder(run).records()[-1].step_count == 160
    assert {path.name for path in (run / "checkpoint" / "2").iterdir()} == {
        "arrays.safetensors",
        "manifest.json",
    }


def test_its_policy_loads_by_way_of_its_environment(run):
    policy = mam.load(run, greedy=True)
    actions = policy.act(np.zeros((3, policy.spec.num_agents, policy.spec.obs_dim)))
    assert actions.shape == (3, policy.spec.num_agents)


def test_it_stands_in_reports(run):
    [seed] = read_run(run)
    assert seed.algorithm == "ippo"
    assert seed.steps.tolist() == [64, 128]
