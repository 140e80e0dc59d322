"""Acting as the fixed point of whole passes: the same actions as one after another."""

import functools
import itertools
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import DecoderConfig, EncoderConfig, NetworkConfig
from mam.networks.actions import Categorical, make_distribution
from mam.networks.decoder import Context, Decoder
from mam.networks.decoding.decide import DecodeInputs, Decoding, decide
from mam.networks.embed import ActionEmbedding
from mam.networks.mixers.registry import families_of
from mam.networks.policy import make_policy
from mam.types import EnvSpec, Observation

SIZES = NetworkConfig(d_model=8, num_heads=2, d_state=4, dt_rank=2, head_dim=8)
B, N, A, O = 3, 6, 4, 5  # noqa: E741
SEQUENTIAL = Decoding()
# Windows: all agents, one that does not divide them, and one that ends in deciding one by one.
WHOLE, WINDOWS, GIVEN_UP = (
    Decoding("fixed_point", *limits) for limits in [(None, None), (4, None), (4, 1)]
)
MORE = [
    Decoding("fixed_point", *limits)
    for limits in [(1, None), (9, None), (None, 1), (None, 2), (4, 3)]
]
KERNEL = Decoding("kernel")  # where there is no CUDA, the loop
KINDS = {
    "discrete": {},
    "continuous": {"continuous": True},
    "components": {"action_components": (2, 2)},
}


def make_spec(kind):
    return EnvSpec("suite/task", N, O, A, time_limit=None, **KINDS[kind])


def randomise(build, seed=0):
    """What `build` makes of a key, with large random parameters, so that agents interact."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if path[-1].name == "scale" else 0.0
        return jnp.asarray(rng.normal(centre, 0.6 if leaf.ndim > 1 else 0.4, leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(build, jax.random.key(0)))


def make_decoder(letters, kind):
    layout = families_of(letters, "layout")
    return randomise(
        lambda key: Decoder(make_distribution(make_spec(kind)), layout, layout, SIZES, key=key)
    )


def make_inputs(decoder, kind, batch, seed=0):
    """Random observation representations, masks and noise."""
    rng = np.random.default_rng(seed)
    mask = rng.random((*batch, N, A)) < 0.8
    mask[..., 1] |= ~mask.any(-1)
    noise = rng.normal(size=mask.shape) if kind == "continuous" else rng.gumbel(size=mask.shape)
    obs_rep = jnp.asarray(rng.normal(size=(*batch, N, SIZES.d_model)), decoder.embed.table.dtype)
    return obs_rep, jnp.asarray(mask), jnp.asarray(noise, obs_rep.dtype)


@functools.partial(jax.jit, static_argnames=("kind", "decodings"))
def all_ways(decoder, obs_rep, mask, noise, *, kind, decodings):
    """One after another and in other ways, and the decoder's outputs for the former's actions."""
    ahead = DecodeInputs(context=decoder.read(obs_rep), mask=mask, noise=noise)
    distribution = make_distribution(make_spec(kind))
    sequential, *others = (
        decide(decoder, distribution, ahead, decoding) for decoding in (SEQUENTIAL, *decodings)
    )
    chosen = distribution.sample_from_noise(sequential.out, mask, noise)
    return sequential, others, decoder(distribution.token(sequential.action), obs_rep), chosen


@pytest.mark.parametrize(
    ("layout", "kind"),
    [*itertools.product(["M", "A", "2", "AM2"], ["discrete", "continuous"]), ("M", "components")],
)
def test_all_ways_lead_to_the_same_actions(layout, kind):
    decodings = (
        WHOLE,
        WINDOWS,
        GIVEN_UP,
        *([*MORE, KERNEL] if (layout, kind) == ("A", "discrete") else ()),
    )
    with jax.enable_x64(True):
        decoder = make_decoder(layout, kind)
        results = all_ways(
            decoder, *make_inputs(decoder, kind, (B,)), kind=kind, decodings=decodings
        )
        sequential, others, taught, chosen = jax.device_get(results)
    np.testing.assert_allclose(sequential.action, chosen, atol=1e-10)
    np.testing.assert_allclose(sequential.out, taught, rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(sequential.passes, 1.0)
    passes = {}
    for decoding, decision in zip(decodings, others, strict=True):
        np.testing.assert_allclose(
            decision.action, sequential.action, atol=1e-10, err_msg=f"{decoding}"
        )
        np.testing.assert_allclose(
            decision.out, sequential.out, rtol=1e-10, atol=1e-10, err_msg=f"{decoding}"
        )
        passes[decoding] = np.max(decision.passes)
        size = 1 if decoding == KERNEL else min(decoding.window or N, N)
        limit = decoding.max_passes or size
        assert 1 <= passes[decoding] <= (size if limit >= size else limit + 1), decoding
        assert (passes[decoding] == 1) == (size == 1), decoding
    assert passes[WHOLE] > 1  # agents do heed each other, so that these limits were met
    assert passes[GIVEN_UP] > 1


@pytest.mark.parametrize("letters", ["M", "2"])
def test_in_single_precision_only_ties_are_decided_otherwise(letters):
    """Of twenty thousand decisions; agents after one that differs may differ, too."""
    decoder = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), make_decoder(letters, "discrete"))
    _, mask, noise = inputs = make_inputs(decoder, "discrete", (20_000 // N + 1,))
    results = all_ways(decoder, *inputs, kind="discrete", decodings=(WINDOWS,))
    sequential, (decision,), *_ = jax.device_get(results)
    differs = decision.action != sequential.action
    assert differs.size >= 20_000
    assert differs.mean() <= 1e-4
    row = np.flatnonzero(differs.any(axis=-1))
    first = differs[row].argmax(axis=-1)
    best, second = np.sort(np.where(mask, sequential.out + noise, -np.inf)[row, first])[:, :-3:-1].T
    assert np.all(best - second < 1e-4)


class Alternating(Decoder):
    """Whoever reads an action takes the other one, and the first agent takes action 0.

    What agents would do by themselves, the first guess, is action 1.
    """

    def __init__(self):
        self.embed = randomise(lambda key: ActionEmbedding(Categorical(2), 1, key=key))
        self.blocks, self.head, self.remat, self.chunk = (), None, False, None

    def init_state(self, num_agents, batch, dtype):
        return ()

    def embedder(self, dtype):
        return lambda token: 9.0 * jnp.asarray([[0, 1], [1, 0], [1, 0]], dtype)[token]

    def step(self, state, embedded, context):
        return (), embedded

    def unroll(self, state, embedded, context):
        return (), embedded[..., ::-1] if state is None else embedded


@pytest.mark.parametrize(
    ("window", "max_passes", "passes"),
    [
        (None, None, N),
        (4, None, 3.5),  # four, and three: the last of an incomplete window must settle, too
        (3, None, 2.5),
        (1, None, 1),
        (None, 1, 2),
        (None, N - 1, N),
        (None, N, N),
        (3, 2, 2.5),
    ],
)
def test_the_strongest_coupling_takes_a_pass_per_agent(window, max_passes, passes):
    """Agent k is right after k passes and no sooner.

    Past the limit all decide one after another, which is a pass.
    """
    decoder = Alternating()
    ahead = DecodeInputs(
        context=Context(obs_rep=jnp.zeros((1, N, 1)), blocks=()),
        mask=jnp.ones((1, N, 2), bool),
        noise=jnp.zeros((1, N, 2)),
    )
    decoding = Decoding("fixed_point", window, max_passes)
    decision = jax.jit(lambda ahead: decide(decoder, Categorical(2), ahead, decoding))(ahead)
    np.testing.assert_array_equal(decision.action[0], np.arange(N) % 2)
    np.testing.assert_array_equal(decision.passes, passes)


POLICIES = {
    **{name: (name, SIZES) for name in ("mam", "mam2", "mat")},
    "hybrid": (
        "mat",
        replace(SIZES, encoder=EncoderConfig("2M"), decoder=DecoderConfig("MA", cross="A2")),
    ),
}
ALIVE = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0]], bool)


def make(name, kind, decoding, seed=1):
    name, sizes = POLICIES[name]
    policy = randomise(
        lambda key: make_policy(name, make_spec(kind), sizes, decoding, key=key), seed
    )
    # Means near zero: at the limits of continuous actions log-probabilities are hardly determined.
    shrink = 0.1 if kind == "continuous" else 1.0
    return eqx.tree_at(
        lambda p: p.decoder.head.out.weight, policy, shrink * policy.decoder.head.out.weight
    )


def make_observation():
    rng = np.random.default_rng(3)
    mask = rng.random((*ALIVE.shape, A)) < 0.8
    mask[..., 1] |= ~mask.any(-1)
    return Observation(
        jnp.asarray(rng.normal(size=(*ALIVE.shape, O))), jnp.asarray(mask), jnp.asarray(ALIVE)
    )


def act(policy, key, greedy):
    memory, reset = policy.init_memory((len(ALIVE),)), jnp.zeros(len(ALIVE), bool)
    keys = jax.random.split(key, len(ALIVE))
    return policy.act(memory, make_observation(), reset, keys, greedy=greedy)[1]


@jax.jit
def act_and_evaluate(policies, key):
    """Per policy: sampled and greedy actions; of the last one also `evaluate` of the former."""
    outputs = [
        {"sampled": act(policy, key, False), "greedy": act(policy, key, True)}
        for policy in policies
    ]
    sampled = outputs[-1]["sampled"]
    memory, reset = policies[-1].init_memory((len(ALIVE),)), jnp.zeros(len(ALIVE), bool)
    return outputs, policies[-1].evaluate(
        memory, make_observation(), sampled.action, sampled.order, reset
    )


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "discrete") for name in POLICIES), ("mam", "continuous")]
)
def test_policies_act_alike_in_either_way(name, kind):
    """With dead agents; what is stored for training is the same, too."""
    with jax.enable_x64(True):
        policies = [make(name, kind, decoding) for decoding in (SEQUENTIAL, WINDOWS)]
        (sequential, fixed_point), evaluated = jax.device_get(
            act_and_evaluate(policies, jax.random.key(0))
        )
    for mode in ("sampled", "greedy"):
        expected, actual = sequential[mode], fixed_point[mode]
        for field in ("action", "log_prob", "value", "order"):
            np.testing.assert_allclose(
                getattr(actual, field), getattr(expected, field), rtol=1e-10, atol=1e-10
            )
        assert expected.metrics == {}
        assert list(actual.metrics) == ["decode_passes"]
        assert np.all(
            (actual.metrics["decode_passes"] >= 1)
            & (actual.metrics["decode_passes"] <= WINDOWS.window)
        )
    np.testing.assert_allclose(
        evaluated.log_prob, fixed_point["sampled"].log_prob, rtol=1e-10, atol=1e-10
    )
    assert np.any(fixed_point["sampled"].action != fixed_point["greedy"].action)


@pytest.mark.parametrize("decoding", [WHOLE, GIVEN_UP])
def test_seeds_side_by_side_act_as_they_do_alone(decoding):
    """Mapped over, whoever has settled waits for the others, and a fallback is computed for all."""
    keys = jax.random.split(jax.random.key(0), 3)
    with jax.enable_x64(True):
        seeds = [make("mam", "discrete", decoding, seed) for seed in range(3)]
        one = functools.partial(act, greedy=False)
        together = jax.jit(jax.vmap(one))(jax.tree.map(lambda *v: jnp.stack(v), *seeds), keys)
        alone = [jax.jit(one)(seed, key) for seed, key in zip(seeds, keys, strict=True)]
    stacked = jax.tree.map(lambda *v: np.stack(v), *alone)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), together, stacked
    )
    if decoding == WHOLE:
        assert len(np.unique(stacked.metrics["decode_passes"])) > 1
