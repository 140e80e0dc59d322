"""The decode loop in native code against the loop it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decode_kernel import (
    DECLINED,
    FAST,
    SIZES,
    look_ahead,
    make_decoder,
    make_inputs,
    make_shapes,
)

from mam.config import NetworkConfig
from mam.kernels.native.library import without_native
from mam.networks.actions import Categorical
from mam.networks.decoder import Context
from mam.networks.decoding import native as native_module
from mam.networks.decoding.decide import DecodeInputs, Decoding, decide
from mam.networks.decoding.native import native_decode, native_supports

mam_native = pytest.importorskip(
    "mam_native", reason="the native kernels are not installed: make native"
)


@jax.jit
def native(decoder, obs_rep, mask, noise):
    return native_decode(decoder, look_ahead(decoder, obs_rep, mask, noise))


@functools.partial(jax.jit, static_argnames=("method",))
def decided(decoder, obs_rep, mask, noise, *, method="sequential"):
    decision = decide(
        decoder,
        Categorical(noise.shape[-1]),
        look_ahead(decoder, obs_rep, mask, noise),
        Decoding(method),
    )
    return decision.action, decision.out


def loop(*inputs):
    with without_native():
        return decided(*inputs)


def assert_same(actual, expected):
    assert actual[0].dtype == jnp.int32
    np.testing.assert_array_equal(actual[0], expected[0])
    np.testing.assert_allclose(
        actual[1], expected[1], rtol=1e-4, atol=1e-4
    )  # rounding, over all agents before


@pytest.mark.parametrize(
    ("letters", "sizes", "num_agents", "num_actions", "batch"),
    [
        ("M", SIZES, 17, 5, (21,)),
        ("2", SIZES, 17, 5, (21,)),
        ("M", SIZES, 1, 1, (3,)),
        ("2", SIZES, 3, 17, (43, 3)),
        ("22", NetworkConfig(d_model=16, d_state=5, head_dim=2), 5, 3, ()),
        ("M2", NetworkConfig(d_model=48, d_state=32, d_conv=1, dt_rank=20), 3, 16, (2,)),
        ("M", FAST, 6, 5, (64,)),
    ],
)
def test_equals_the_loop(letters, sizes, num_agents, num_actions, batch):
    decoder = make_decoder(letters, sizes, num_actions)
    inputs = make_inputs(sizes, num_agents, num_actions, batch)
    actual, expected = native(decoder, *inputs), loop(decoder, *inputs)
    assert_same(actual, expected)
    np.testing.assert_array_equal(
        actual[0], Categorical(num_actions).sample_from_noise(actual[1], *inputs[1:])
    )
    assert num_agents == 1 or np.std(expected[1]) > 0.5


@pytest.mark.parametrize("isa", mam_native.available())
@pytest.mark.parametrize("letters", ["M", "2"])
def test_every_instruction_set(letters, isa):
    decoder, inputs, in_use = (
        make_decoder(letters, SIZES),
        make_inputs(SIZES, 4, 5, (20,)),
        mam_native.isa(),
    )
    try:
        mam_native.choose(isa)
        assert_same(native(decoder, *inputs), loop(decoder, *inputs))
    finally:
        mam_native.choose(in_use)


def test_seeds_side_by_side():
    decoders = [make_decoder("2", SIZES, seed=k) for k in (0, 1)]
    inputs = [make_inputs(SIZES, 3, 5, (5,), seed=k) for k in (0, 1)]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *zip(decoders, inputs, strict=True))
    one = native.__wrapped__
    together = jax.jit(jax.vmap(lambda decoder, inputs: one(decoder, *inputs)))(*stacked)
    for k, (decoder, args) in enumerate(zip(decoders, inputs, strict=True)):
        assert_same([v[k] for v in together], loop(decoder, *args))


def test_the_same_bits_each_time_and_for_any_number_of_threads(monkeypatch):
    decoder, inputs = make_decoder("M", SIZES), make_inputs(SIZES, 5, 5, (30,))
    one, two = native(decoder, *inputs), native(decoder, *inputs)
    jax.clear_caches()
    monkeypatch.setattr(native_module.os, "cpu_count", lambda: 1)
    alone = native(decoder, *inputs)
    for a, b, c in zip(one, two, alone, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes() == np.asarray(c).tobytes()


def test_not_a_number_is_chosen_as_the_loop_does():
    decoder, (obs_rep, mask, noise) = make_decoder("M", SIZES), make_inputs(SIZES, 3, 5, (4,))
    inputs = obs_rep, jnp.ones_like(mask), noise.at[1, 1, 2].set(jnp.nan).at[2, 0, 3].set(jnp.inf)
    np.testing.assert_array_equal(native(decoder, *inputs)[0], loop(decoder, *inputs)[0])


def ahead_of(sizes, num_actions=5, dtype=jnp.float32):
    obs_rep, noise = (jnp.zeros((2, 3, size), dtype) for size in (sizes.d_model, num_actions))
    return DecodeInputs(context=Context(obs_rep=obs_rep, blocks=()), mask=noise == 0, noise=noise)


@DECLINED
def test_what_it_does_not_take(letters, sizes, distribution):
    assert not native_supports(make_shapes(letters, sizes, distribution), ahead_of(sizes))
    assert native_supports(make_shapes("M", FAST), ahead_of(FAST))
    assert not native_supports(make_shapes("M", FAST), ahead_of(FAST, dtype=jnp.bfloat16))


@pytest.mark.parametrize("method", ["sequential", "kernel"])
def test_it_is_chosen_where_it_can_be(method):
    decoder, inputs = make_decoder("M", SIZES), make_inputs(SIZES, 3, 5, (4,))
    run = functools.partial(decided, method=method)
    assert "mam_native_decode" in run.func.lower(decoder, *inputs, method=method).as_text()
    with without_native():
        assert "mam_native" not in run.func.lower(decoder, *inputs, method=method).as_text()
    with jax.enable_x64(True):
        wide = [v.astype(jnp.float64) if v.dtype == jnp.float32 else v for v in inputs]
        assert "mam_native_decode" not in run.func.lower(decoder, *wide, method=method).as_text()
