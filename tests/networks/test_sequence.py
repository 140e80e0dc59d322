"""Layouts of sequence policies: every one of up to three blocks decides, learns or is refused.

Gradients compile slowly, so parameters of most layouts are shown to matter by changing them.
"""

import functools
from dataclasses import dataclass, replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import DecoderConfig, EncoderConfig, NetworkConfig
from mam.errors import UserError
from mam.networks.decoding.decide import Decoding
from mam.networks.mixers.registry import MIXERS
from mam.networks.policy import make_policy
from mam.networks.sequence import Layout
from mam.types import EnvSpec, Evaluation, Observation, PolicyOutput

SIZES = NetworkConfig(d_model=8, num_heads=2, d_state=2, d_conv=2, dt_rank=2, head_dim=8)
N, A, O = 3, 3, 4  # noqa: E741
SPEC = EnvSpec("suite/task", N, O, A, time_limit=None)
ALIVE = np.array([[1, 1, 1]] * 6 + [[0, 1, 1], [0, 1, 0]], bool)
B = len(ALIVE)
FREE = slice(
    4
)  # environments in which all live and may do anything, so that the order is that of the agents
ORDER = np.argsort(~ALIVE, axis=-1, stable=True).astype(np.int32)
RESET = jnp.zeros(B, bool)

LETTERS = "".join(family.letter for family in MIXERS.values())
# Of both encoder and decoder, every letter before every other; and where the decoder reads the
# observations by another mixer.
TRIPLES = [(LETTERS + LETTERS[:2])[k : k + 3] for k in range(len(LETTERS))]
PAIRS = ["".join(letters) for letters in product(LETTERS, repeat=2)]
LAYOUTS = [*LETTERS, *TRIPLES, *(x for x in PAIRS if not any(x in triple for triple in TRIPLES))]
CROSSED = [f"{own}/{cross}" for own, cross in product(LETTERS, repeat=2) if own != cross]
every_layout = pytest.mark.parametrize("layout", LAYOUTS + CROSSED)


def sizes_of(layout, **others):
    own, _, cross = layout.partition("/")
    return replace(
        SIZES, encoder=EncoderConfig(own), decoder=DecoderConfig(own, cross or None), **others
    )


def make(layout, parameters=jnp.float32, **others):
    """A policy with large random parameters: under the initial ones agents hardly interact."""
    rng = np.random.default_rng(0)
    sizes = sizes_of(layout, **others)
    empty = jax.eval_shape(lambda key: make_policy("mam", SPEC, sizes, key=key), jax.random.key(0))

    def draw(path, leaf):
        centre, spread = 1.0 if path[-1].name == "scale" else 0.0, 0.6 if leaf.ndim > 1 else 0.4
        return jnp.asarray(rng.normal(centre, spread, leaf.shape), parameters)

    return jax.tree_util.tree_map_with_path(draw, empty)


def make_observation(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    mask = rng.random((B, N, A)) < 0.7
    mask[..., 1] |= ~mask.any(-1)
    mask[FREE] = True
    return Observation(
        jnp.asarray(rng.normal(size=(B, N, O)), dtype), jnp.asarray(mask), jnp.asarray(ALIVE)
    )


@jax.jit
def act(policy, obs):
    memory, keys = policy.init_memory((B,)), jax.random.split(jax.random.key(0), B)
    return policy.act(memory, obs, RESET, keys)[1]


def evaluate(policy, obs, action, order):
    step = jax.tree.map(lambda v: v[None], (obs, action, order, RESET))
    evaluation = policy.evaluate(policy.init_memory((B,)), *step)
    return jax.tree.map(lambda v: v[0], evaluation)


evaluate_one = jax.jit(evaluate)
evaluate_many = jax.jit(jax.vmap(evaluate, (0, None, 0, None)))


@dataclass
class Subject:
    """A layout that has acted, and what it says of actions.

    In double precision, so that no tolerance hides a small mistake behind rounding. One program
    evaluates everything.
    """

    mask: np.ndarray
    output: PolicyOutput
    repeated: Evaluation  # the actions it took
    impossible: Evaluation  # illegal actions, where there are some
    after: list[Evaluation]  # where each of the agents acts otherwise
    moved: dict[str, Evaluation]  # where each of the parameters is another


@functools.cache
def subject(layout):
    with jax.enable_x64(True):
        policy, obs = make(layout, jnp.float64), make_observation(jnp.float64)
        output, mask = jax.device_get((act(policy, obs), obs.action_mask))
        others = [(output.action + (np.arange(N) == agent)) % A for agent in range(N)]
        names = [
            jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(policy)
        ]
        actions = np.stack(
            [output.action, mask.argmin(-1), *others, *[output.action] * len(names)]
        ).astype(np.int32)
        evaluations = evaluate_many(one_by_one_moved(policy, 2 + N), obs, actions, output.order)
    rows = [jax.tree.map(lambda v, k=k: np.asarray(v[k]), evaluations) for k in range(len(actions))]
    return Subject(
        mask,
        output,
        rows[0],
        rows[1],
        rows[2 : 2 + N],
        dict(zip(names, rows[2 + N :], strict=True)),
    )


def one_by_one_moved(policy, start):
    """Copies of a policy; from `start` on each has another one of its leaves changed."""
    leaves, structure = jax.tree.flatten(jax.device_get(policy))
    rng = np.random.default_rng(2)
    copies = [np.repeat(leaf[None], start + len(leaves), axis=0) for leaf in leaves]
    for index, copy in enumerate(copies):
        copy[start + index] += rng.normal(size=copy.shape[1:])
    return jax.tree.unflatten(structure, [jnp.asarray(copy) for copy in copies])


@every_layout
def test_evaluate_repeats_act(layout):
    actual, expected = subject(layout).repeated, subject(layout).output
    np.testing.assert_allclose(actual.log_prob, expected.log_prob, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(actual.value, expected.value, rtol=1e-10, atol=1e-10)


@every_layout
def test_illegal_actions_are_never_chosen(layout):
    mask = subject(layout).mask
    assert np.all(np.take_along_axis(mask, subject(layout).output.action[..., None], axis=-1))
    np.testing.assert_array_equal(np.exp(subject(layout).impossible.log_prob[~mask.all(-1)]), 0.0)


@every_layout
def test_later_agents_heed_earlier_ones_and_no_others(layout):
    before = subject(layout).repeated
    for agent, after in enumerate(subject(layout).after):
        change = np.abs(after.entropy - before.entropy)[FREE].max(axis=0)
        assert np.all(change[: agent + 1] < 1e-12)
        assert np.all(change[agent + 1 :] > 1e-6)
        np.testing.assert_allclose(after.value, before.value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LETTERS)
def test_agents_start_nearly_by_themselves(layout):
    """At first what others see and do counts for little beside what an agent sees itself."""
    sizes = replace(sizes_of(layout), d_model=32, d_state=8, head_dim=32)
    policy = make_policy("mam", SPEC, sizes, key=jax.random.key(0))
    obs, order = make_observation(), jnp.broadcast_to(jnp.arange(N), (B, N))
    obs = replace(obs, alive=jnp.ones((B, N), bool))
    action = jnp.asarray(np.random.default_rng(2).integers(0, A, (B, N)))
    base = evaluate_one(policy, obs, action, order)

    def change(what, agents_view=obs.agents_view, action=action):
        """How far it moves the last agent's log-probabilities and values."""
        moved = evaluate_one(policy, replace(obs, agents_view=agents_view), action, order)
        return np.std((getattr(moved, what) - getattr(base, what))[FREE, -1])

    seen = jnp.asarray(np.random.default_rng(3).normal(size=(B, N, O)), jnp.float32)
    own, others = (obs.agents_view.at[:, k].add(seen[:, k]) for k in (slice(-1, None), slice(-1)))
    acted = (action + 1).at[:, -1].set(action[:, -1]) % A
    assert change("value", others) < 0.1 * change("value", own)
    assert change("log_prob", others) < 0.1 * change("log_prob", own)
    assert change("log_prob", action=acted) < 0.5 * change("log_prob", own)


@every_layout
def test_every_parameter_has_a_part(layout):
    before = subject(layout).repeated
    for name, after in subject(layout).moved.items():
        changes = (
            np.max(np.abs(a - b))
            for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
        )
        assert max(changes) > 1e-6, name


@pytest.mark.parametrize("critic", ["shared", "own", "pooled", "joint"])
def test_what_values_depend_on(critic):
    """With a network for values alone, no parameter moves both values and actions."""
    policy, obs = make("M", critic=critic), make_observation()
    action, order = make_action(obs), jnp.asarray(ORDER)

    def gradient(what):
        def total(policy):
            return jnp.sum(getattr(evaluate(policy, obs, action, order), what)[FREE])

        moved = jax.tree.map(lambda x: jnp.any(x != 0), jax.jit(jax.grad(total))(policy))
        return jax.device_get(moved)

    of_values, of_actions = gradient("value"), gradient("log_prob")
    both = jax.tree.map(np.logical_and, of_values, of_actions)
    assert any(jax.tree.leaves(both)) == (critic == "shared")
    assert all(jax.tree.leaves(of_values.critic))
    assert not any(jax.tree.leaves(of_actions.critic))
    if critic != "shared":
        assert sum(jax.tree.leaves(of_values)) == sum(jax.tree.leaves(of_values.critic))


@pytest.mark.parametrize(
    ("letter", "name"),
    [("A", "mat"), ("M", "mam"), ("2", "mam2"), ("R", "ff_sable"), ("S", "sable")],
)
def test_a_layout_of_one_kind_is_the_policy_of_that_name(letter, name):
    """The same structure and, from the same key, the same parameters: so the same in everything."""

    def build(name, sizes):
        make = functools.partial(make_policy, name, SPEC, sizes)
        return jax.jit(lambda key: make(key=key))(jax.random.key(0))

    named = build(name, replace(SIZES, num_blocks=2))
    laid_out = build("mat" if name == "mam" else "mam", sizes_of(2 * letter))
    assert jax.tree.structure(laid_out) == jax.tree.structure(named)
    jax.tree.map(np.testing.assert_array_equal, laid_out, named)


def letters_of(name, sizes):
    layout = Layout.of(name, sizes)
    return tuple(
        "".join(family.letter for family in role)
        for role in (layout.encoder, layout.decoder, layout.cross)
    )


@pytest.mark.parametrize(
    ("encoder", "decoder", "cross", "expected"),
    [
        (None, None, None, ("MM", "MM", "MM")),
        ("A2A", None, None, ("A2A", "MM", "MM")),
        (None, "2", None, ("MM", "2", "2")),
        (None, None, "A2", ("MM", "MM", "A2")),
        ("A", "2M", "MA", ("A", "2M", "MA")),
    ],
)
def test_what_is_not_laid_out_is_the_policys_own(encoder, decoder, cross, expected):
    sizes = NetworkConfig(
        num_blocks=2, encoder=EncoderConfig(encoder), decoder=DecoderConfig(decoder, cross)
    )
    assert letters_of("M", sizes) == expected


@pytest.mark.parametrize(("decoder", "cross"), [("AM", "A"), ("A", "AM"), (None, "AA")])
def test_layouts_of_the_decoder_are_equally_long(decoder, cross):
    sizes = replace(SIZES, decoder=DecoderConfig(decoder, cross))
    blocks = len(decoder or "M")
    with pytest.raises(UserError) as refused:
        make_policy("mam", SPEC, sizes, key=jax.random.key(0))
    assert str(refused.value) == (
        f"network.decoder.cross must have a letter for each of the decoder's {blocks} blocks, "
        f"got {cross!r}"
    )


@pytest.mark.parametrize("layout", ["X", "am", "A1"])
@pytest.mark.parametrize("setting", ["encoder.layout", "decoder.layout", "decoder.cross"])
def test_layouts_are_of_letters_that_mixers_have(setting, layout):
    group, _, name = setting.partition(".")
    sizes = replace(SIZES, num_blocks=len(layout))
    sizes = replace(sizes, **{group: replace(getattr(sizes, group), **{name: layout})})
    with pytest.raises(UserError) as refused:
        make_policy("mam", SPEC, sizes, key=jax.random.key(0))
    assert str(refused.value) == (
        f"network.{setting} must be letters of M (mamba), 2 (mamba2), A (attention), "
        f"R (retention), S (sable), one per block, got {layout!r}"
    )


@pytest.mark.parametrize("name", ["ippo", "rec_mappo"])
@pytest.mark.parametrize(
    ("changes", "decoding", "said"),
    [
        ({"encoder": EncoderConfig("A")}, Decoding(), "network.encoder.layout"),
        ({"decoder": DecoderConfig("A")}, Decoding(), "network.decoder.layout"),
        ({"decoder": DecoderConfig(cross="A")}, Decoding(), "sequence policies"),
        ({}, Decoding("fixed_point"), "decode is for sequence policies"),
    ],
)
def test_independent_policies_have_no_layout_and_decode_nothing(name, changes, decoding, said):
    with pytest.raises(UserError, match=said) as refused:
        make_policy(
            name,
            replace(SPEC, state_dim=2),
            replace(SIZES, **changes),
            decoding,
            key=jax.random.key(0),
        )
    assert "\n" not in str(refused.value)
    assert all(family.policy in str(refused.value) for family in MIXERS.values())


def make_action(obs):
    """Legal ones."""
    return jnp.argmax(obs.action_mask, axis=-1).astype(jnp.int32)


@jax.jit
def loss_and_gradient(policy, obs):
    """Of a weighted sum of all that `evaluate` says."""
    weights = np.random.default_rng(3).normal(size=(3, B, N)).astype(np.float32)

    def loss(policy):
        result = evaluate(policy, obs, make_action(obs), jnp.asarray(ORDER))
        found = (result.log_prob, result.entropy, result.value)
        return sum(jnp.sum(w * v) for w, v in zip(weights, found, strict=True))

    return jax.value_and_grad(loss)(policy)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("2", {"remat": True}),
        ("MA/A2", {"remat": True}),
        ("RS", {"remat": True}),
        ("2", {"agent_chunk": 2}),
        ("M/R", {"agent_chunk": 1}),
    ],
)
def test_every_parameter_gets_a_gradient_and_saving_memory_changes_none(layout, changes):
    with jax.enable_x64(True):
        policies = (make(layout, jnp.float64, **how) for how in ({}, changes))
        results = [loss_and_gradient(policy, make_observation(jnp.float64)) for policy in policies]
    (loss, gradient), (again, recomputed) = jax.device_get(results)
    np.testing.assert_allclose(again, loss, rtol=1e-12)
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(gradient))
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(recomputed), strict=True
    )
    for (path, leaf), other in pairs:
        name = jax.tree_util.keystr(path)
        assert np.max(np.abs(leaf)) > 1e-6 * largest, name
        np.testing.assert_allclose(other, leaf, rtol=0, atol=1e-12 * largest, err_msg=name)


HALF = {"dtype": "bfloat16"}
halved = pytest.mark.parametrize("layout", LETTERS)


@halved
def test_half_precision_is_that_of_activations_alone(layout):
    """Scan states, values and the decoder's outputs stay single."""
    policy, obs = make(layout, **HALF), make_observation()

    def run(policy, obs):
        memory = policy.init_memory((B,)).encoder
        order, first = jnp.asarray(ORDER), jnp.ones(B, bool)
        _, obs_rep = policy.encode(memory, policy.embed(obs), obs, order, first)
        context = policy.decoder.read(obs_rep)
        state = policy.decoder.init_state(N, (B,), obs_rep.dtype)
        read = policy.decoder.embed.shift_right(policy.distribution.token(make_action(obs)))
        embedded = policy.decoder.embedder(obs_rep.dtype)(read)
        after, out = policy.decoder.unroll(state, embedded, context)
        return (
            {"half": (obs_rep, context, embedded), "single": (policy.encoder.values(obs_rep), out)},
            state,
            after,
        )

    types, state, after = jax.tree.map(lambda v: v.dtype, jax.eval_shape(run, policy, obs))
    assert set(jax.tree.leaves(types["half"])) == {jnp.dtype(jnp.bfloat16)}
    assert set(jax.tree.leaves(types["single"])) == {jnp.dtype(jnp.float32)}
    assert after == state
    for path, dtype in jax.tree_util.tree_leaves_with_path(after):
        field = getattr(path[-1], "name", "conv_state")
        own = {"length": jnp.int32, "num_living": jnp.int32}
        singles = ("ssm_state", "state", "num_steps", "mixer", "cross")  # R keeps one array
        own |= dict.fromkeys(singles, jnp.float32)
        assert dtype == own.get(field, jnp.bfloat16), field


@halved
def test_in_half_precision_evaluate_repeats_act_up_to_rounding(layout):
    """And learning from it is possible."""
    policy, obs = make(layout, **HALF), make_observation()
    output = act(policy, obs)
    evaluation, exact = (
        jax.device_get(evaluate_one(p, obs, output.action, output.order))
        for p in (policy, make(layout))
    )
    np.testing.assert_allclose(evaluation.log_prob, output.log_prob, atol=0.2)
    np.testing.assert_allclose(evaluation.log_prob, exact.log_prob, atol=0.2)
    assert np.max(np.abs(evaluation.log_prob - exact.log_prob)) > 1e-4  # it is half precision
    assert output.log_prob.dtype == evaluation.log_prob.dtype == np.float32
    for leaf in jax.tree.leaves(loss_and_gradient(policy, obs)):
        assert leaf.dtype == np.float32
        assert np.all(np.isfinite(leaf))
