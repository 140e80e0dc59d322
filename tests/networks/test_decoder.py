"""The decoder agent by agent, in pieces and teacher-forced, and what it reads of actions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import NetworkConfig
from mam.networks.actions import Categorical, MultiCategorical, TanhNormal
from mam.networks.decoder import Decoder
from mam.networks.embed import ActionEmbedding
from mam.networks.mixers.registry import families_of

B, N, A, E = 2, 4, 3, 8
DISTRIBUTIONS = {
    "categorical": Categorical(A),
    "components": MultiCategorical((2, 1)),
    "tanh_normal": TanhNormal(A),
}
every_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)


def make(build, *args, name):
    """With large random parameters."""
    rng = np.random.default_rng(0)
    empty = jax.eval_shape(
        lambda key: build(DISTRIBUTIONS[name], *args, key=key), jax.random.key(0)
    )
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.0, 0.4, leaf.shape), leaf.dtype), empty
    )


def make_tokens(name):
    """Of random actions."""
    rng = np.random.default_rng(1)
    action = {
        "categorical": rng.integers(A, size=(B, N)).astype(np.int32),
        "components": rng.integers((2, 1), size=(B, N, 2)).astype(np.int32),
        "tanh_normal": rng.uniform(-1, 1, (B, N, A)).astype(np.float32),
    }
    return DISTRIBUTIONS[name].token(jnp.asarray(action[name]))


def teacher_forced(decoder, tokens, obs_rep):
    return decoder(tokens, obs_rep)


def autoregressive(decoder, tokens, obs_rep):
    embed = decoder.embedder(obs_rep.dtype)

    def step(carry, inputs):
        (state, read), (token, context) = carry, inputs
        state, out = decoder.step(state, embed(read), context)
        return (state, decoder.embed.pad(token)), out

    start = (decoder.init_state(N, (B,), obs_rep.dtype), decoder.embed.start((B,)))
    agents_first = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), (tokens, decoder.read(obs_rep)))
    _, out = jax.lax.scan(step, start, agents_first)
    return jnp.swapaxes(out, 0, 1)


def in_pieces(decoder, tokens, obs_rep):
    """One agent, then two, then one; each piece reads the last action of the piece before."""
    state, token = decoder.init_state(N, (B,), obs_rep.dtype), decoder.embed.start((B,))
    embed, outputs = decoder.embedder(obs_rep.dtype), []
    for piece in (slice(0, 1), slice(1, 3), slice(3, 4)):
        context = jax.tree.map(lambda v, piece=piece: v[:, piece], decoder.read(obs_rep))
        read = decoder.embed.shift_right(tokens[:, piece], first=token)
        state, out = decoder.unroll(state, embed(read), context)
        token = decoder.embed.pad(tokens[:, piece.stop - 1])
        outputs.append(out)
    return jnp.concatenate(outputs, axis=1)


@every_distribution
def test_blocks_of_several_kinds_decode_as_they_were_taught(name):
    """Each block's state goes to that block: a mix-up would have another shape or answer."""
    layout, cross_layout = (families_of(letters, "layout") for letters in ("AM2", "2AM"))
    sizes = NetworkConfig(d_model=E, d_state=4, num_heads=2, head_dim=8)
    decoder = make(Decoder, layout, cross_layout, sizes, name=name)
    tokens = make_tokens(name)
    obs_rep = jnp.asarray(np.random.default_rng(2).normal(size=(B, N, E)), jnp.float32)

    @jax.jit
    def all_ways(decoder):
        return [
            run(decoder, tokens, obs_rep) for run in (teacher_forced, autoregressive, in_pieces)
        ]

    expected, *others = all_ways(decoder)
    for actual in others:
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    assert np.std(expected) > 0.1


@jax.jit
def read(embed, tokens):
    return embed(embed.shift_right(tokens))


@every_distribution
def test_an_agent_reads_the_action_before_its_own(name):
    """As one dense layer would: one-hot or components, and a feature for the start token."""
    embed, tokens = make(ActionEmbedding, E, name=name), make_tokens(name)
    before = np.zeros((B, N, A + 1))
    before[:, 0, A] = 1.0
    before[:, 1:, :A] = (np.eye(A)[tokens] if embed.indexed else tokens)[:, :-1]
    hidden = np.asarray(jax.nn.gelu(before @ np.asarray(embed.table, np.float64)))
    centred = hidden - hidden.mean(axis=-1, keepdims=True)
    normal = centred / np.sqrt(hidden.var(axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(
        read(embed, tokens), normal * embed.norm.scale + embed.norm.offset, rtol=1e-4, atol=1e-4
    )


@every_distribution
def test_one_agent_reads_the_start_token_alone(name):
    embed, tokens = make(ActionEmbedding, E, name=name), make_tokens(name)[:, :1]
    np.testing.assert_array_equal(embed.shift_right(tokens)[:, 0], embed.start((B,)))
