"""What every policy must keep. Parametrised by `POLICIES`: a new policy is covered as it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import NetworkConfig
from mam.errors import UserError
from mam.networks.policy import POLICIES, agent_gumbel, decision_order, make_policy
from mam.types import EnvSpec, Observation, Policy

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # less time compiling
SIZES = NetworkConfig(d_model=8, num_heads=2, d_state=4, dt_rank=2)
OBS_DIM, NUM_ACTIONS = 6, 4
every_policy = pytest.mark.parametrize("name", POLICIES)

# Which of five agents are alive, in six environments.
ALIVE = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
ALIVE = ALIVE.astype(bool)
NUM_ENVS, NUM_AGENTS = ALIVE.shape
PAIRS = np.array([1, 5])  # environments in which the first two live
NUM_SAMPLES = 4000  # joint actions per observation, where frequencies are counted


@functools.cache
def get_policy(name):
    """A policy with large random parameters: under the initial ones agents hardly heed one another."""
    spec = EnvSpec("suite/task", NUM_AGENTS, OBS_DIM, NUM_ACTIONS, time_limit=10)
    empty = jax.eval_shape(lambda key: make_policy(name, spec, SIZES, key=key), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        centre, spread = 1.0 if path[-1].name == "scale" else 0.0, 0.6 if leaf.ndim > 1 else 0.4
        return jnp.asarray(rng.normal(centre, spread, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, empty)


def make_observation(alive, seed=3):
    """Random features and masks for the living; the dead have large ones, as garbage would."""
    rng = np.random.default_rng(seed)
    view = rng.normal(size=(*alive.shape, OBS_DIM)) * np.where(alive, 1.0, 1e3)[..., None]
    mask = rng.random((*alive.shape, NUM_ACTIONS)) < 0.7
    mask[..., 1] |= ~mask.any(axis=-1)
    return Observation(jnp.asarray(view, jnp.float32), jnp.asarray(mask), jnp.asarray(alive))


@functools.cache
def observe(what):
    """An observation and its keys: of teams with dead agents, of two agents by themselves, of one."""
    obs, keys = make_observation(ALIVE), jax.random.split(jax.random.key(0), NUM_ENVS)
    if what == "single":  # the living agent of environment 4, without a batch axis
        return jax.tree.map(lambda v: v[4, :1], obs), keys[4]
    if what == "pair":  # the living agents of environments 1 and 5, often, and the first time with the same keys
        obs = jax.tree.map(lambda v: jnp.repeat(v[PAIRS, None, :2], NUM_SAMPLES, axis=1), obs)
        many = jax.vmap(lambda key: jax.random.split(key, NUM_SAMPLES))(jax.random.split(jax.random.key(1), 2))
        keys = many.at[:, 0].set(keys[PAIRS])
    return obs, keys


def run_all(policy, obs, key):
    memory, reset = policy.init_memory(key.shape), jnp.zeros(key.shape, bool)
    memory, sampled = policy.act(memory, obs, reset, key)
    _, greedy = policy.act(memory, obs, reset, key, greedy=True)
    evaluated = policy.evaluate(memory, obs, sampled.action, sampled.order, reset)
    return {"sampled": sampled, "greedy": greedy, "evaluated": evaluated, "value": policy.value(memory, obs)}


all_methods = jax.jit(run_all, compiler_options=QUICK)
gumbel_noise = jax.jit(agent_gumbel, static_argnums=(1, 2), compiler_options=QUICK)


@functools.partial(jax.jit, compiler_options=QUICK)
def evaluate(policy, obs, action, order):
    reset = jnp.zeros(order.shape[:-1], bool)
    return policy.evaluate(policy.init_memory(reset.shape), obs, action, order, reset)


@functools.cache
def results(name, what):
    return jax.device_get(all_methods(get_policy(name), *observe(what)))


def evaluate_env(name, obs, env, actions, order):
    """`evaluate` of any number of joint actions in one environment."""
    obs = jax.tree.map(lambda v: jnp.broadcast_to(v[env], (NUM_ENVS, *v.shape[1:])), obs)
    order = jnp.broadcast_to(jnp.asarray(order, jnp.int32), (NUM_ENVS, NUM_AGENTS))
    padded = np.pad(actions, [(0, -len(actions) % NUM_ENVS), (0, 0)])
    parts = [
        jax.device_get(evaluate(get_policy(name), obs, jnp.asarray(part, jnp.int32), order))
        for part in np.split(padded, len(padded) // NUM_ENVS)
    ]
    return jax.tree.map(lambda *values: np.concatenate(values)[: len(actions)], *parts)


def test_unknown_name():
    spec = EnvSpec("suite/task", NUM_AGENTS, OBS_DIM, NUM_ACTIONS, time_limit=10)
    with pytest.raises(UserError, match="unknown policy 'mamm': did you mean mam"):
        make_policy("mamm", spec, SIZES, key=jax.random.key(0))


@every_policy
def test_it_is_a_policy_of_arrays(name):
    def build(key):
        policy = make_policy(name, EnvSpec("suite/task", 2, OBS_DIM, NUM_ACTIONS, time_limit=10), SIZES, key=key)
        assert isinstance(policy, Policy)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(policy))
        return policy

    jax.eval_shape(build, jax.random.key(0))


@pytest.mark.parametrize("what", ["single", "pair", "team"])
@every_policy
def test_evaluate_repeats_act(name, what):
    """So the probability ratio starts at 1."""
    result = results(name, what)
    sampled, evaluated = result["sampled"], result["evaluated"]
    np.testing.assert_allclose(evaluated.log_prob, sampled.log_prob, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(evaluated.value, sampled.value, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result["value"], sampled.value, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result["greedy"].value, sampled.value, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sampled.order, decision_order(observe(what)[0].alive))


@every_policy
def test_the_living_decide_first_and_by_index(name):
    np.testing.assert_array_equal(
        results(name, "team")["sampled"].order,
        [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [1, 3, 4, 0, 2], [3, 0, 1, 2, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]],
    )


@every_policy
@pytest.mark.parametrize("mode", ["sampled", "greedy"])
def test_acting_is_the_gumbel_max_of_the_evaluated_probabilities(name, mode):
    """Agent after agent, action = argmax(log π(· | earlier actions) + noise of that agent); greedy has none."""
    obs, keys = observe("team")
    output = results(name, "team")[mode]
    candidates = np.arange(NUM_ACTIONS)
    for env in range(NUM_ENVS):
        noise = gumbel_noise(keys[env], NUM_AGENTS, NUM_ACTIONS) * (mode == "sampled")
        chosen = np.zeros(NUM_AGENTS, int)
        for agent in output.order[env]:
            actions = np.tile(chosen, (NUM_ACTIONS, 1))
            actions[:, agent] = candidates
            log_probs = evaluate_env(name, obs, env, actions, output.order[env]).log_prob[:, agent]
            chosen[agent] = np.argmax(log_probs + noise[agent])
            np.testing.assert_allclose(log_probs[chosen[agent]], output.log_prob[env, agent], atol=1e-5)
            np.testing.assert_allclose(np.sum(np.exp(log_probs)), 1.0, atol=1e-5)
        np.testing.assert_array_equal(chosen, output.action[env])


@every_policy
def test_illegal_actions_have_no_probability(name):
    obs, _ = observe("team")
    mask, order = np.asarray(obs.action_mask), decision_order(obs.alive)
    illegal = np.argmin(mask, axis=-1)
    log_prob = evaluate(get_policy(name), obs, jnp.asarray(illegal, jnp.int32), order).log_prob
    is_illegal = ~np.take_along_axis(mask, illegal[..., None], axis=-1)[..., 0]
    assert is_illegal.sum() > 10
    np.testing.assert_array_equal(np.exp(log_prob)[is_illegal], 0.0)
    for what in ("single", "pair", "team"):
        mask = np.asarray(observe(what)[0].action_mask)
        for mode in ("sampled", "greedy"):
            action = results(name, what)[mode].action
            assert np.all(np.take_along_axis(mask, action[..., None], axis=-1))


@every_policy
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 0, 4, 2, 1]])
def test_later_agents_answer_earlier_ones(name, order):
    """Changing an agent's action changes what every later agent does, and nothing of the earlier ones."""
    obs, _ = observe("team")
    obs = Observation(obs.agents_view, jnp.ones_like(obs.action_mask), jnp.ones_like(obs.alive))
    changed = np.concatenate([np.zeros((1, NUM_AGENTS), int), np.eye(NUM_AGENTS, dtype=int)])
    evaluation = evaluate_env(name, obs, 0, changed, order)
    for place, agent in enumerate(order):
        before, after = order[:place], order[place + 1 :]
        base, other = (jax.tree.map(lambda v, row=row: v[row], evaluation) for row in (0, 1 + agent))
        np.testing.assert_allclose(other.value, base.value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(other.log_prob[before], base.log_prob[before], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            other.entropy[[*before, agent]], base.entropy[[*before, agent]], rtol=1e-5, atol=1e-6
        )
        assert np.all(np.abs(other.log_prob[after] - base.log_prob[after]) > 1e-4)


def test_noise_belongs_to_the_agent():
    keys = jax.random.split(jax.random.key(0), 3)
    noise = np.asarray(gumbel_noise(keys, 5, NUM_ACTIONS))
    assert len(np.unique(noise)) == noise.size  # no two agents, actions or environments share any
    np.testing.assert_array_equal(gumbel_noise(keys, 7, NUM_ACTIONS)[:, :5], noise)
    np.testing.assert_array_equal(gumbel_noise(keys[1], 5, NUM_ACTIONS), noise[1])
    np.testing.assert_array_equal(gumbel_noise(keys, 5, NUM_ACTIONS), noise)


@every_policy
def test_the_key_decides_samples_and_nothing_else(name):
    obs, keys = observe("team")
    first = results(name, "team")
    again = all_methods(get_policy(name), obs, keys)
    other = all_methods(get_policy(name), obs, jax.random.split(jax.random.key(9), NUM_ENVS))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, first))
    assert jax.tree.all(jax.tree.map(np.array_equal, other["greedy"], first["greedy"]))
    assert np.any(other["sampled"].action != first["sampled"].action)


@functools.cache
def joint_probabilities(name, env):
    """Of the two living agents, every joint action evaluated: π(a₁, a₂) [A, A], π(a₁) [A], and entropies [A, A, 2]."""
    pairs = np.indices((NUM_ACTIONS, NUM_ACTIONS)).reshape(2, -1).T
    actions = np.pad(pairs, [(0, 0), (0, NUM_AGENTS - 2)])
    evaluation = evaluate_env(name, observe("team")[0], env, actions, np.arange(NUM_AGENTS))
    log_prob, entropy = (
        v[:, :2].reshape(NUM_ACTIONS, NUM_ACTIONS, 2).astype(float) for v in (evaluation.log_prob, evaluation.entropy)
    )
    return np.exp(log_prob.sum(-1)), np.exp(log_prob[:, 0, 0]), entropy


@every_policy
def test_joint_actions_are_as_frequent_as_evaluated(name):
    action = results(name, "pair")["sampled"].action
    for env, samples in zip(PAIRS, action, strict=True):
        joint, first, _ = joint_probabilities(name, env)
        np.testing.assert_allclose(joint.sum(), 1.0, atol=1e-5)
        counts = np.zeros_like(joint)
        np.add.at(counts, tuple(samples.T), 1)
        assert np.all(counts[joint == 0.0] == 0)
        deviation = np.abs(counts - NUM_SAMPLES * joint) - 1.0
        assert np.all(deviation <= 4.0 * np.sqrt(NUM_SAMPLES * joint * (1.0 - joint)))
        assert np.max(np.abs(joint - first[:, None] * joint.sum(0))) > 0.005  # the two are not independent


@every_policy
def test_entropy_is_that_of_the_probabilities(name):
    for env in PAIRS:
        joint, first, entropy = joint_probabilities(name, env)
        for a in np.flatnonzero(first):
            np.testing.assert_allclose(entropy[a, :, 0], entropy_in_nats(first), atol=1e-5)
            np.testing.assert_allclose(entropy[a, :, 1], entropy_in_nats(joint[a] / first[a]), atol=1e-5)


def entropy_in_nats(p):
    return -np.sum(p[p > 0] * np.log(p[p > 0]))


@every_policy
def test_appended_dead_agents_change_nothing(name):
    """One and two agents by themselves, and the same ones with dead agents after them; alone and in a batch."""
    team, pair, single = (results(name, what) for what in ("team", "pair", "single"))
    for method in ("sampled", "greedy", "evaluated"):
        for field, values in vars(team[method]).items():
            close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6, err_msg=f"{method}.{field}")
            close(values[PAIRS, :2], getattr(pair[method], field)[:, 0])
            close(values[4, :1], getattr(single[method], field))


@every_policy
def test_it_does_not_matter_which_agents_are_dead(name):
    """The same two agents in other places, their actions given, among other garbage: the same evaluation."""
    obs, _ = observe("team")
    places = np.array([[0, 1], [1, 3], [3, 4], [0, 4], [2, 3], [1, 2]])
    rows = np.arange(NUM_ENVS)[:, None]
    alive = np.zeros_like(ALIVE)
    alive[rows, places] = True
    scattered = make_observation(alive, seed=4)
    scattered = Observation(
        scattered.agents_view.at[rows, places].set(obs.agents_view[0, :2]),
        scattered.action_mask.at[rows, places].set(True),
        scattered.alive,
    )
    action = np.random.default_rng(0).integers(NUM_ACTIONS, size=ALIVE.shape)
    action[rows, places] = [2, 1]
    order = decision_order(scattered.alive)
    evaluation = evaluate(get_policy(name), scattered, jnp.asarray(action, jnp.int32), order)
    for values in jax.tree.leaves(evaluation):
        living = np.asarray(values)[rows, places]
        np.testing.assert_allclose(living, np.broadcast_to(living[0], living.shape), rtol=1e-5, atol=1e-6)


@every_policy
def test_environments_do_not_touch(name):
    """Environment 0 is the same, bit by bit, whatever happens in the others."""
    obs, keys = observe("team")
    others = make_observation(ALIVE, seed=7)
    mixed = jax.tree.map(lambda a, b: b.at[0].set(a[0]), obs, others)
    mixed_keys = jnp.concatenate([keys[:1], jax.random.split(jax.random.key(8), NUM_ENVS - 1)])
    result = all_methods(get_policy(name), mixed, mixed_keys)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(results(name, "team")), strict=True):
        np.testing.assert_array_equal(a[0], b[0])


@every_policy
def test_dead_agents_are_finite(name):
    for result in jax.tree.leaves((results(name, "team"), results(name, "pair"), results(name, "single"))):
        assert np.all(np.isfinite(result))


@every_policy
def test_no_parameter_is_dead(name):
    """Every row and column of every leaf has a part in log-probability, entropy or value."""
    batch, num_agents = 4, 9  # more agents than the convolution has taps, and all actions among the chosen
    rng = np.random.default_rng(0)
    view = rng.normal(size=(batch, num_agents, OBS_DIM)).astype(np.float32)
    weights = rng.normal(size=(3, batch, num_agents)).astype(np.float32)
    action = rng.integers(NUM_ACTIONS, size=(batch, num_agents)).astype(np.int32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    @jax.grad
    def gradient(policy, view, action, weights):
        alive, reset = jnp.ones((batch, num_agents), bool), jnp.zeros(batch, bool)
        obs = Observation(view, jnp.ones((*alive.shape, NUM_ACTIONS), bool), alive)
        result = policy.evaluate(policy.init_memory((batch,)), obs, action, decision_order(alive), reset)
        return sum(jnp.sum(w * v) for w, v in zip(weights, jax.tree.leaves(result), strict=True))

    leaves = jax.tree_util.tree_leaves_with_path(gradient(get_policy(name), view, action, weights))
    smallest = {
        jax.tree_util.keystr(path): min(
            np.min(np.max(np.abs(np.moveaxis(leaf, axis, 0).reshape(leaf.shape[axis], -1)), axis=-1))
            for axis in range(leaf.ndim)
        )
        for path, leaf in jax.device_get(leaves)
    }
    largest = max(np.max(np.abs(leaf)) for _, leaf in leaves)
    assert np.isfinite(largest)
    # Not zero: a parameter that cancels out has a gradient of rounding errors.
    assert not {leaf: size for leaf, size in smallest.items() if size < 1e-6 * largest}


@every_policy
def test_types_are_stable(name):
    """Nothing weakly typed or wider comes out, so results can be carried through loops and fed back."""
    policy, (obs, keys) = get_policy(name), observe("team")
    outputs = jax.eval_shape(run_all, policy, obs, keys)
    for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
        integer = path[-1] in (jax.tree_util.GetAttrKey("action"), jax.tree_util.GetAttrKey("order"))
        assert leaf.dtype == (jnp.int32 if integer else jnp.float32), path
        assert not leaf.weak_type, path
        assert leaf.shape == ALIVE.shape, path


@every_policy
def test_it_is_compiled_once(name):
    policy, (obs, keys) = get_policy(name), observe("team")
    output = all_methods(policy, obs, keys)["sampled"]
    evaluate(policy, obs, output.action, output.order)
    compiled = all_methods._cache_size(), evaluate._cache_size()
    policy = jax.tree.map(lambda leaf: leaf + 0.1, policy)
    output = all_methods(policy, make_observation(ALIVE, seed=5), jax.random.split(keys[0], NUM_ENVS))["sampled"]
    evaluate(policy, obs, output.action, output.order)
    assert (all_methods._cache_size(), evaluate._cache_size()) == compiled
