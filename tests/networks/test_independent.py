"""What independent policies know: of themselves, the others, the state, and the steps before."""

import functools
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import NetworkConfig
from mam.errors import UserError
from mam.networks.independent import IndependentPolicy
from mam.networks.policy import has_memory, make_policy, transfer_weights
from mam.types import EnvSpec, Observation

N = 3
OBS_DIM, STATE_DIM, NUM_ACTIONS = 3, 5, 4
SIZES = NetworkConfig(d_model=8)
PLAIN = replace(SIZES, plain=True)


# Two environments of three agents for four steps: agent 2 of the first is never alive, agent 0 of
# the second dies.
STEPS = 4
ALIVE = np.ones((STEPS, 2, N), bool)
ALIVE[:, 0, 2] = ALIVE[2:, 1, 0] = False
RESET = np.array([[False, False], [False, True], [True, False], [False, False]])


@functools.cache
def make(name, state_dim, sizes=SIZES):
    """With large random parameters."""
    spec = EnvSpec("suite/task", N, OBS_DIM, NUM_ACTIONS, time_limit=None, state_dim=state_dim)
    rng = np.random.default_rng(0)
    empty = jax.eval_shape(lambda key: make_policy(name, spec, sizes, key=key), jax.random.key(0))
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.0, 0.7, leaf.shape), leaf.dtype), empty
    )


def make_observation(state_dim, garbage=0.0):
    """`garbage` stands where dead agents see."""
    rng = np.random.default_rng(5)
    view = np.where(ALIVE[..., None], rng.normal(size=(*ALIVE.shape, OBS_DIM)), garbage).astype(
        np.float32
    )
    state = rng.normal(size=(*ALIVE.shape[:2], state_dim)).astype(np.float32) if state_dim else None
    return Observation(view, np.ones((*ALIVE.shape, NUM_ACTIONS), bool), ALIVE, state=state)


def run(policy, obs):
    """Log-probabilities and values of fixed actions from a used memory: each [steps, B, N]."""
    memory = jax.tree.map(lambda leaf: leaf + 0.5, policy.init_memory((2,)))
    action = jnp.asarray(
        np.random.default_rng(6).integers(NUM_ACTIONS, size=ALIVE.shape), jnp.int32
    )
    order = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), ALIVE.shape)
    evaluation = policy.evaluate(memory, obs, action, order, jnp.asarray(RESET))
    return evaluation.log_prob, evaluation.value


results = jax.jit(run)


@jax.jit
def dependence(policy, obs):
    """Which output depends on whose view, and on the state: [steps, B, N, steps, B(, N)]."""

    def depends(jacobian):
        return jnp.any(jacobian != 0.0, axis=-1)

    def parts(obs):
        return obs.agents_view, obs.state

    def outputs(view, state):
        return run(policy, eqx.tree_at(parts, obs, (view, state), is_leaf=lambda x: x is None))

    return jax.tree.map(depends, jax.jacrev(outputs, argnums=(0, 1))(*parts(obs)))


@pytest.mark.parametrize("state_dim", [None, STATE_DIM])
@pytest.mark.parametrize("name", ["ippo", "mappo", "rec_ippo", "rec_mappo"])
def test_who_knows_what(name, state_dim):
    """Actors know what they saw; critics of mappo the state besides, or what all the living saw."""
    policy = make(name, state_dim)
    assert isinstance(policy, IndependentPolicy)
    log_prob, value = dependence(policy, make_observation(state_dim))
    # The steps that are remembered: [t, s, b], s no later than t and of the same episode.
    episode = np.cumsum(RESET, axis=0)
    reach = (episode[:, None] == episode[None]) & np.tri(STEPS, dtype=bool)[..., None]
    reach &= has_memory(name, SIZES) | np.eye(STEPS, dtype=bool)[..., None]
    same_env, same_agent = np.eye(2, dtype=bool), np.eye(N, dtype=bool)
    seen = np.einsum("tsb,bc,scj->tbscj", reach, same_env, ALIVE)  # the dead see nothing
    own = np.einsum("tbscj,ij->tbiscj", seen, same_agent)
    everyone = np.broadcast_to(seen[:, :, None], own.shape)
    np.testing.assert_array_equal(log_prob[0], own)
    np.testing.assert_array_equal(
        value[0], everyone if name.endswith("mappo") and not state_dim else own
    )
    if state_dim:
        assert not np.any(log_prob[1])
        state = np.einsum("tsb,bc->tbsc", reach, same_env)[:, :, None]
        np.testing.assert_array_equal(
            value[1], np.broadcast_to(state & name.endswith("mappo"), value[1].shape)
        )


def test_without_a_state_the_critic_sees_what_all_the_living_see():
    """x_i = LN(GELU(e_i + W (e_1, …, e_N) + b)), with zeros in the places of the dead."""
    view, obs = make("mappo", None).critic.view, make_observation(None)
    own = np.asarray(view.embed(obs))
    side_by_side = np.where(ALIVE[..., None], own, 0.0).reshape(STEPS, 2, -1)
    joint = side_by_side @ np.asarray(view.joint.weight) + view.joint.bias
    expected = view.norm(jax.nn.gelu(own + joint[:, :, None]))
    np.testing.assert_allclose(view(obs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mappo", "ippo", "mam"])
def test_a_pooled_critic_sees_the_mean_of_the_living(name):
    """x_i = LN(GELU(e_i + W (Σ_j alive_j e_j) / (Σ_j alive_j) + b)); the state is not read."""
    policy, obs = (
        make(name, STATE_DIM, replace(SIZES, critic="pooled")),
        make_observation(STATE_DIM),
    )
    view = (policy.tower if name == "mam" else policy.critic).view
    own, living = np.asarray(view.embed(obs)), ALIVE[..., None]
    mean = np.where(living, own, 0.0).sum(2) / living.sum(2)
    pooled = mean @ np.asarray(view.pooled.weight) + view.pooled.bias
    expected = view.norm(jax.nn.gelu(own + pooled[:, :, None]))
    np.testing.assert_allclose(view(obs), expected, rtol=1e-4, atol=1e-5)


def test_a_pooled_critic_is_for_any_number_of_agents():
    spec = EnvSpec("suite/task", N, OBS_DIM, NUM_ACTIONS, time_limit=None)
    larger, pooled = replace(spec, num_agents=N + 2), replace(SIZES, critic="pooled")
    policy = transfer_weights(make("mappo", None, pooled), "mappo", spec, larger, pooled)
    assert policy.num_agents == N + 2
    with pytest.raises(UserError, match=r"num_agents is 5 .* with --network.critic pooled"):
        transfer_weights(make("mappo", None), "mappo", spec, larger, SIZES)


def test_independent_agents_share_nothing_with_their_critic():
    with pytest.raises(
        UserError, match=r"network\.critic must be own, joint, pooled where agents decide by"
    ):
        make("ippo", None, replace(SIZES, critic="shared"))


def test_plain_layers_are_relus_and_heads_linear():
    """Actor: o → E → E → A. Critic: x_i = ReLU(V o_i + W (o_1, …, o_N) + b) → E → 1."""
    policy, obs = make("mappo", None, PLAIN), make_observation(None)

    def layer(dense, x):
        return np.maximum(x @ np.asarray(dense.weight) + np.asarray(dense.bias), 0.0)

    seen = np.where(ALIVE[..., None], obs.agents_view, 0.0)
    view = policy.critic.view
    own = seen @ np.asarray(view.embed.dense.weight) + view.embed.dense.bias
    joint = seen.reshape(STEPS, 2, -1) @ np.asarray(view.joint.weight) + view.joint.bias
    whole = np.maximum(own + joint[:, :, None], 0.0)
    for tower, x in (policy.actor, layer(policy.actor.view.dense, seen)), (policy.critic, whole):
        expected = layer(tower.layers[0], x) @ tower.head.out.weight + tower.head.out.bias
        _, out = tower.step(tower.memory.init(ALIVE.shape), obs, jnp.asarray(RESET))
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mam", "mat", "sable"])
def test_sequence_policies_are_never_plain(name):
    spec = EnvSpec("suite/task", N, OBS_DIM, NUM_ACTIONS, time_limit=None)
    with pytest.raises(UserError, match=r"network\.plain is for independent policies: mappo, ippo"):
        make_policy(name, spec, PLAIN, key=jax.random.key(0))


@pytest.mark.parametrize("garbage", [1e9, np.nan])
@pytest.mark.parametrize(
    ("name", "state_dim"), [("ippo", None), ("rec_mappo", None), ("rec_mappo", STATE_DIM)]
)
def test_what_dead_agents_see_reaches_nobody(name, state_dim, garbage):
    clean, dirty = (
        results(make(name, state_dim), make_observation(state_dim, value))
        for value in (0.0, garbage)
    )
    assert np.all(np.isfinite(clean))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@pytest.mark.parametrize("name", ["ippo", "rec_ippo"])
def test_all_agents_have_the_same_weights(name):
    """Agents that change places take their values with them."""
    obs, places = make_observation(None), [2, 0, 1]
    moved = eqx.tree_at(
        lambda o: (o.agents_view, o.alive),
        obs,
        (obs.agents_view[:, :, places], ALIVE[:, :, places]),
    )
    (_, value), (_, moved_value) = (results(make(name, None), o) for o in (obs, moved))
    np.testing.assert_allclose(moved_value, value[:, :, jnp.array(places)], rtol=1e-5, atol=1e-6)
    assert np.std(value) > 0.01


@pytest.mark.parametrize("name", ["ippo", "mappo"])
def test_a_recurrent_policy_is_the_plain_one_with_a_gru(name):
    """The same program makes its weights; and without that memory it is the plain one."""
    spec = EnvSpec("suite/task", N, OBS_DIM, NUM_ACTIONS, time_limit=None)

    def program(name, memory):
        def build(key):
            return jax.tree.leaves(make_policy(name, spec, replace(SIZES, memory=memory), key=key))

        return str(jax.make_jaxpr(build)(jax.random.key(0)))

    assert program(f"rec_{name}", None) == program(name, "gru") != program(name, None)
    assert program(f"rec_{name}", "none") == program(name, "none") == program(name, None)
