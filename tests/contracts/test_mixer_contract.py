"""What every mixer must keep, in every role it plays.

Parametrised by `MIXERS`: a new mixer is covered as it is.

All in double precision, so that parameters may be large and yet no tolerance hides a small mistake
behind rounding.
"""

import dataclasses
import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mam.config import EncoderConfig, NetworkConfig
from mam.kernels.ssd import CHUNK
from mam.networks.mixers.base import AbstractCausalMixer, Roles, materialize
from mam.networks.mixers.registry import MIXERS

ROLES = [role.name for role in dataclasses.fields(Roles)]
PUBLISHED = [(f, "published encoder") for f in ("mamba", "mamba2")]  # whose passes are multiplied
every_mixer = pytest.mark.parametrize(
    ("family", "role"), [*((f, r) for f in MIXERS for r in ROLES), *PUBLISHED]
)
every_causal_mixer = pytest.mark.parametrize(
    ("family", "role"), [(f, r) for f in MIXERS for r in ROLES if r != "encoder"]
)
SIZES = NetworkConfig(d_model=8, num_heads=2, d_state=4, d_conv=4, dt_rank=2, head_dim=8)
N = 18  # agents; more than a chunk of the scan
LIVING = 13  # of them, where some are dead


close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def build_mixer(family, role, key):
    if role == "published encoder":
        published = dataclasses.replace(SIZES, encoder=EncoderConfig(combine="product"))
        return MIXERS[family].build("encoder", published, key=key)
    return MIXERS[family].build(role, SIZES, key=key)


@functools.cache
def make_mixer(family, role):
    """A mixer with large random parameters: under the initial ones agents hardly interact."""
    empty = jax.eval_shape(lambda key: build_mixer(family, role, key), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        centre, spread = 1.0 if path[-1].name == "scale" else 0.0, 0.6 if leaf.ndim > 1 else 0.4
        return jnp.asarray(rng.normal(centre, spread, leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, empty)


def make_inputs(role, shape, seed=0):
    """Agents, and the second sequence where the role has one."""
    x, context = np.random.default_rng(seed).normal(size=(2, *shape, SIZES.d_model))
    return jnp.asarray(x), jnp.asarray(context) if role == "cross" else None


def run_parallel(mixer, x, context, alive=None):
    return mixer(x, context, alive=alive)


def run_in_pieces(mixer, x, context, cuts):
    """A few agents at a time, each time after what is known of the ones before."""
    *batch, num_agents, _ = x.shape
    state, outputs = mixer.init_state(num_agents, tuple(batch)), []
    for start, stop in pairwise((0, *cuts, num_agents)):
        piece, piece_context = jax.tree.map(
            lambda v, at=slice(start, stop): v[..., at, :], (x, context)
        )
        state, y = mixer.unroll(state, mixer.project(piece), mixer.project_context(piece_context))
        outputs.append(y)
    return jnp.concatenate(outputs, axis=-2)


def step(mixer, state, x, context=None):
    """Read the next agent, by itself."""
    return mixer.step(state, mixer.project(x), mixer.project_context(context))


def run_recurrent(mixer, x, context, capacity=None):
    """Step by step, from a state made for `capacity` agents."""
    *batch, num_agents, _ = x.shape
    agents_first = jax.tree.map(lambda v: jnp.moveaxis(v, -2, 0), (x, context))
    state = mixer.init_state(capacity or num_agents, tuple(batch))
    _, y = lax.scan(lambda state, inputs: step(mixer, state, *inputs), state, agents_first)
    return jnp.moveaxis(y, 0, -2)


parallel = jax.jit(run_parallel)
in_pieces = jax.jit(run_in_pieces, static_argnames="cuts")
recurrent = jax.jit(run_recurrent, static_argnames="capacity")


@jax.jit
def influence(mixer, x, context, alive):
    """Outputs, and gradients of a random projection of each agent's, agents first: [N, …]."""
    y, pull_back = jax.vjp(
        lambda mixer, x, context: mixer(x, context, alive=alive), mixer, x, context
    )
    projection = np.random.default_rng(1).normal(size=y.shape)
    return y, *jax.vmap(pull_back)(jnp.eye(len(y))[:, :, None] * projection)


def influence_of(family, role, num_living=N, garbage=0.0):
    """`influence` where agents after the first `num_living` are dead and their inputs garbage."""
    inputs = make_inputs(role, (N,))
    alive = jnp.arange(N) < num_living
    noise = garbage * np.random.default_rng(2).normal(size=(N, 1))
    inputs = jax.tree.map(lambda v: jnp.where(alive[:, None], v, v + noise), inputs)
    return influence(make_mixer(family, role), *inputs, alive)


def sees(gradient):
    """Which agent's output (row) depends on which agent's input (column)."""
    return np.any(np.asarray(gradient) != 0.0, axis=-1)


@every_mixer
def test_the_roles_are_what_they_say(family, role):
    mixer = make_mixer(family, role)
    assert isinstance(mixer, AbstractCausalMixer) or "encoder" in role


@pytest.mark.parametrize("length", [1, 2, 7, 31, 128])
@every_causal_mixer
def test_step_equals_parallel(family, role, length):
    mixer, inputs = make_mixer(family, role), make_inputs(role, (2, 3, length))
    expected = parallel(mixer, *inputs)
    close(recurrent(mixer, *inputs), expected)
    assert np.std(expected) > 0.1


@pytest.mark.parametrize(
    ("length", "cuts"),
    [(7, (5,)), (7, (1, 3)), (CHUNK + 6, (CHUNK + 1,)), (2 * CHUNK + 6, (2, CHUNK + 3))],
)
@every_causal_mixer
def test_a_sequence_may_be_cut_anywhere(family, role, length, cuts):
    """Into pieces shorter than the convolution, and longer than what is one product."""
    mixer, inputs = make_mixer(family, role), make_inputs(role, (2, length))
    close(in_pieces(mixer, *inputs, cuts), parallel(mixer, *inputs))


@jax.jit
def gathered_before_and_after(mixer, table, context, index):
    """Agents that are rows of a table: projected once for every row, and once for every agent."""
    rows = jax.tree.map(lambda v: v[index], (mixer.project(table), mixer.project_context(context)))
    own = (
        mixer.project(table[index]),
        mixer.project_context(None if context is None else context[index]),
    )
    return mixer.unroll(None, *rows)[1], mixer.unroll(None, *own)[1]


@every_causal_mixer
def test_what_is_read_of_an_agent_is_read_of_it_alone(family, role):
    table, context = make_inputs(role, (5,))
    index = np.random.default_rng(0).integers(5, size=(2, 7))
    close(*gathered_before_and_after(make_mixer(family, role), table, context, index))


@every_causal_mixer
def test_a_state_for_more_agents_changes_nothing(family, role):
    mixer, inputs = make_mixer(family, role), make_inputs(role, (2, 3, 7))
    close(recurrent(mixer, *inputs, capacity=12), recurrent(mixer, *inputs))


@every_mixer
def test_who_sees_whom(family, role):
    """Causal mixers see the past and themselves, exactly; the encoder's see everyone."""
    _, _, *gradients = influence_of(family, role)
    x_gradient, context_gradient = gradients
    expected = np.ones((N, N), bool) if "encoder" in role else np.tri(N, dtype=bool)
    np.testing.assert_array_equal(sees(x_gradient), expected)
    if role == "cross":
        seen = sees(context_gradient)
        assert not np.any(seen & ~expected)
        assert np.all(
            np.diagonal(seen)[1:]
        )  # the first agent's context may have only one answer to choose from


@pytest.mark.parametrize("family", MIXERS)
def test_encoders_know_no_direction(family):
    mixer, (x, _) = make_mixer(family, "encoder"), make_inputs("encoder", (2, N))
    close(parallel(mixer, x[:, ::-1], None)[:, ::-1], parallel(mixer, x, None))


@every_mixer
def test_no_parameter_is_dead(family, role):
    _, gradients, *_ = influence_of(family, role)
    sizes = {
        jax.tree_util.keystr(path): np.max(np.abs(g))
        for path, g in jax.tree_util.tree_leaves_with_path(gradients)
    }
    # Not zero: a parameter that cancels out has a gradient of rounding errors.
    assert not {name: size for name, size in sizes.items() if size < 1e-9 * max(sizes.values())}


@every_mixer
def test_every_leaf_is_an_array(family, role):
    def build(key):
        mixer = build_mixer(family, role, key)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(mixer))
        return mixer

    jax.eval_shape(build, jax.random.key(0))


@every_mixer
def test_the_dead_change_nothing(family, role):
    """Outputs and gradients are those of the living alone, whatever the dead are made of."""
    y, _, *gradients = influence_of(family, role, LIVING, garbage=1e6)
    assert np.all(np.isfinite(y))
    alone = parallel(
        make_mixer(family, role), *(v if v is None else v[:LIVING] for v in make_inputs(role, (N,)))
    )
    close(y[:LIVING], alone)
    for gradient in gradients:
        assert gradient is None or not np.any(sees(gradient)[:LIVING, LIVING:])


@every_mixer
def test_the_dead_change_no_gradient(family, role):
    _, quiet, *_ = influence_of(family, role, LIVING)
    _, loud, *_ = influence_of(family, role, LIVING, garbage=1e6)
    for a, b in zip(jax.tree.leaves(quiet), jax.tree.leaves(loud), strict=True):
        close(b[:LIVING], a[:LIVING])


@every_causal_mixer
def test_the_dead_change_nothing_step_by_step(family, role):
    """They come last, so the recurrent form need not know of them."""
    mixer, inputs = make_mixer(family, role), make_inputs(role, (N,))
    loud = jax.tree.map(lambda v: v.at[LIVING:].multiply(1e6), inputs)
    y = recurrent(mixer, *loud)
    assert np.all(np.isfinite(y))
    close(y[:LIVING], parallel(mixer, *(v if v is None else v[:LIVING] for v in inputs)))


@every_mixer
def test_in_single_precision_the_dead_change_less_than_a_millionth(family, role):
    """As trained, with rounding, in both forms; with smaller parameters, outputs are about 1."""
    mixer = jax.tree.map(lambda leaf: 0.6 * leaf, make_mixer(family, role))
    mixer, inputs = jax.tree.map(lambda v: v.astype(jnp.float32), (mixer, make_inputs(role, (N,))))
    with jax.enable_x64(False):
        loud = jax.tree.map(lambda v: v.at[LIVING:].multiply(1e6), inputs)
        alone = jax.tree.map(lambda v: v[:LIVING], inputs)
        expected = parallel(mixer, *alone)
        assert expected.dtype == jnp.float32
        assert 0.3 < np.std(expected) < 3
        np.testing.assert_allclose(
            parallel(mixer, *loud, jnp.arange(N) < LIVING)[:LIVING], expected, rtol=0, atol=1e-6
        )
        if "encoder" not in role:
            steps = recurrent(mixer, *loud)[:LIVING]
            np.testing.assert_allclose(steps, recurrent(mixer, *alone), rtol=0, atol=1e-6)


@every_mixer
def test_nobody_alive_is_no_accident(family, role):
    assert all(
        np.all(np.isfinite(leaf))
        for leaf in jax.tree.leaves(influence_of(family, role, num_living=0))
    )


@every_mixer
def test_leading_axes_are_vmap(family, role):
    mixer, inputs = make_mixer(family, role), make_inputs(role, (2, 3, 7))
    alive = jnp.asarray(np.arange(7) < np.array([[7, 3, 1], [4, 5, 6]])[..., None])
    mapped = jax.jit(jax.vmap(jax.vmap(run_parallel, (None, 0, 0, 0)), (None, 0, 0, 0)))
    actual = parallel(mixer, *inputs, alive)
    close(actual[alive], mapped(mixer, *inputs, alive)[alive])


@every_causal_mixer
def test_leading_axes_are_vmap_step_by_step(family, role):
    mixer, inputs = make_mixer(family, role), make_inputs(role, (2, 3, 7))
    mapped = jax.jit(jax.vmap(jax.vmap(run_recurrent, (None, 0, 0)), (None, 0, 0)))
    close(recurrent(mixer, *inputs), mapped(mixer, *inputs))


@pytest.mark.parametrize("family", MIXERS)
def test_cross_mixers_ask_for_their_context(family):
    mixer, (x, _) = make_mixer(family, "cross"), make_inputs("cross", (3,))
    with pytest.raises(ValueError, match="pass context"):
        mixer(x)
    with pytest.raises(ValueError, match="pass context"):
        step(mixer, mixer.init_state(3), x[0])


@jax.jit
def as_matrices(mixer, x, context, alive):
    """A mixer's matrices, its output, and what the matrices make of its values."""
    mixing = mixer.mixing(x, context, alive=alive)
    matrix = materialize(mixer, x, context, alive=alive)
    made = mixing.finish(matrix @ mixing.values + mixing.offset)
    return matrix, mixer(x, context, alive=alive), made


@every_mixer
def test_it_is_its_matrices(family, role):
    """They make the output of the values, see whom the mixer sees, and take nothing of the dead."""
    mixer, inputs = make_mixer(family, role), make_inputs(role, (2, N))
    alive = jnp.arange(N) < np.array([[N], [LIVING]])
    matrix, output, made = as_matrices(mixer, *inputs, alive)
    close(made[alive], output[alive])
    assert matrix.shape[:1] + matrix.shape[2:] == (2, N, N)
    causal = "encoder" not in role
    seen = np.any(np.asarray(matrix[0]) != 0, axis=0)
    np.testing.assert_array_equal(seen, np.tri(N, dtype=bool) if causal else np.ones((N, N)))
    assert not np.any(np.asarray(matrix[1])[:, :LIVING, LIVING:])


@every_mixer
def test_in_single_precision_it_is_its_matrices_to_a_hundred_thousandth(family, role):
    """As trained, by the kernels for it; with smaller parameters, outputs are about 1."""
    mixer = jax.tree.map(lambda leaf: 0.6 * leaf, make_mixer(family, role))
    inputs = (*make_inputs(role, (2, 5)), jnp.ones((2, 5)))
    mixer, inputs = jax.tree.map(lambda v: v.astype(jnp.float32), (mixer, inputs))
    with jax.enable_x64(False):
        matrix, output, made = as_matrices(mixer, *inputs[:-1], inputs[-1] > 0)
        assert matrix.dtype == jnp.float32
        np.testing.assert_allclose(made, output, rtol=0, atol=1e-5)
