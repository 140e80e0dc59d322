"""The Mamba block against an independent implementation: MambaMixer of Hugging Face transformers.

`tests/golden/mamba.npz` holds its parameters, output, gradients and decoding for three sizes.
"""

import numpy as np
import pytest
from parity import Golden, assert_close

from mam.config import NetworkConfig
from mam.networks.mixers.mamba import SelectiveSSM

MAMBA = Golden(
    file="mamba.npz",
    make=SelectiveSSM,
    cases={
        "A": NetworkConfig(d_model=16, d_state=4, d_conv=4, expand=2, dt_rank=1),
        "B": NetworkConfig(d_model=24, d_state=8, d_conv=3, expand=2, dt_rank=5),
        "C": NetworkConfig(d_model=8, d_state=16, d_conv=4, expand=1, dt_rank=2),
    },
    layout=[
        ("in_proj.weight", lambda ssm: ssm.in_proj.weight, lambda w, sizes: w[: sizes.d_inner].T),
        ("in_proj.weight", lambda ssm: ssm.gate_proj.weight, lambda w, sizes: w[sizes.d_inner :].T),
        ("conv1d.weight", lambda ssm: ssm.conv.weight, lambda w, sizes: w[:, 0].T),
        ("conv1d.bias", lambda ssm: ssm.conv.bias, lambda b, sizes: b),
        ("x_proj.weight", lambda ssm: ssm.x_proj.weight, lambda w, sizes: w.T),
        ("dt_proj.weight", lambda ssm: ssm.dt_proj.weight, lambda w, sizes: w.T),
        ("dt_proj.bias", lambda ssm: ssm.dt_proj.bias, lambda b, sizes: b),
        ("A_log", lambda ssm: ssm.A_log, lambda A, sizes: A),
        ("D", lambda ssm: ssm.skip, lambda D, sizes: D),
        ("out_proj.weight", lambda ssm: ssm.out_proj.weight, lambda w, sizes: w.T),
    ],
)


@pytest.mark.parametrize("case", MAMBA.cases)
def test_parallel_form_and_its_gradients(case):
    MAMBA.check_parallel_form_and_gradients(case)


@pytest.mark.parametrize("case", MAMBA.cases)
def test_recurrent_form_and_its_states(case):
    ours, theirs = MAMBA.check_recurrent_form(case)
    assert_close(ours, np.swapaxes(theirs, 1, 2), "state of the recurrence")
