"""The decoder agent by agent, in pieces and teacher-forced, and what an agent reads of the action before its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import NetworkConfig
from mam.networks.decoder import ActionEmbedding, Decoder
from mam.networks.mixers.registry import families_of
from mam.types import EnvSpec

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # less time compiling
B, N, A, E = 2, 4, 3, 8
discrete_and_continuous = pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])


def make(build, *args, continuous):
    """With large random parameters."""
    spec = EnvSpec("suite/task", N, obs_dim=1, num_actions=A, time_limit=None, continuous=continuous)
    rng = np.random.default_rng(0)
    empty = jax.eval_shape(lambda key: build(spec, *args, key=key), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.4, leaf.shape), leaf.dtype), empty)


def make_action(continuous):
    rng = np.random.default_rng(1)
    if continuous:
        return jnp.asarray(rng.uniform(-1, 1, (B, N, A)), jnp.float32)
    return jnp.asarray(rng.integers(A, size=(B, N)), jnp.int32)


def teacher_forced(decoder, action, obs_rep):
    return decoder(action, obs_rep)


def autoregressive(decoder, action, obs_rep):
    embed = decoder.embedder(obs_rep.dtype)

    def advance(carry, inputs):
        (state, token), (action, context) = carry, inputs
        state, out = decoder.advance(state, embed(token), context)
        return (state, decoder.embed.token(action)), out

    start = (decoder.init_state(N, (B,), obs_rep.dtype), decoder.embed.start((B,)))
    agents_first = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), (action, decoder.read(obs_rep)))
    _, out = jax.lax.scan(advance, start, agents_first)
    return jnp.swapaxes(out, 0, 1)


def in_pieces(decoder, action, obs_rep):
    """One agent, then two, then one; each piece reads the last action of the piece before."""
    state, token = decoder.init_state(N, (B,), obs_rep.dtype), decoder.embed.start((B,))
    embed, outputs = decoder.embedder(obs_rep.dtype), []
    for piece in (slice(0, 1), slice(1, 3), slice(3, 4)):
        context = jax.tree.map(lambda v, piece=piece: v[:, piece], decoder.read(obs_rep))
        tokens = decoder.embed.previous(action[:, piece], first=token)
        state, out = decoder.extend(state, embed(tokens), context)
        token = decoder.embed.token(action[:, piece.stop - 1])
        outputs.append(out)
    return jnp.concatenate(outputs, axis=1)


@discrete_and_continuous
def test_blocks_of_several_kinds_decode_as_they_were_taught(continuous):
    """Each block's state goes to that block: a mix-up would not even have the right shape, or another answer."""
    layout, cross_layout = (families_of(letters, "layout") for letters in ("AM2", "2AM"))
    sizes = NetworkConfig(d_model=E, d_state=4, num_heads=2, head_dim=8)
    decoder = make(Decoder, layout, cross_layout, sizes, continuous=continuous)
    action = make_action(continuous)
    obs_rep = jnp.asarray(np.random.default_rng(2).normal(size=(B, N, E)), jnp.float32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def all_ways(decoder):
        return [run(decoder, action, obs_rep) for run in (teacher_forced, autoregressive, in_pieces)]

    expected, *others = all_ways(decoder)
    for actual in others:
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    assert np.std(expected) > 0.1


@functools.partial(jax.jit, compiler_options=QUICK)
def read(embed, action):
    return embed(embed.previous(action))


@discrete_and_continuous
def test_an_agent_reads_the_action_before_its_own(continuous):
    """As one dense layer would: one-hot or the components, and a feature that only the start token has."""
    embed, action = make(ActionEmbedding, E, continuous=continuous), make_action(continuous)
    before = np.zeros((B, N, A + 1))
    before[:, 0, A] = 1.0
    before[:, 1:, :A] = (action if continuous else np.eye(A)[action])[:, :-1]
    hidden = np.asarray(jax.nn.gelu(before @ np.asarray(embed.table, np.float64)))
    centred = hidden - hidden.mean(axis=-1, keepdims=True)
    normal = centred / np.sqrt(hidden.var(axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(read(embed, action), normal * embed.norm.scale + embed.norm.offset, rtol=1e-4, atol=1e-4)


@discrete_and_continuous
def test_one_agent_reads_the_start_token_alone(continuous):
    embed, action = make(ActionEmbedding, E, continuous=continuous), make_action(continuous)[:, :1]
    np.testing.assert_array_equal(embed.previous(action)[:, 0], embed.start((B,)))
