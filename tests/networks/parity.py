"""Compares a block with another implementation: parameters, output, gradients, decoding."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mam.config import NetworkConfig


@dataclass(frozen=True, eq=False)
class Golden:
    """A file of golden arrays, and how the module they came from becomes one of ours."""

    file: str
    make: Callable
    cases: dict[str, NetworkConfig]
    layout: list[
        tuple[str, Callable, Callable]
    ]  # their parameter, ours, and how theirs becomes ours: f(array, sizes)

    @functools.cache  # noqa: B019, they live as long as the tests
    def arrays(self, case):
        with np.load(Path(__file__).parents[1] / "golden" / self.file) as arrays:
            return {
                key.removeprefix(f"{case}/"): arrays[key]
                for key in arrays.files
                if key.startswith(f"{case}/")
            }

    def in_our_layout(self, case, prefix):
        """Their name, where it is in our block, and their array in our layout."""
        arrays, sizes = self.arrays(case), self.cases[case]
        return [
            (name, where, convert(arrays[prefix + name], sizes))
            for name, where, convert in self.layout
        ]

    @functools.cache  # noqa: B019
    def block(self, case):
        """Our block with their parameters; every one of ours is set, every one of theirs used."""
        block = jax.eval_shape(lambda key: self.make(self.cases[case], key=key), jax.random.key(0))
        parameters = self.in_our_layout(case, "param/")
        assert len(jax.tree.leaves(block)) == len(parameters)
        assert sum(leaf.size for leaf in jax.tree.leaves(block)) == sum(
            array.size for name, array in self.arrays(case).items() if name.startswith("param/")
        )
        for name, where, value in parameters:
            assert where(block).shape == value.shape, name
            block = eqx.tree_at(where, block, jnp.asarray(value))
        return block

    def check_parallel_form_and_gradients(self, case):
        arrays, block = self.arrays(case), self.block(case)
        output, block_gradient, x_gradient = output_and_gradients(
            block, arrays["input"], arrays["cotangent"]
        )
        assert_close(output, arrays["output"], "output")
        assert_close(x_gradient, arrays["grad/input"], "gradient of the input")
        for name, where, expected in self.in_our_layout(case, "grad/"):
            assert_close(where(block_gradient), expected, f"gradient of {name}")

    def check_recurrent_form(self, case):
        """Returns both last states; their conv_state is [batch, channels, d_conv], oldest first."""
        arrays = self.arrays(case)
        state, output = decode(self.block(case), arrays["input"])
        assert_close(output, arrays["decode/output"], "output")
        # Theirs keeps the last d_conv inputs, ours d_conv − 1: its first is never read again.
        theirs = np.moveaxis(arrays["decode/conv_state"][..., 1:], -1, 0)
        ours = [np.concatenate(inputs, axis=-1) for inputs in zip(*state.conv_state, strict=True)]
        assert_close(np.stack(ours), theirs, "state of the convolution")
        return state.ssm_state, arrays["decode/ssm_state"]


@jax.jit
def output_and_gradients(block, x, cotangent):
    def run(block, x):
        return block.out_proj(block.unroll(None, block.project(x), None, None)[1])

    output, pull_back = jax.vjp(run, block, x)
    return output, *pull_back(cotangent)


@jax.jit
def decode(block, x):
    """One agent after another: the last state, and all outputs."""

    def step(state, x):
        return block.step(state, block.project(x), None)

    state, y = lax.scan(step, block.init_state(x.shape[:1], x.dtype), jnp.swapaxes(x, 0, 1))
    return state, block.out_proj(jnp.swapaxes(y, 0, 1))


def assert_close(actual, expected, what):
    """Largest error relative to the largest value; a sequence may begin with zeros."""
    error = np.max(np.abs(np.asarray(actual) - expected)) / max(np.max(np.abs(expected)), 1e-3)
    assert error <= 1e-5, f"{what}: {error:.2e}"
