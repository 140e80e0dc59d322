"""Agents spread over devices and processes: the numbers of one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mam.config import NetworkConfig
from mam.errors import UserError
from mam.networks.mixers import spread
from mam.networks.mixers.registry import MIXERS

PROGRAM = Path(__file__).with_name("spread_program.py")


def start(*args, devices=1):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, PROGRAM, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )


def check(process, counts):
    """Actions, log-probabilities, entropies, values and gradients are those of one device."""
    said, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    found = json.loads(said.splitlines()[-1])  # what connects processes speaks first
    assert found["passes"] > 1  # agents read what others do
    assert found["apart"] > 1e-2  # and what those of other shares see
    assert all(found[count] <= 1e-5 for count in counts), found


@pytest.mark.parametrize(("policy", "counts"), [("mam", "248"), ("mam2", "4")])
def test_devices_together_are_one(policy, counts):
    check(start(policy, *counts, devices=8), counts)


def test_two_processes_together_are_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [start("mam", "2", address, str(rank)) for rank in range(2)]
    for process in both:
        assert process.stdout.readline() == "compiled\n", process.communicate()
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        check(process, "2")


def test_shares_are_equal_and_no_shorter_than_what_a_convolution_reads(monkeypatch):
    sizes = NetworkConfig(d_model=8, d_state=2)
    mixer = MIXERS["mamba"].build("encoder", sizes, key=jax.random.key(0))
    monkeypatch.setattr(spread, "num_shares", lambda: 4)
    for num_agents in (10, 8):
        with pytest.raises(UserError, match=f"at least 3 each: there are {num_agents}"):
            mixer(jnp.zeros((2, num_agents, 8)))
