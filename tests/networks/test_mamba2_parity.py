"""The Mamba-2 block against an independent implementation: Mamba2Mixer of Hugging Face transformers.

`tests/golden/mamba2.npz` holds its parameters, output, gradients and step-by-step decoding for three sizes.
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
    layout={
        "in_proj.weight": (lambda ssm: ssm.in_proj.weight, np.transpose),
        "conv1d.weight": (lambda ssm: ssm.conv.weight, lambda w: w[:, 0].T),
        "conv1d.bias": (lambda ssm: ssm.conv.bias, np.asarray),
        "dt_bias": (lambda ssm: ssm.dt_bias, np.asarray),
        "A_log": (lambda ssm: ssm.A_log, np.asarray),
        "D": (lambda ssm: ssm.skip, np.asarray),
        "norm.weight": (lambda ssm: ssm.norm.scale, np.asarray),
        "out_proj.weight": (lambda ssm: ssm.out_proj.weight, np.transpose),
    },
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
