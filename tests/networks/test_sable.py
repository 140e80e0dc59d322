"""Mixers that remember earlier environment steps, against NumPy and against themselves by steps."""

import functools
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import Config, NetworkConfig
from mam.errors import UserError
from mam.networks.decoding.decide import Decoding
from mam.networks.mixers.base import Roles
from mam.networks.mixers.registry import MIXERS
from mam.networks.mixers.sable import decay_of
from mam.networks.order import decision_order
from mam.networks.policy import has_memory, make_policy, policies
from mam.types import EnvSpec, Observation

T, B, N, E, H = 9, 3, 5, 8, 2
SIZES = NetworkConfig(d_model=E, num_heads=H, retention_decay=0.9)
ROLES = [role.name for role in fields(Roles)]
every_role = pytest.mark.parametrize("role", ROLES)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def random_like(shapes, spread=0.6, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, spread, leaf.shape)), shapes)


@functools.cache
def make_mixer(role):
    build = functools.partial(MIXERS["sable"].build, role, SIZES)
    return random_like(jax.eval_shape(lambda key: build(key=key), jax.random.key(0)))


def make_inputs(seed=0):
    """A memory that is not blank, agents, the second sequence, who is alive, where episodes begin.

    The dead are last and anything but zero.
    """
    rng = np.random.default_rng(seed)
    memory = jax.tree.map(lambda v: v + 2.0, make_mixer("encoder").init_memory((B,)))
    x, context = rng.normal(size=(2, T, B, N, E))
    alive = np.arange(N) < rng.integers(1, N + 1, (T, B))[..., None]
    return memory, jnp.asarray(x), jnp.asarray(context), alive, rng.random((T, B)) < 0.3


def at_once(mixer, role, memory, x, context, alive, reset):
    if role == "encoder":
        return mixer.mix_steps(memory, x, alive, reset)
    read = mixer.project_context(context if role == "cross" else None)
    return mixer.unroll_steps(memory, mixer.project(x), read, alive, reset)


def by_steps(mixer, role, memory, x, context, alive, reset):
    """One environment step after another, in the decoder one agent after another."""

    def agent(state, inputs):
        x, context = inputs
        read = mixer.project_context(context if role == "cross" else None)
        return mixer.step(state, mixer.project(x), read)

    def step(memory, inputs):
        x, context, alive, reset = inputs
        if role == "encoder":
            memory, y = mixer.mix_steps(memory, x[None], alive[None], reset[None])
            return memory, y[0]
        state = mixer.start_step(memory, N, alive, reset)
        rows = jnp.moveaxis(x, 1, 0), jnp.moveaxis(context, 1, 0)
        state, y = jax.lax.scan(agent, state, rows)
        return mixer.end_step(state), jnp.moveaxis(y, 0, 1)

    return jax.lax.scan(step, memory, (x, context, alive, reset))


def numpy_reference(mixer, role, memory, x, context, alive, reset):
    """As the equations are written, one token of one environment after another."""
    r = mixer.mixer.retention
    weights = {name: np.asarray(getattr(r, name).weight) for name in ("query", "key", "value")}
    W_g, W_o, scale, offset = (
        np.asarray(v) for v in (r.gate.weight, r.out.weight, r.norm.scale, r.norm.offset)
    )
    kappa = 0.9 * (1 - np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), H)))
    states, counts = np.array(memory.state), np.array(memory.num_steps)
    out = np.zeros(x.shape)
    for t in range(T):
        for b in range(B):
            if reset[t, b]:
                states[b], counts[b] = 0.0, 0.0
            states[b] *= kappa[:, None, None]
            p = np.zeros(E)
            for k in range(E // 2):
                angle = counts[b] / 10_000 ** (2 * k / E)
                p[2 * k : 2 * k + 2] = np.sin(angle), np.cos(angle)
            u = np.asarray(x[t, b]) + p
            asked = np.asarray(context[t, b]) + p if role == "cross" else u
            q, k, v = (
                (rows @ weights[name]).reshape(N, H, -1)
                for name, rows in (("query", asked), ("key", u), ("value", u))
            )
            y = np.zeros((N, H, E // H))
            for i in range(N):
                if alive[t, b, i]:
                    states[b] += k[i, :, :, None] / np.sqrt(E // H) * v[i, :, None, :]
                y[i] = np.einsum("hf,hfg->hg", q[i], states[b])
            if role == "encoder":
                y = np.einsum("nhf,hfg->nhg", q, states[b])
            y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
            gate = u @ W_g
            out[t, b] = (gate / (1 + np.exp(-gate)) * (y.reshape(N, E) * scale + offset)) @ W_o
            counts[b] += 1
    return (states, counts), out


@functools.partial(jax.jit, static_argnames=("role", "run"))
def value_and_gradients(mixer, role, run, memory, x, context, alive, reset):
    """Memory and outputs, those of the living alone, and gradients of a projection of both."""

    def living(mixer, memory, x, context):
        memory, y = run(mixer, role, memory, x, context, alive, reset)
        return memory, jnp.where(alive[..., None], y, 0.0)

    found, pull_back = jax.vjp(living, mixer, memory, x, context)
    return found, pull_back(random_like(found, 1.0, seed=3))


@every_role
def test_all_steps_at_once_are_steps_and_the_equations(role):
    """Whoever dies and wherever episodes start, in values and gradients."""
    mixer, inputs = make_mixer(role), make_inputs()
    results = [value_and_gradients(mixer, role, run, *inputs) for run in (at_once, by_steps)]
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-9)
    (memory, y), alive = results[0][0], inputs[3]
    (state, count), expected = numpy_reference(mixer, role, *inputs)
    np.testing.assert_allclose(memory.state, state, rtol=1e-9, atol=1e-10)
    np.testing.assert_array_equal(memory.num_steps, count)
    np.testing.assert_allclose(y[alive], expected[alive], rtol=1e-9, atol=1e-10)
    assert np.std(expected) > 0.3


@every_role
def test_episodes_know_nothing_of_each_other(role):
    mixer, (memory, x, context, alive, reset) = make_mixer(role), make_inputs()
    reset[:], reset[4] = False, True
    run = functools.partial(value_and_gradients, mixer, role, at_once)
    (after, y), _ = run(memory, x, context, alive, reset)
    (other_after, other), _ = run(
        jax.tree.map(lambda v: v - 7.0, memory), x.at[:4].add(1.0), context, alive, reset
    )
    jax.tree.map(np.testing.assert_array_equal, (after, y[4:]), (other_after, other[4:]))
    assert np.abs(other[:4] - y[:4]).max() > 0.1


def test_decays_are_the_published_ones():
    config = replace(SIZES, num_heads=4, retention_decay=0.8)
    expected = 0.8 * (1 - np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), 4)))
    np.testing.assert_allclose(decay_of(config), expected, rtol=1e-12)
    np.testing.assert_allclose(decay_of(replace(config, num_heads=1)), [0.8 * 31 / 32], rtol=1e-12)


SPEC = EnvSpec("suite/task", N, 4, 3, time_limit=None)


@jax.jit
def act_and_evaluate(policy, obs, reset, keys):
    start = policy.init_memory((B,))
    memory, output = jax.lax.scan(
        lambda memory, inputs: policy.act(memory, *inputs), start, (obs, reset, keys)
    )
    return memory, output, policy.evaluate(start, obs, output.action, output.order, reset)


@pytest.mark.parametrize(
    "decoding", [Decoding(), Decoding("fixed_point", window=2), Decoding("fixed_point")]
)
def test_acting_is_repeated_however_it_is_decoded(decoding):
    """Over two blocks, with deaths and new episodes; decoding in other ways changes no memory."""

    def build(decoding):
        sizes = replace(SIZES, num_blocks=2)
        return jax.eval_shape(
            lambda key: make_policy("sable", SPEC, sizes, decoding, key=key), jax.random.key(0)
        )

    _, _, _, alive, reset = make_inputs()
    rng = np.random.default_rng(1)
    alive = rng.permuted(alive, axis=-1)
    obs = Observation(
        jnp.asarray(rng.normal(size=(T, B, N, 4))), jnp.ones((T, B, N, 3), bool), jnp.asarray(alive)
    )
    keys = jax.random.split(jax.random.key(0), (T, B))
    memory, output, evaluated = act_and_evaluate(random_like(build(decoding)), obs, reset, keys)
    expected, in_order, _ = act_and_evaluate(random_like(build(Decoding())), obs, reset, keys)
    np.testing.assert_array_equal(output.order, decision_order(obs.alive))
    np.testing.assert_array_equal(output.action, in_order.action)
    for one, other in (
        (evaluated.log_prob[alive], output.log_prob[alive]),
        (evaluated.value[alive], output.value[alive]),
        *zip(jax.tree.leaves(memory), jax.tree.leaves(expected), strict=True),
    ):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", policies())
def test_the_registry_says_what_remembers(name):
    config = NetworkConfig(d_model=E)
    policy = jax.eval_shape(lambda key: make_policy(name, SPEC, config, key=key), jax.random.key(0))
    memory = jax.eval_shape(lambda: policy.init_memory((B,)))
    assert has_memory(name, config) == bool(jax.tree.leaves(memory))


def test_a_layout_remembers_if_one_of_its_mixers_does():
    for part in ("encoder", "decoder"):
        group = replace(getattr(SIZES, part), layout="AS")
        assert has_memory("mam", replace(SIZES, **{part: group}))
    assert not has_memory("mam", replace(SIZES, encoder=replace(SIZES.encoder, layout="AR")))
    assert not has_memory("ippo", SIZES)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_the_decay_is_a_share(value):
    with pytest.raises(UserError, match=r"network.retention_decay must lie in \[0, 1\], got"):
        Config(network=replace(SIZES, retention_decay=value))
