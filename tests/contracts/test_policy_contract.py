"""What every policy must keep, on three kinds of task.

Parametrised by `policies()`: a new policy is covered as it is.

What concerns time is asked of some that read their last action, too.

One has choices, one continuous actions and an image for each agent, one several choices at once and
images that are scanned.
Single steps are evaluated time first, as rollouts of length 1, after a step that put something into
the memory of those policies that have one.
"""

import functools
import re
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import NetworkConfig, RecurrenceConfig
from mam.errors import UserError
from mam.learning.normalise import NormalisedPolicy, Statistics
from mam.networks.actions import LARGEST, agent_noise
from mam.networks.order import decision_order
from mam.networks.policy import has_memory, make_policy, policies
from mam.networks.sequence import SequencePolicy
from mam.types import EnvSpec, Observation, Policy

SIZES = NetworkConfig(d_model=8, num_heads=2, d_state=4, dt_rank=2)
OBS_DIM, NUM_ACTIONS, STATE_DIM = 6, 4, 3
# With a state, which the critics of mappo read: without one they are made for a number of agents.
KINDS = {
    "discrete": {"state_dim": STATE_DIM},
    "continuous": {"state_dim": STATE_DIM, "continuous": True, "grid_shape": (5, 4, 2)},
    "components": {
        "state_dim": STATE_DIM,
        "action_components": (2, 2),
        "grid_shape": (2, 3, 2),
    },
}
POOLED = ["rec_mat-pooled", "sable-pooled", "rec_mappo-pooled"]
NAMES = [*policies(), "mappo-plain", *POOLED]


def parts(name, config=SIZES):
    """What `make_policy` takes for a name: a policy's, and `-action` if it reads its last one.

    With `-clock` it counts steps, with `-plain` it has plain layers, with `-pooled` a
    critic that reads all.
    """
    policy, _, more = name.partition("-")
    # A convolution of two steps: that is how many the memory has seen where it is asked.
    recurrence = RecurrenceConfig(
        d_conv=2, last_action=more == "action", clock="on" if more == "clock" else "auto"
    )
    critic = "pooled" if more == "pooled" else "auto"
    plain = more == "plain"
    return policy, replace(config, recurrence=recurrence, critic=critic, plain=plain)


WITH_MEMORY = [
    name
    for name in (*NAMES, "mam2-action", "rec_ippo-action", "mat-clock")
    if has_memory(*parts(name))
]
every_policy = pytest.mark.parametrize("name", NAMES)
over_time = pytest.mark.parametrize(
    "name", [*WITH_MEMORY, "mat", "ippo"]
)  # to those without, time is like any axis
every_kind = pytest.mark.parametrize("kind", KINDS)
# What compiles. Several choices at once with one policy of each class: only distributions differ.
every_case = pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in NAMES
        for kind in KINDS
        if kind != "components" or name in ("rec_mat", "mappo")
    ],
)

# Which of five agents are alive, in six environments.
ALIVE = np.array(
    [
        [1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0],
        [0, 1, 0, 1, 1],
        [0, 0, 0, 1, 0],
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
    ]
)
ALIVE = ALIVE.astype(bool)
NUM_ENVS, NUM_AGENTS = ALIVE.shape
PAIRS = np.array([1, 5])  # environments in which the first two live
NUM_SAMPLES = 4000  # joint actions per observation, where frequencies are counted


def make_spec(kind, num_agents=NUM_AGENTS):
    return EnvSpec("suite/task", num_agents, OBS_DIM, NUM_ACTIONS, time_limit=None, **KINDS[kind])


def make(name, spec, key, config=SIZES):
    policy, config = parts(name, config)
    image = "scan2d" if spec.action_components else "cnn"
    return make_policy(policy, spec, replace(config, image=image), key=key)


@functools.cache
def get_policy(name, kind="discrete", num_agents=NUM_AGENTS):
    """A policy with large random parameters: under the initial ones agents hardly heed one another.

    Means of continuous actions stay away from the limits, where log-probabilities are ill-posed,
    and what a memory adds stays small beside what is seen, as in training: else it amplifies
    rounding. Units of plain layers are alive for somebody. With another critic it acts
    as with its own.
    """
    drawn = {}
    if name.endswith("-pooled"):
        other = get_policy(parts(name)[0], kind, num_agents)
        drawn = dict(jax.tree.leaves_with_path(other))
    spec = make_spec(kind, num_agents)
    empty = jax.eval_shape(lambda key: make(name, spec, key), jax.random.key(0))
    rng, clock_rng = np.random.default_rng(1), np.random.default_rng(2)

    def draw(path, leaf):
        if path in drawn and drawn[path].shape == leaf.shape:
            return drawn[path]
        if ".memory.dense." in jax.tree_util.keystr(path):  # a clock's; others are as without one
            return jnp.asarray(clock_rng.normal(0.0, 0.2, leaf.shape), leaf.dtype)
        centre, spread = (
            1.0 if path[-1].name == "scale" else 0.0,
            {1: 0.4, 2: 0.6, 4: 0.1}[leaf.ndim],
        )
        plain = name.endswith("-plain")
        if ".head.out." in jax.tree_util.keystr(path):
            if kind == "continuous":
                spread = 0.03 if plain else 0.1
        elif plain:
            centre, spread = 1.0 if path[-1].name == "bias" else 0.0, 0.4
        if re.search(r"\.memory(\.recurrence)*\.ssm\.out_proj", jax.tree_util.keystr(path)):
            spread *= 0.1
        return jnp.asarray(rng.normal(centre, spread, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, empty)


def is_sequence(name):
    """Whether agents decide one after another and heed each other's choices."""
    return isinstance(get_policy(name), SequencePolicy)


def cuts(kind):
    """Where one component's choices end and the next one's begin."""
    return np.cumsum(KINDS[kind].get("action_components", ()), dtype=int)[:-1]


def make_observation(alive, kind="discrete", seed=9):
    """Random views and masks for the living; the dead see garbage: large numbers or NaN."""
    rng = np.random.default_rng(seed)
    garbage = np.where(rng.random(alive.shape) < 0.5, 1e3, np.nan)

    def view(*shape):
        scale = np.where(alive, 1.0, garbage).reshape(*alive.shape, *(1 for _ in shape))
        return jnp.asarray(rng.normal(size=(*alive.shape, *shape)) * scale, jnp.float32)

    agents_view = view(OBS_DIM)
    mask = rng.random((*alive.shape, NUM_ACTIONS)) < 0.7
    for part in np.split(mask, cuts(kind), axis=-1):
        part[..., 1] |= ~part.any(axis=-1)
    grid_shape = KINDS[kind].get("grid_shape")
    return Observation(
        agents_view=agents_view,
        action_mask=jnp.asarray(mask),
        alive=jnp.asarray(alive),
        grid=None if grid_shape is None else view(*grid_shape),
        state=jnp.asarray(rng.normal(size=(*alive.shape[:-1], STATE_DIM)), jnp.float32),
    )


def pick(obs, envs, num_agents):
    """Some environments, and the first agents of them."""
    agents = jax.tree.map(lambda v: v[envs, :num_agents], replace(obs, state=None))
    return replace(agents, state=obs.state[envs])


@functools.cache
def observe(what, kind="discrete"):
    """An observation and its keys: of teams with dead agents, of two agents alone, of one."""
    obs, keys = make_observation(ALIVE, kind), jax.random.split(jax.random.key(0), NUM_ENVS)
    if what == "single":  # the living agent of environment 4, without a batch axis
        return pick(obs, 4, 1), keys[4]
    if (
        what == "pair"
    ):  # the living agents of environments 1 and 5, often, and the first time with the same keys
        obs = jax.tree.map(
            lambda v: jnp.repeat(v[:, None], NUM_SAMPLES, axis=1), pick(obs, PAIRS, 2)
        )
        many = jax.vmap(lambda key: jax.random.split(key, NUM_SAMPLES))(
            jax.random.split(jax.random.key(1), 2)
        )
        keys = many.at[:, 0].set(keys[PAIRS])
    return obs, keys


def remember(policy, obs):
    """The memory after a first step at which the same was seen."""
    batch = obs.alive.shape[:-1]
    blank = policy.init_memory(batch)
    if not jax.tree.leaves(blank):
        return blank
    keys = jnp.broadcast_to(jax.random.key(0), batch)
    return policy.act(blank, obs, jnp.ones(batch, bool), keys, greedy=True)[0]


def evaluate_step(policy, memory, obs, action, order):
    """`policy.evaluate` of one step."""
    steps = jax.tree.map(lambda v: v[None], (obs, action, order, jnp.zeros(order.shape[:-1], bool)))
    return jax.tree.map(lambda v: v[0], policy.evaluate(memory, *steps))


def act_then_evaluate(policy, obs, key):
    memory = remember(policy, obs)
    _, sampled = policy.act(memory, obs, jnp.zeros(key.shape, bool), key)
    return {
        "sampled": sampled,
        "evaluated": evaluate_step(policy, memory, obs, sampled.action, sampled.order),
    }


def run_all(policy, obs, key):
    memory = remember(policy, obs)
    _, greedy = policy.act(memory, obs, jnp.zeros(key.shape, bool), key, greedy=True)
    return act_then_evaluate(policy, obs, key) | {
        "greedy": greedy,
    }


all_methods = jax.jit(run_all)
two_methods = jax.jit(act_then_evaluate)
draw_noise = jax.jit(agent_noise, static_argnums=2)


@jax.jit
def evaluate(policy, obs, action, order):
    return evaluate_step(policy, remember(policy, obs), obs, action, order)


@jax.jit
def evaluate_first_step(policy, obs, action, order):
    return evaluate_step(policy, policy.init_memory(order.shape[:-1]), obs, action, order)


@functools.cache
def results(name, what, kind="discrete"):
    obs, keys = observe(what, kind)
    run = all_methods if what == "team" else two_methods
    return jax.device_get(run(get_policy(name, kind, obs.alive.shape[-1]), obs, keys))


def evaluate_env(name, obs, env, actions, order, kind="discrete"):
    """`evaluate` of any number of joint actions in one environment."""
    obs = jax.tree.map(lambda v: jnp.broadcast_to(v[env], (NUM_ENVS, *v.shape[1:])), obs)
    order = jnp.broadcast_to(jnp.asarray(order, jnp.int32), (NUM_ENVS, NUM_AGENTS))
    padded = np.pad(actions, [(0, -len(actions) % NUM_ENVS), *[(0, 0)] * (actions.ndim - 1)])
    dtype = make_spec(kind).joint_action.dtype
    parts = [
        jax.device_get(evaluate(get_policy(name, kind), obs, jnp.asarray(part, dtype), order))
        for part in np.split(padded, len(padded) // NUM_ENVS)
    ]
    return jax.tree.map(lambda *values: np.concatenate(values)[: len(actions)], *parts)


def test_unknown_name():
    with pytest.raises(UserError, match="unknown policy 'mamm': did you mean mam"):
        make_policy("mamm", make_spec("discrete"), SIZES, key=jax.random.key(0))


@every_policy
@every_kind
def test_it_is_a_policy_of_arrays(name, kind):
    def build(key):
        policy = make(name, make_spec(kind), key)
        assert isinstance(policy, Policy)
        assert all(
            isinstance(leaf, jax.Array)
            for leaf in jax.tree.leaves((policy, policy.init_memory((2,))))
        )
        return policy

    jax.eval_shape(build, jax.random.key(0))


@every_policy
@pytest.mark.parametrize("what", ["single", "pair"])
def test_evaluate_repeats_act_of_few(name, what):
    assert_repeated(results(name, what))


@every_case
def test_evaluate_repeats_act(name, kind):
    """So the probability ratio starts at 1."""
    assert_repeated(results(name, "team", kind))


def assert_repeated(result):
    sampled, evaluated = result["sampled"], result["evaluated"]
    np.testing.assert_allclose(evaluated.log_prob, sampled.log_prob, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(evaluated.value, sampled.value, rtol=1e-5, atol=1e-5)


@every_case
def test_the_value_is_one_whoever_asks(name, kind):
    result = results(name, "team", kind)
    for value in (result["evaluated"].value, result["greedy"].value):
        np.testing.assert_allclose(value, result["sampled"].value, rtol=1e-5, atol=1e-5)


@jax.jit
def in_new_units(policy, obs, target):
    """Values before and after two changes of their units; only the second has values to keep."""
    memory = remember(policy, obs)
    policy = NormalisedPolicy(
        policy, Statistics.init(make_spec("discrete"), observations=True, values=True)
    )
    first = policy.update_values(target, obs.alive)
    second = first.update_values(100 * target - 1000, obs.alive)
    keys = jax.random.split(jax.random.key(0), NUM_ENVS)

    def value(policy):
        return policy.act(memory, obs, jnp.zeros(NUM_ENVS, bool), keys)[1].value

    return value(first), value(second), value(second.network)


@every_policy
def test_new_units_of_value_change_no_value(name):
    obs, _ = observe("team")
    target = np.random.default_rng(3).normal(5.0, 3.0, ALIVE.shape).astype(np.float32)
    before, after, in_units = in_new_units(get_policy(name), obs, np.where(ALIVE, target, np.nan))
    np.testing.assert_allclose(
        after[ALIVE], before[ALIVE], rtol=1e-5, atol=1e-3
    )  # beside targets of 1000
    assert np.abs(before - in_units)[ALIVE].max() > 1


@jax.jit
def act_and_evaluate(policy, obs, reset, keys, successor):
    """Acting step by step, from a memory that is not blank; all steps at once; and `value`."""
    start = jax.tree.map(
        lambda leaf: leaf + 0.5 if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf,
        policy.init_memory(reset.shape[1:]),
    )

    def step(memory, inputs):
        obs, reset, key, successor = inputs
        after, output = policy.act(memory, obs, reset, key)
        return after, {
            "act": output,
            "memory": (after, policy.follow(memory, obs, output.action, output.order, reset)),
            "value": policy.act(memory, obs, jnp.zeros_like(reset), key)[1].value,
            "next_value": policy.act(after, successor, jnp.zeros_like(reset), key)[1].value,
        }

    _, steps = jax.lax.scan(step, start, (obs, reset, keys, successor))
    evaluated = policy.evaluate(start, obs, steps["act"].action, steps["act"].order, reset)
    return (
        steps,
        evaluated,
        policy.successor_values(start, obs, steps["act"].action, reset, successor),
    )


@functools.cache
def play(name, *, garbage=True):
    """Four steps in which episodes start and agents die anywhere, each with its own successor."""
    length = 4
    obs, successor = (
        make_observation(
            np.random.default_rng(seed).random((length, *ALIVE.shape)) < 0.7, seed=seed
        )
        for seed in (1, 3)
    )
    reset = np.random.default_rng(2).random((length, NUM_ENVS)) < 0.4
    keys = jax.random.split(jax.random.key(2), (length, NUM_ENVS))
    if not garbage:
        obs, successor = (
            replace(o, agents_view=jnp.where(o.alive[..., None], o.agents_view, 0.0))
            for o in (obs, successor)
        )
    return (
        obs,
        reset,
        *jax.device_get(act_and_evaluate(get_policy(name), obs, reset, keys, successor)),
    )


@over_time
def test_evaluate_repeats_act_over_time(name):
    """Wherever episodes start, at the first step or not."""
    _, _, steps, evaluated, _ = play(name)
    np.testing.assert_allclose(evaluated.log_prob, steps["act"].log_prob, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(evaluated.value, steps["act"].value, rtol=1e-5, atol=1e-5)


@over_time
def test_a_policy_that_follows_remembers_what_one_that_acts_does(name):
    _, _, steps, *_ = play(name)
    for acted, followed in zip(*map(jax.tree.leaves, steps["memory"]), strict=True):
        np.testing.assert_allclose(followed, acted, rtol=1e-5, atol=1e-5)


@over_time
def test_over_time_nobody_sees_what_the_dead_see(name):
    """Not even they, when they live again."""
    _, _, *results = play(name)
    jax.tree.map(np.testing.assert_array_equal, [*play(name, garbage=False)[2:]], results)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


@over_time
def test_a_value_continues_the_episode(name):
    """So where one starts, a policy with memory may value the same observation otherwise."""
    obs, reset, steps, _, _ = play(name)
    close = np.abs(steps["value"] - steps["act"].value) < 1e-5
    assert close[~reset].all()
    # The critic beside one whose mixers remember reads what they do not.
    forgets = name not in WITH_MEMORY or name == "sable-pooled"
    assert close[reset & np.asarray(obs.alive).any(-1)].all() == forgets


@over_time
def test_successors_are_valued_without_a_stored_memory(name):
    """By the memory after every step, whether the episode goes on or not."""
    _, _, steps, _, next_value = play(name)
    np.testing.assert_allclose(
        next_value, steps["next_value"], rtol=1e-5, atol=5e-5
    )  # sums in another order


@jax.jit
def gradient_norm(policy, obs):
    """Of all that is learned from one step."""
    order = decision_order(obs.alive)

    def loss(policy):
        action = jnp.argmax(obs.action_mask, axis=-1).astype(jnp.int32)
        evaluation = evaluate_step(policy, policy.init_memory(order.shape[:-1]), obs, action, order)
        return jnp.sum(jnp.where(obs.alive, evaluation.log_prob + evaluation.value, 0.0))

    leaves = jax.tree.leaves(jax.grad(loss)(policy))
    return jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in leaves))


@every_policy
def test_equal_features_do_not_make_gradients_explode(name):
    """An agent that sees nothing, in new networks of two blocks, whose other biases are zero."""
    obs, sizes = make_observation(ALIVE), replace(SIZES, num_blocks=2)
    policy = make(name, make_spec("discrete"), jax.random.key(0), sizes)
    usual = gradient_norm(policy, obs)
    flat = replace(obs, agents_view=obs.agents_view.at[:, 1].set(0.0))
    assert gradient_norm(policy, flat) < 3 * usual


@every_policy
def test_the_living_decide_first_and_by_index(name):
    """Where all decide at once, the order means nothing and is that of the agents."""
    expected = [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4],
        [1, 3, 4, 0, 2],
        [3, 0, 1, 2, 4],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4],
    ]
    np.testing.assert_array_equal(decision_order(jnp.asarray(ALIVE)), expected)
    if not is_sequence(name):
        expected = np.tile(np.arange(NUM_AGENTS), (NUM_ENVS, 1))
    np.testing.assert_array_equal(results(name, "team")["sampled"].order, expected)


@every_policy
@pytest.mark.parametrize("mode", ["sampled", "greedy"])
def test_acting_is_the_gumbel_max_of_the_evaluated_probabilities(name, mode):
    """Agent after agent, action = argmax(log π(· | earlier actions) + its noise, if sampled)."""
    obs, keys = observe("team")
    output = results(name, "team")[mode]
    candidates = np.arange(NUM_ACTIONS)
    for env in range(NUM_ENVS):
        noise = draw_noise(get_policy(name).distribution, keys[env], NUM_AGENTS) * (
            mode == "sampled"
        )
        chosen = np.zeros(NUM_AGENTS, int)
        for agent in output.order[env]:
            actions = np.tile(chosen, (NUM_ACTIONS, 1))
            actions[:, agent] = candidates
            log_probs = evaluate_env(name, obs, env, actions, output.order[env]).log_prob[:, agent]
            chosen[agent] = np.argmax(log_probs + noise[agent])
            np.testing.assert_allclose(
                log_probs[chosen[agent]], output.log_prob[env, agent], atol=1e-5
            )
            np.testing.assert_allclose(np.sum(np.exp(log_probs)), 1.0, atol=1e-5)
        np.testing.assert_array_equal(chosen, output.action[env])


@every_policy
def test_continuous_acting_uses_the_noise_of_the_agent(name):
    """log π(a) = Σ log N(ε) − log σ − log(1 − a²) over components in use; ε = 0 if greedy."""
    obs, keys = observe("team", "continuous")
    normal, result = (
        get_policy(name, "continuous").distribution,
        results(name, "team", "continuous"),
    )
    noise = np.asarray(draw_noise(normal, keys, NUM_AGENTS), np.float64)
    log_std = np.log(np.log1p(np.exp(np.asarray(normal.log_std, np.float64))))
    for mode, epsilon in (("sampled", noise), ("greedy", np.zeros_like(noise))):
        action = result[mode].action.astype(np.float64)
        terms = -0.5 * epsilon**2 - 0.5 * np.log(2 * np.pi) - log_std - np.log1p(-(action**2))
        expected = np.sum(terms, axis=-1, where=np.asarray(obs.action_mask))
        clear = np.all(np.abs(action) < 0.9999, axis=-1)  # of the limit, where rounding tells
        assert clear.mean() > 0.9
        np.testing.assert_allclose(
            result[mode].log_prob[clear], expected[clear], rtol=1e-2, atol=1e-2
        )


@every_policy
def test_components_not_in_use_are_zero(name):
    mask = np.asarray(observe("team", "continuous")[0].action_mask)
    for mode in ("sampled", "greedy"):
        np.testing.assert_array_equal(results(name, "team", "continuous")[mode].action != 0.0, mask)


@every_policy
def test_illegal_actions_have_no_probability(name):
    obs, _ = observe("team")
    mask, order = np.asarray(obs.action_mask), decision_order(obs.alive)
    illegal = np.argmin(mask, axis=-1)
    log_prob = evaluate(get_policy(name), obs, jnp.asarray(illegal, jnp.int32), order).log_prob
    is_illegal = ~np.take_along_axis(mask, illegal[..., None], axis=-1)[..., 0]
    assert is_illegal.sum() > 10
    np.testing.assert_array_equal(np.exp(log_prob)[is_illegal], 0.0)
    for what, mode in (
        ("single", "sampled"),
        ("pair", "sampled"),
        ("team", "sampled"),
        ("team", "greedy"),
    ):
        mask, action = np.asarray(observe(what)[0].action_mask), results(name, what)[mode].action
        assert np.all(np.take_along_axis(mask, action[..., None], axis=-1))


@pytest.mark.parametrize(
    ("name", "kind", "order"),
    [
        *((name, "discrete", [0, 1, 2, 3, 4]) for name in NAMES),
        *((name, kind, [3, 0, 4, 2, 1]) for name in NAMES for kind in ("discrete", "continuous")),
        *((name, "components", [3, 0, 4, 2, 1]) for name in ("rec_mat", "mappo")),
    ],
)
def test_later_agents_answer_earlier_ones(name, kind, order):
    """Changing an agent's action changes what later agents do, and nothing of the earlier ones.

    Among independent agents it changes nothing.
    """
    obs, _ = observe("team", kind)
    view = np.random.default_rng(4).normal(size=obs.agents_view.shape)
    obs = replace(obs, agents_view=jnp.asarray(view, jnp.float32))
    obs = replace(obs, action_mask=jnp.ones_like(obs.action_mask), alive=jnp.ones_like(obs.alive))
    changed = np.concatenate([np.zeros((1, NUM_AGENTS), int), np.eye(NUM_AGENTS, dtype=int)])
    if kind == "continuous":
        changed = changed[..., None] * np.array([0.5, -0.9, 0.7, 0.2])
    if kind == "components":
        changed = changed[..., None] * np.array([0, 1])
    evaluation = evaluate_env(name, obs, 0, changed, order, kind)
    for place, agent in enumerate(order):
        before, after = order[:place], order[place + 1 :]
        if not is_sequence(name):
            before, after = before + after, []
        base, other = (
            jax.tree.map(lambda v, row=row: v[row], evaluation) for row in (0, 1 + agent)
        )
        np.testing.assert_allclose(other.value, base.value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            other.log_prob[before], base.log_prob[before], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            other.entropy[[*before, agent]], base.entropy[[*before, agent]], rtol=1e-5, atol=1e-6
        )
        assert np.all(np.abs(other.log_prob[after] - base.log_prob[after]) > 1e-4)


@every_policy
def test_the_key_decides_samples_and_nothing_else(name):
    obs, keys = observe("team")
    first = results(name, "team")
    again = all_methods(get_policy(name), obs, keys)
    other = jax.device_get(
        all_methods(get_policy(name), obs, jax.random.split(jax.random.key(9), NUM_ENVS))
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, again, first))
    assert jax.tree.all(jax.tree.map(np.array_equal, other["greedy"], first["greedy"]))
    assert np.any(other["sampled"].action != first["sampled"].action)


@functools.cache
def joint_probabilities(name, env):
    """Every joint action of the two living agents, evaluated.

    Returns π(a₁, a₂) [A, A], π(a₁) [A], and entropies [A, A, 2].
    """
    pairs = np.indices((NUM_ACTIONS, NUM_ACTIONS)).reshape(2, -1).T
    actions = np.pad(pairs, [(0, 0), (0, NUM_AGENTS - 2)])
    evaluation = evaluate_env(name, observe("team")[0], env, actions, np.arange(NUM_AGENTS))
    log_prob, entropy = (
        v[:, :2].reshape(NUM_ACTIONS, NUM_ACTIONS, 2).astype(float)
        for v in (evaluation.log_prob, evaluation.entropy)
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
        # Of the second agent on the first, relative: its choice may be all but certain.
        second = (joint / np.maximum(first, 1e-30)[:, None])[first > 1e-3]
        second = second[:, second.max(axis=0) > 1e-6]
        dependence = np.max(np.ptp(second, axis=0) / second.max(axis=0))
        assert dependence > 0.1 if is_sequence(name) else dependence < 1e-3


@every_policy
def test_entropy_is_that_of_the_probabilities(name):
    for env in PAIRS:
        joint, first, entropy = joint_probabilities(name, env)
        for a in np.flatnonzero(first):
            np.testing.assert_allclose(entropy[a, :, 0], entropy_in_nats(first), atol=1e-5)
            np.testing.assert_allclose(
                entropy[a, :, 1], entropy_in_nats(joint[a] / first[a]), atol=1e-5
            )


def entropy_in_nats(p):
    return -np.sum(p[p > 0] * np.log(p[p > 0]))


@every_policy
@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_appended_dead_agents_change_nothing(name, kind):
    """One and two agents alone, and with dead agents after them; by themselves and in a batch."""
    team, single = (results(name, what, kind) for what in ("team", "single"))
    pair = results(name, "pair") if kind == "discrete" else None
    for method in single:
        for field, values in vars(team[method]).items():
            if field == "metrics":
                continue
            close = functools.partial(
                np.testing.assert_allclose, rtol=1e-5, atol=1e-6, err_msg=f"{method}.{field}"
            )
            close(values[4, :1], getattr(single[method], field))
            if pair:
                close(values[PAIRS, :2], getattr(pair[method], field)[:, 0])


@every_policy
def test_it_does_not_matter_which_agents_are_dead(name):
    """The same two agents in other places, with given actions, among other garbage."""
    obs, _ = observe("team")
    places = np.array([[0, 1], [1, 3], [3, 4], [0, 4], [2, 3], [1, 2]])
    rows = np.arange(NUM_ENVS)[:, None]
    alive = np.zeros_like(ALIVE)
    alive[rows, places] = True
    scattered = make_observation(alive, seed=4)
    scattered = replace(
        scattered,
        agents_view=scattered.agents_view.at[rows, places].set(obs.agents_view[0, :2]),
        action_mask=scattered.action_mask.at[rows, places].set(True),
        state=jnp.broadcast_to(obs.state[0], obs.state.shape),
    )
    action = np.random.default_rng(0).integers(NUM_ACTIONS, size=ALIVE.shape)
    action[rows, places] = [2, 1]
    order = decision_order(scattered.alive)
    evaluation = evaluate(get_policy(name), scattered, jnp.asarray(action, jnp.int32), order)
    for values in jax.tree.leaves(evaluation):
        living = np.asarray(values)[rows, places]
        np.testing.assert_allclose(
            living, np.broadcast_to(living[0], living.shape), rtol=1e-5, atol=1e-6
        )


@every_policy
@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(names=st.permutations(range(NUM_AGENTS)), seed=st.integers(0, 2**16))
def test_agents_may_be_called_otherwise(name, names, seed):
    """Agents under other numbers, in the same order: the same evaluation, renumbered."""
    obs, names, order = (
        make_observation(ALIVE, seed=seed),
        np.array(names),
        decision_order(jnp.asarray(ALIVE)),
    )
    action = jnp.asarray(
        np.random.default_rng(seed).integers(NUM_ACTIONS, size=ALIVE.shape), jnp.int32
    )
    renamed = replace(
        jax.tree.map(lambda v: v[:, names], replace(obs, state=None)), state=obs.state
    )
    new_order = jnp.asarray(np.argsort(names)[np.asarray(order)], jnp.int32)
    # A team's memory is also of the order of earlier steps, which names decide.
    run = evaluate_first_step if parts(name)[0] == "sable" else evaluate
    expected = run(get_policy(name), obs, action, order)
    found = run(get_policy(name), renamed, action[:, names], new_order)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        alive = ALIVE[:, names]
        np.testing.assert_allclose(
            np.asarray(a)[alive], np.asarray(b)[:, names][alive], rtol=1e-5, atol=1e-5
        )


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


@every_case
def test_dead_agents_are_finite(name, kind):
    for result in jax.tree.leaves(results(name, "team", kind)):
        assert np.all(np.isfinite(result))


@jax.jit
@jax.grad
def gradient(policy, obs, action, weights):
    """Of a weighted sum of all that `evaluate` says of two steps, in the policy."""
    memory, reset = policy.init_memory(obs.alive.shape[1:-1]), jnp.zeros(obs.alive.shape[:-1], bool)
    result = policy.evaluate(memory, obs, action, decision_order(obs.alive), reset)
    found = (result.log_prob, result.entropy, result.value)
    return sum(jnp.sum(w * v) for w, v in zip(weights, found, strict=True))


@every_case
def test_no_parameter_is_dead(name, kind):
    """Every row and column of every leaf matters to an output; no gradient is NaN.

    Some agents are dead and see NaN, some components are not in use, and some actions are as large
    as they can be.
    """
    steps, num_envs, num_agents = 2, 8, 9  # more agents than the convolution has taps
    rng = np.random.default_rng(0)
    alive = np.arange(num_agents) < rng.integers(5, num_agents + 1, num_envs)[:, None]
    alive = np.broadcast_to(alive, (steps, num_envs, num_agents))
    obs = make_observation(alive, kind)
    weights = rng.normal(size=(3, *alive.shape)).astype(np.float32) * alive
    if kind == "continuous":
        action = np.tanh(rng.normal(0.0, 3.0, (*alive.shape, NUM_ACTIONS))) * obs.action_mask
        action = jnp.clip(jnp.asarray(action, jnp.float32), -LARGEST, LARGEST)
        assert np.max(action) == np.float32(LARGEST)
    else:
        scores = np.split(obs.action_mask + rng.random(obs.action_mask.shape), cuts(kind), axis=-1)
        choices = jnp.stack(
            [jnp.argmax(part, axis=-1).astype(jnp.int32) for part in scores], axis=-1
        )
        action = choices if kind == "components" else choices[..., 0]
    leaves = gradient(get_policy(name, kind, num_agents), obs, action, weights)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(leaves))
    smallest = {
        jax.tree_util.keystr(path): min(
            np.min(
                np.max(np.abs(np.moveaxis(leaf, axis, 0).reshape(leaf.shape[axis], -1)), axis=-1)
            )
            for axis in range(leaf.ndim)
        )
        for path, leaf in leaves
    }
    # Not zero: a parameter that cancels out has a gradient of rounding errors, as large as those of
    # what it is computed with. A network for values alone is computed by itself.
    for of_values in (True, False):
        part = {
            jax.tree_util.keystr(path): np.max(np.abs(leaf))
            for path, leaf in leaves
            if (path[0].name == "tower") == of_values
        }
        largest = max(part.values(), default=0.0)
        assert np.isfinite(largest)
        assert not {leaf: smallest[leaf] for leaf in part if not smallest[leaf] >= 1e-7 * largest}


@every_policy
@every_kind
def test_types_are_stable(name, kind):
    """Nothing weakly typed or wider comes out, so results can be loop carries."""
    policy, (obs, keys) = get_policy(name, kind), observe("team", kind)
    outputs = jax.eval_shape(run_all, policy, obs, keys)
    for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
        field, of_agents = (
            getattr(path[-1], "name", None),
            jax.ShapeDtypeStruct(ALIVE.shape[1:], jnp.float32),
        )
        special = {
            "action": make_spec(kind).joint_action,
            "order": of_agents.update(dtype=jnp.int32),
            "distribution": of_agents.update(shape=(*of_agents.shape, leaf.shape[-1])),
        }
        expected = special.get(field, of_agents)
        assert (leaf.shape, leaf.dtype) == ((NUM_ENVS, *expected.shape), expected.dtype), path
        assert not leaf.weak_type, path
    memory = policy.init_memory((NUM_ENVS,))
    after = jax.eval_shape(policy.act, memory, obs, jnp.zeros(NUM_ENVS, bool), keys)[0]
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(lambda: memory)
    )


@every_policy
def test_it_is_compiled_once(name):
    policy, (obs, keys) = get_policy(name), observe("team")
    output = all_methods(policy, obs, keys)["sampled"]
    evaluate(policy, obs, output.action, output.order)
    compiled = all_methods._cache_size(), evaluate._cache_size()
    policy = jax.tree.map(lambda leaf: leaf + 0.1, policy)
    output = all_methods(
        policy, make_observation(ALIVE, seed=5), jax.random.split(keys[0], NUM_ENVS)
    )["sampled"]
    evaluate(policy, obs, output.action, output.order)
    assert (all_methods._cache_size(), evaluate._cache_size()) == compiled
