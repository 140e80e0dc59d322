"""Spread over devices and processes, a run has the numbers that it has on one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mam.cli import main as cli
from mam.config import Config, PPOConfig
from mam.errors import UserError
from mam.learning.train import make_train
from mam.runs.sinks import read_records

PROGRAM = Path(__file__).parents[1] / "device_program.py"


def environment(devices=1):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
    }


@pytest.mark.parametrize(("policy", "counts"), [("ippo", "248"), ("rec_ippo", "4")])
def test_losses_parameters_and_evaluations_equal_those_of_one_device(policy, counts):
    """Gradients too: the parameters are what they made of them."""
    done = subprocess.run(
        [sys.executable, PROGRAM, policy, *counts],
        capture_output=True,
        text=True,
        env=environment(8),
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {*counts, "resumed"}
    assert all(largest <= 1e-5 for _, largest in found.values()), found


def arguments(out, steps, *more):
    line = f"""train --env probe/identity --policy ippo --total-timesteps {steps} --out {out}
        --network.d-model 8 --ppo.num-envs 8 --ppo.rollout-length 8 --ppo.num-epochs 1 \
--ppo.num-minibatches 2
        --eval.num-evaluations 2 --eval.num-episodes 6 --eval.num-absolute-episodes 5"""
    return [*line.split(), *more]


def test_two_processes_are_one_run_and_one_goes_on_with_it(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ("--hosts.coordinator", address, "--hosts.num-processes", "2", "--hosts.process-id")
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "mam", *arguments(tmp_path / "two", 128, *flags, str(rank))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "2 × cpu" in said[0]
    resume = ["train", "--resume", str(tmp_path / "two"), "--total-timesteps", "256"]
    for args in (resume, arguments(tmp_path / "one", 256)):
        assert cli.main(args) == 0
    files = (tmp_path / name / "metrics.jsonl" for name in ("two", "one"))
    records, expected = (
        {(r.kind, r.update): r.values for r in read_records(file)} for file in files
    )
    shared = records.keys() & expected.keys()  # runs of other lengths are evaluated at other times
    assert {("train", 1), ("train", 4), ("evaluation", 4), ("absolute", 4)} <= shared
    for row in shared:
        for name, values in expected[row].items():
            np.testing.assert_allclose(
                records[row][name], values, atol=1e-5, equal_nan=True, err_msg=f"{row} {name}"
            )


def test_environments_must_be_dealt_evenly(monkeypatch):
    monkeypatch.setattr("jax.device_count", lambda: 3)
    config = Config(env="probe/identity", ppo=PPOConfig(num_envs=8))
    with pytest.raises(UserError, match="num_envs must be a multiple of the 3 devices, got 8"):
        make_train(config)


def test_no_more_devices_than_there_are():
    with pytest.raises(UserError, match="num_devices = 5, but there are 1"):
        make_train(Config(env="probe/identity", num_devices=5))
    with pytest.raises(UserError, match="lives in processes, and its policy on one device"):
        make_train(Config(env="pettingzoo/mpe2:simple_spread_v3", num_devices=2))
