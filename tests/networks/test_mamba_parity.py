"""The Mamba block against an independent implementation: MambaMixer of Hugging Face transformers.

`tests/golden/mamba.npz` holds its parameters, output, gradients and step-by-step decoding for three sizes.
"""

import functools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mam.config import NetworkConfig
from mam.networks.mixers.mamba import SelectiveSSM

GOLDEN = Path(__file__).parents[1] / "golden" / "mamba.npz"
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # less time compiling
CASES = {
    "A": NetworkConfig(d_model=16, d_state=4, d_conv=4, expand=2, dt_rank=1),
    "B": NetworkConfig(d_model=24, d_state=8, d_conv=3, expand=2, dt_rank=5),
    "C": NetworkConfig(d_model=8, d_state=16, d_conv=4, expand=1, dt_rank=2),
}
# Our parameters, in their names, and how their layout becomes ours.
LAYOUT = {
    "in_proj.weight": (lambda ssm: ssm.in_proj.weight, np.transpose),
    "conv1d.weight": (lambda ssm: ssm.conv.weight, lambda w: w[:, 0].T),
    "conv1d.bias": (lambda ssm: ssm.conv.bias, np.asarray),
    "x_proj.weight": (lambda ssm: ssm.x_proj.weight, np.transpose),
    "dt_proj.weight": (lambda ssm: ssm.step_size.proj.weight, np.transpose),
    "dt_proj.bias": (lambda ssm: ssm.step_size.proj.bias, np.asarray),
    "A_log": (lambda ssm: ssm.A_log, np.asarray),
    "D": (lambda ssm: ssm.skip, np.asarray),
    "out_proj.weight": (lambda ssm: ssm.out_proj.weight, np.transpose),
}


@functools.cache
def golden(case):
    with np.load(GOLDEN) as arrays:
        return {key.removeprefix(f"{case}/"): arrays[key] for key in arrays.files if key.startswith(f"{case}/")}


def in_our_layout(arrays, prefix):
    return {name: convert(arrays[prefix + name]) for name, (_, convert) in LAYOUT.items()}


@functools.cache
def make_ssm(case):
    """Our block with their parameters; every parameter of ours is set."""
    empty = jax.eval_shape(lambda key: SelectiveSSM(CASES[case], key=key), jax.random.key(0))
    values = in_our_layout(golden(case), "param/")
    assert len(jax.tree.leaves(empty)) == len(values)
    for name, (where, _) in LAYOUT.items():
        assert where(empty).shape == values[name].shape, name
        empty = eqx.tree_at(where, empty, jnp.asarray(values[name]))
    return empty


def assert_close(actual, expected, what):
    error = np.max(np.abs(np.asarray(actual) - expected)) / np.max(np.abs(expected))
    assert error <= 1e-5, f"{what}: {error:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_parallel_form_and_its_gradients(case):
    arrays = golden(case)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def output_and_gradients(ssm, x, cotangent):
        output, pull_back = jax.vjp(lambda ssm, x: ssm(x), ssm, x)
        return output, *pull_back(cotangent)

    output, ssm_gradient, x_gradient = output_and_gradients(make_ssm(case), arrays["input"], arrays["cotangent"])
    assert_close(output, arrays["output"], "output")
    assert_close(x_gradient, arrays["grad/input"], "gradient of the input")
    for name, expected in in_our_layout(arrays, "grad/").items():
        where, _ = LAYOUT[name]
        assert_close(where(ssm_gradient), expected, f"gradient of {name}")


@pytest.mark.parametrize("case", CASES)
def test_recurrent_form_and_its_states(case):
    arrays = golden(case)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def decode(ssm, x):
        batch, num_agents, _ = x.shape
        xs = jnp.swapaxes(x, 0, 1)
        state, y = lax.scan(lambda state, x: ssm.step(state, x), ssm.init_state(num_agents, (batch,)), xs)
        return state, jnp.swapaxes(y, 0, 1)

    state, output = decode(make_ssm(case), arrays["input"])
    assert_close(output, arrays["decode/output"], "output")
    assert_close(state.ssm_state, arrays["decode/ssm_state"], "state of the recurrence")
    # Theirs keeps the last d_conv inputs, ours the last d_conv − 1: its first row is never read again.
    assert_close(state.conv_state, np.swapaxes(arrays["decode/conv_state"][..., 1:], 1, 2), "state of the convolution")
