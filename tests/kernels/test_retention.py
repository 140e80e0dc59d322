"""Retention against a NumPy loop over tokens: values, gradients, chunks, episodes, steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.kernels.retention import retention, retention_step

B, H, F = 2, 2, 3
DECAY = (0.9, 0.5)
NAMES = ("query", "key", "value", "state")
# Steps, agents, and the size of chunks: within a step, of single tokens or steps, of whole ones,
# across them, longer than all there is.
SIZES = [(1, 9, 4), (7, 1, 4), (6, 3, 1), (6, 3, 6), (5, 4, 6), (5, 4, 64)]
close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def reference(query, key, value, state, reset, *, causal):
    """The recurrence as it is written, one token after another; accepts complex numbers."""
    S, y = state, np.zeros(query.shape, np.result_type(query, key, value, state))
    decay = np.array(DECAY)[:, None, None]
    for t, first in enumerate(reset):
        S = np.where(first[:, None, None, None], 0.0, S * decay)
        agents = range(query.shape[2])
        for i in agents:
            S = S + key[t, :, i, :, :, None] * value[t, :, i, :, None, :]
            if causal:
                y[t, :, i] = np.einsum("bhf,bhfg->bhg", query[t, :, i], S)
        if not causal:
            y[t] = np.einsum("bnhf,bhfg->bnhg", query[t], S)
    return S, y


def make_arguments(steps, agents, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(3, steps, B, agents, H, F))
    return [*rows, rng.normal(size=(B, H, F, F))], rng.random((steps, B)) < 0.3


@functools.partial(jax.jit, static_argnames=("causal", "chunk"))
def value_and_gradients(arguments, reset, cotangents, causal, chunk):
    def run(*arguments):
        return retention(*arguments, reset, decay=DECAY, causal=causal, chunk=chunk)

    found, pull_back = jax.vjp(run, *arguments)
    return found, pull_back(cotangents)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("steps", "agents", "chunk"), SIZES)
def test_it_is_the_recurrence_in_chunks_of_any_size(steps, agents, chunk, causal):
    arguments, reset = make_arguments(steps, agents)
    cotangents = tuple(make_arguments(steps, agents, seed=1)[0][k] for k in (3, 0))
    found, gradients = value_and_gradients(arguments, reset, cotangents, causal, chunk)
    for actual, expected in zip(found, reference(*arguments, reset, causal=causal), strict=True):
        close(actual, expected)
    for k, gradient in enumerate(gradients):
        way, step = np.random.default_rng(2).normal(size=gradient.shape), 1e-20
        moved = [*arguments[:k], arguments[k] + 1j * step * way, *arguments[k + 1 :]]
        outputs = reference(*moved, reset, causal=causal)
        slope = sum(np.sum(c * v.imag) for c, v in zip(cotangents, outputs, strict=True)) / step
        np.testing.assert_allclose(np.sum(gradient * way), slope, rtol=1e-9, err_msg=NAMES[k])


@pytest.mark.parametrize("causal", [True, False])
def test_nothing_passes_into_an_episode(causal):
    """Neither what was in the state, NaN included, nor earlier steps."""
    (query, key, value, state), reset = make_arguments(6, 3)
    reset[:], reset[0], reset[4] = False, True, True
    run = functools.partial(value_and_gradients, causal=causal, chunk=6)
    zeros = (np.zeros_like(state), np.zeros_like(query))
    (S, y), _ = run([query, key, value, np.full_like(state, np.nan)], reset, zeros)
    moved = np.concatenate([key[:4] + 1.0, key[4:]])
    (other_S, other_y), _ = run([query, moved, value, state], reset, zeros)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(S, other_S)
    np.testing.assert_array_equal(y[4:], other_y[4:])
    assert np.abs(y[:4] - other_y[:4]).max() > 0.1


def test_a_step_is_one_agent():
    (query, key, value, state), _ = make_arguments(1, 1)
    rows = [v[0, :, 0] for v in (query, key, value)]
    decayed = state * np.array(DECAY)[:, None, None]
    S, y = retention_step(*map(jnp.asarray, (*rows, decayed)))
    expected_S, expected_y = reference(
        query, key, value, state, np.zeros((1, B), bool), causal=True
    )
    close(S, expected_S)
    close(y, expected_y[0, :, 0])
