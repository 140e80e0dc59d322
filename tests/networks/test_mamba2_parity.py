"""The Mamba-2 block against an independent implementation: Hugging Face's Mamba2Mixer.

`tests/golden/mamba2.npz` holds its parameters, output, gradients and decoding for three sizes.
"""

import numpy as np
import pytest
from parity import Golden, assert_close

from mam.config import NetworkConfig
from mam.networks.mixers.mamba2 import DualSSM

MAMBA2 = Golden(
    file="mamba2.npz",
    make=DualSSM,
    cases={
        "A": NetworkConfig(d_model=16, expand=2, d_state=4, head_dim=16, d_conv=4),
        "B": NetworkConfig(d_model=24, expand=2, d_state=8, head_dim=16, d_conv=3),
        "C": NetworkConfig(d_model=8, expand=1, d_state=16, head_dim=2, d_conv=4),
    },
    layout=[
        ("in_proj.weight", lambda ssm: ssm.gate_proj.weight, lambda w, sizes: w[: sizes.d_inner].T),
        (
            "in_proj.weight",
            lambda ssm: ssm.in_proj.weight,
            lambda w, sizes: w[sizes.d_inner : 2 * sizes.d_inner].T,
        ),
        (
            "in_proj.weight",
            lambda ssm: ssm.state_proj.weight,
            lambda w, sizes: w[2 * sizes.d_inner : -sizes.num_ssm_heads].T,
        ),
        (
            "in_proj.weight",
            lambda ssm: ssm.dt_proj.weight,
            lambda w, sizes: w[-sizes.num_ssm_heads :].T,
        ),
        ("conv1d.weight", lambda ssm: ssm.conv.weight, lambda w, sizes: w[: sizes.d_inner, 0].T),
        (
            "conv1d.weight",
            lambda ssm: ssm.state_conv.weight,
            lambda w, sizes: w[sizes.d_inner :, 0].T,
        ),
        ("conv1d.bias", lambda ssm: ssm.conv.bias, lambda b, sizes: b[: sizes.d_inner]),
        ("conv1d.bias", lambda ssm: ssm.state_conv.bias, lambda b, sizes: b[sizes.d_inner :]),
        ("dt_bias", lambda ssm: ssm.dt_proj.bias, lambda b, sizes: b),
        ("A_log", lambda ssm: ssm.A_log, lambda A, sizes: A),
        ("D", lambda ssm: ssm.skip, lambda D, sizes: D),
        ("norm.weight", lambda ssm: ssm.norm.scale, lambda scale, sizes: scale),
        ("out_proj.weight", lambda ssm: ssm.out_proj.weight, lambda w, sizes: w.T),
    ],
)


@pytest.mark.parametrize("case", MAMBA2.cases)
def test_parallel_form_and_its_gradients(case):
    MAMBA2.check_parallel_form_and_gradients(case)


@pytest.mark.parametrize("case", MAMBA2.cases)
def test_recurrent_form_and_its_states(case):
    ours, theirs = MAMBA2.check_recurrent_form(case)
    sizes = MAMBA2.cases[case]
    by_head = np.reshape(ours, (len(ours), sizes.d_state, sizes.num_ssm_heads, sizes.head_dim))
    assert_close(by_head.transpose(0, 2, 3, 1), theirs, "state of the recurrence")
