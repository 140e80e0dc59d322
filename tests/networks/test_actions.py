"""Action distributions against NumPy and SciPy in double precision; masks and limits."""

import functools
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mam.networks.actions import (
    LARGEST,
    ActionDistribution,
    Categorical,
    MultiCategorical,
    TanhNormal,
    add_logits,
    agent_noise,
    make_distribution,
    mask_noise,
)
from mam.types import EnvSpec

LOGITS = np.array(
    [[1.0, -2.0, 0.5, 3.0], [0.0, 40.0, -40.0, 1.0], [1e4, 0.0, -1e4, 0.0]], np.float32
)
MASK = np.array([[True, False, True, True], [True, True, True, True], [False, True, False, True]])
MEANS = np.array([-3.0, -1.0, -0.2, 0.0, 0.5, 2.0])  # of six actions, or of the components of one
STDS = np.array([0.05, 0.3, 0.5, 0.7, 0.9, 1.0])


def compiled(name):
    """A method of an action distribution, compiled, and its sum's gradient in kind and input."""

    def call(kind, out, *rest):
        return getattr(kind, name)(out, *rest)

    def total(*args):
        return call(*args).sum()

    return jax.jit(call), jax.jit(jax.grad(total, argnums=(0, 1)))


log_prob, log_prob_gradient = compiled("log_prob")
entropy, entropy_gradient = compiled("entropy")
sample, _ = compiled("sample_from_noise")
draw_noise = functools.partial(jax.jit, static_argnums=2)(agent_noise)
DISTRIBUTIONS = {
    "categorical": (Categorical(4), {}),
    "components": (MultiCategorical((3, 1)), {"action_components": (3, 1)}),
    "tanh_normal": (TanhNormal(4), {"continuous": True}),
}
every_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)


@every_distribution
def test_the_task_decides_the_distribution_and_it_owns_its_shapes(name):
    expected, options = DISTRIBUTIONS[name]
    spec = EnvSpec("suite/task", 2, 3, num_actions=4, time_limit=None, **options)
    made = make_distribution(spec)
    assert eqx.tree_equal(made, expected)
    assert isinstance(made, ActionDistribution)
    learned = [leaf.shape for leaf in jax.tree.leaves(made)]
    assert learned == [(4,)] * spec.continuous  # nothing but log_std
    outputs, mask = np.zeros((5, 2, made.num_outputs), np.float32), np.ones((5, 2, 4), bool)
    action = sample(
        made, outputs, mask, draw_noise(made, jax.random.split(jax.random.key(0), 5), 2)
    )
    assert (action.shape[1:], action.dtype) == (spec.joint_action.shape, spec.joint_action.dtype)
    assert (
        log_prob(made, outputs, mask, action).shape == entropy(made, outputs, mask).shape == (5, 2)
    )
    np.testing.assert_array_equal(made.equal(action, action), np.ones((5, 2), bool))
    token = made.token(action)
    assert token.shape == ((5, 2) if made.indexed else (5, 2, made.token_dim))


@pytest.mark.parametrize(
    ("kind", "distribution"),
    [
        (Categorical(4), stats.gumbel_r),
        (MultiCategorical((2, 2)), stats.gumbel_r),
        (TanhNormal(4), stats.norm),
    ],
    ids=["categorical", "components", "tanh_normal"],
)
def test_noise_belongs_to_the_agent(kind, distribution):
    keys = jax.random.split(jax.random.key(0), 300)
    noise = np.asarray(draw_noise(kind, keys, 5))
    assert (
        len(np.unique(noise)) > 0.999 * noise.size
    )  # no two agents, components or environments share any
    assert stats.kstest(noise.ravel(), distribution.cdf).pvalue > 0.05
    np.testing.assert_array_equal(draw_noise(kind, keys, 7)[:, :5], noise)  # however many there are
    np.testing.assert_array_equal(draw_noise(kind, keys[1], 5), noise[1])
    np.testing.assert_array_equal(
        draw_noise(kind, keys.reshape(10, 30), 5), noise.reshape(10, 30, 5, 4)
    )


def probabilities(logits, mask):
    legal = np.where(mask, logits.astype(np.float64), -np.inf)
    p = np.exp(legal - np.max(legal, axis=-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def all_log_probs(mask):
    """Of every choice: [3, A]."""
    rows = [np.broadcast_to(x[:, None], (3, 4, 4)) for x in (LOGITS, mask)]
    return np.asarray(log_prob(Categorical(4), *rows, np.tile(np.arange(4), (3, 1))))


def test_masked_probabilities():
    log_probs = all_log_probs(MASK)
    np.testing.assert_allclose(np.exp(log_probs), probabilities(LOGITS, MASK), atol=1e-6)
    np.testing.assert_array_equal(np.exp(log_probs)[~MASK], 0.0)  # exactly: never sampled
    assert np.all(np.isfinite(log_probs))


def test_a_forced_choice_has_no_log_prob_and_no_entropy():
    forced = np.arange(4) == np.array([[2], [0], [1]])
    np.testing.assert_array_equal(
        log_prob(Categorical(4), LOGITS, forced, np.array([2, 0, 1])), 0.0
    )
    np.testing.assert_array_equal(entropy(Categorical(4), LOGITS, forced), 0.0)


def test_entropy_is_that_of_the_legal_choices():
    p = probabilities(LOGITS, MASK)
    expected = -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)
    np.testing.assert_allclose(entropy(Categorical(4), LOGITS, MASK), expected, atol=1e-6)


def test_choices_are_as_frequent_as_their_probabilities_and_greedy_ones_the_likeliest():
    num = 4000
    logits, mask = (np.broadcast_to(x[:, None], (3, num, 4)) for x in (LOGITS, MASK))
    noise = np.asarray(draw_noise(Categorical(4), jax.random.split(jax.random.key(1), 3), num))
    chosen = np.asarray(sample(Categorical(4), logits, mask, noise))
    p = probabilities(LOGITS, MASK)
    counts = np.stack([np.bincount(row, minlength=4) for row in chosen])
    assert np.all(counts[p == 0.0] == 0)
    assert np.all(np.abs(counts - num * p) <= 1 + 4 * np.sqrt(num * p * (1 - p)))
    greedy = sample(Categorical(4), LOGITS, MASK, np.zeros_like(LOGITS))
    np.testing.assert_array_equal(greedy, p.argmax(axis=-1))
    assert greedy.dtype == chosen.dtype == np.int32


def test_illegal_choices_are_never_made_however_likely_they_would_be():
    """A million draws over random masks, with logits that all but insist on what is illegal."""
    rng = np.random.default_rng(0)
    shape = (1000, 1000, 4)
    mask = rng.random(shape) < 0.5
    mask[..., 0] |= ~mask.any(axis=-1)
    logits = np.where(mask, -100.0, 1e4).astype(np.float32)
    noise = np.asarray(draw_noise(Categorical(4), jax.random.split(jax.random.key(3), 1000), 1000))
    chosen = np.asarray(sample(Categorical(4), logits, mask, noise))
    assert chosen.size == 10**6
    assert np.take_along_axis(mask, chosen[..., None], axis=-1).all()


def test_gradients_are_finite_and_zero_for_illegal_choices():
    for _, gradient in (
        entropy_gradient(Categorical(4), LOGITS, MASK),
        log_prob_gradient(Categorical(4), LOGITS, MASK, np.array([3, 0, 1])),
    ):
        assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(np.asarray(gradient)[~MASK], 0.0)
        assert np.any(gradient != 0.0)


SIZES = (3, 1, 4)
# Of two agents: all is legal; in the last component only one choice is, and in the first not all.
MASKS = np.array([[1] * 8, [1, 0, 1, 1, 0, 0, 1, 0]], bool)


def test_components_are_independent_choices():
    """Log-probabilities and entropies of all joint choices, from those of each component."""
    outputs = np.random.default_rng(0).normal(0.0, 2.0, (2, 8)).astype(np.float32)
    joint = np.indices(SIZES).reshape(3, -1).T
    rows = [np.repeat(x[:, None], len(joint), axis=1) for x in (outputs, MASKS)]
    found = np.asarray(log_prob(MultiCategorical(SIZES), *rows, np.tile(joint, (2, 1, 1))))
    cuts = np.cumsum(SIZES)[:-1]
    parts = list(zip(*(np.split(x, cuts, axis=-1) for x in (outputs, MASKS)), strict=True))
    p = [probabilities(*part) for part in parts]
    expected = np.prod([p[k][:, joint[:, k]] for k in range(3)], axis=0)
    np.testing.assert_allclose(np.exp(found), expected, atol=1e-6)
    np.testing.assert_array_equal(np.exp(found)[expected == 0], 0.0)
    np.testing.assert_allclose(expected.sum(axis=1), 1.0)
    each = [-np.sum(x * np.log(np.where(x > 0, x, 1)), axis=-1) for x in p]
    np.testing.assert_allclose(
        entropy(MultiCategorical(SIZES), outputs, MASKS), np.sum(each, axis=0), atol=1e-6
    )


def test_samples_of_components_follow_their_probabilities():
    num, of = 4000, MultiCategorical(SIZES)
    outputs = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32)
    rows = [np.repeat(x[:, None], num, axis=1) for x in (outputs, MASKS)]
    noise = draw_noise(of, jax.random.split(jax.random.key(5), 2), num)
    chosen = np.asarray(sample(of, *rows, noise))
    p = np.exp(np.asarray(log_prob(of, *rows, chosen), np.float64))
    for agent in range(2):
        joint, index, counts = np.unique(
            chosen[agent], axis=0, return_index=True, return_counts=True
        )
        share = p[agent][index]
        assert len(joint) == (12, 2)[agent]
        np.testing.assert_allclose(share.sum(), 1.0, atol=1e-5)
        assert np.all(np.abs(counts - num * share) <= 1 + 4 * np.sqrt(num * share * (1 - share)))
    greedy = np.asarray(sample(of, outputs, MASKS, np.zeros_like(outputs)))
    np.testing.assert_array_equal(greedy[:, 1], 0)
    np.testing.assert_array_equal(greedy[0, 2], outputs[0, 4:].argmax())
    np.testing.assert_array_equal(greedy[1, 2], 2)


def test_components_are_read_one_hot_and_equal_as_a_whole():
    of, action = MultiCategorical(SIZES), jnp.array([[2, 0, 3], [0, 0, 3]])
    np.testing.assert_array_equal(
        of.token(action), [[0, 0, 1, 1, 0, 0, 0, 1], [1, 0, 0, 1, 0, 0, 0, 1]]
    )
    np.testing.assert_array_equal(of.equal(action, action.at[0, 0].set(0)), [False, True])


def test_logits_may_be_added_later():
    """As the kernel does it: to the bit what is masked at once, where nothing is legal, too."""
    rng = np.random.default_rng(0)
    logits, noise = (
        10 ** rng.uniform(-3, 4, (500, 4)) * rng.normal(size=(500, 4)) for _ in range(2)
    )
    logits, noise = (jnp.asarray(x, jnp.float32) for x in (logits, noise))
    mask = jnp.asarray(rng.random((500, 4)) < 0.4)
    chosen = np.argmax(add_logits(mask_noise(noise, mask), logits), axis=-1)
    np.testing.assert_array_equal(chosen, sample(Categorical(4), logits, mask, noise))
    assert not mask.any(axis=-1).all()


def tanh_normal(std):
    """With the given standard deviations."""
    std = np.asarray(std, np.float64)
    log_std = np.log(np.expm1(std))  # the inverse of softplus
    return eqx.tree_at(
        lambda kind: kind.log_std, TanhNormal(len(std)), jnp.asarray(log_std, jnp.float32)
    )


@dataclass(frozen=True)
class Exact:
    """tanh(μ + σ x), x normal, in double precision."""

    mean: np.ndarray
    std: np.ndarray

    def log_density(self, action):
        """Change of variables: the density of atanh(a) times d atanh(a) / da."""
        return stats.norm.logpdf(np.arctanh(action), self.mean, self.std) - np.log1p(-(action**2))

    def entropy(self):
        """E[−log π] as an integral over x, in steps far finer than anything that happens in it."""
        x = np.linspace(-10, 10, 20_001)[:, None]
        log_slope = -2 * np.log(np.cosh(self.mean + self.std * x))
        minus_log_density = -stats.norm.logpdf(x) + np.log(self.std) + log_slope
        return np.trapezoid(stats.norm.pdf(x) * minus_log_density, x, axis=0)


def test_the_standard_deviation_starts_at_softplus_of_zero():
    std = np.log(2.0)
    expected = Exact(0.3, std).log_density(np.array([0.1, -0.8]))
    actual = log_prob(
        TanhNormal(1),
        np.full((2, 1), 0.3, np.float32),
        np.ones((2, 1), bool),
        np.array([[0.1], [-0.8]]),
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def grid_log_prob(actions):
    """log π of every action on its own, under each of the six distributions: [actions, 6]."""
    actions = np.asarray(actions, np.float32)
    columns = []
    for mean, std in zip(MEANS, STDS, strict=True):
        out = np.full((len(actions), 1), mean, np.float32)
        columns.append(log_prob(tanh_normal([std]), out, np.ones_like(out, bool), actions[:, None]))
    return np.stack(columns, axis=1).astype(np.float64)


def test_log_prob_is_the_change_of_variables():
    actions = np.linspace(-0.999, 0.999, 501).astype(np.float32)
    expected = Exact(MEANS, STDS).log_density(actions[:, None].astype(np.float64))
    np.testing.assert_allclose(grid_log_prob(actions), expected, rtol=2e-4, atol=2e-4)


def test_the_density_integrates_to_one_and_samples_follow_it():
    """Over 20 cells of (−1, 1), each cut finely: shares against integrals of exp(log_prob)."""
    num, cells, fine = 4000, 20, 400
    edge = np.tanh(np.linspace(-6, 6, cells * fine + 1))
    edge[[0, -1]] = -LARGEST, LARGEST
    density = np.exp(grid_log_prob(edge))
    area = (density[1:] + density[:-1]) / 2 * np.diff(edge)[:, None]
    share = area.reshape(cells, fine, -1).sum(axis=1)
    np.testing.assert_allclose(share.sum(axis=0), 1.0, atol=2e-3)
    kind = tanh_normal(STDS)
    noise = draw_noise(kind, jax.random.key(2), num)
    samples = np.asarray(sample(kind, *rows(MEANS, num), noise))
    for column, expected in zip(samples.T, share.T, strict=True):
        counts = np.histogram(column, edge[::fine])[0]
        assert np.all(np.abs(counts - num * expected) <= 8 + 4 * np.sqrt(num * expected))


def rows(mean, num):
    """The means `num` times, and masks under which every component is in use."""
    mean = np.broadcast_to(np.asarray(mean, np.float32), (num, len(mean)))
    return mean, np.ones(mean.shape, bool)


def test_what_is_chosen_has_the_log_prob_of_its_noise():
    """log π(a) = Σ log N(ε) − log σ − log(1 − a²), sums over the components of one action."""
    kind = tanh_normal(STDS)
    out, mask = rows(MEANS, 1000)
    noise = np.asarray(draw_noise(kind, jax.random.key(3), 1000))
    action = sample(kind, out, mask, noise)
    x = out + STDS * noise.astype(np.float64)
    expected = stats.norm.logpdf(noise) - np.log(STDS) + 2 * np.log(np.cosh(x))
    np.testing.assert_allclose(action, np.tanh(x), atol=1e-6)
    np.testing.assert_allclose(
        log_prob(kind, out, mask, action), expected.sum(axis=-1), rtol=1e-3, atol=1e-2
    )


def test_greedy_actions_are_tanh_of_the_mean():
    out, mask = rows(MEANS, 1)
    np.testing.assert_allclose(
        sample(tanh_normal(STDS), out, mask, np.zeros_like(out)), np.tanh(out), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("std", "tolerance"), [(STDS, 2e-5), (np.full(6, 1.0), 2e-5), (np.full(6, 2.0), 3.2e-3)]
)
def test_entropy_is_the_integral(std, tolerance):
    out, _ = rows(MEANS, 6)
    actual = entropy(tanh_normal(std), out, np.eye(6, dtype=bool))  # one component at a time
    np.testing.assert_allclose(actual, Exact(MEANS, std).entropy(), rtol=0, atol=tolerance)


def test_entropy_is_the_mean_of_minus_log_prob():
    """The same by Monte Carlo, with the kind's own samples and log-probabilities."""
    kind, (out, mask) = tanh_normal(STDS), rows(MEANS, 20_000)
    action = sample(kind, out, mask, draw_noise(kind, jax.random.key(4), len(out)))
    information = -np.asarray(log_prob(kind, out, mask, action), np.float64)
    deviation = information.mean() - float(entropy(kind, out[:1], mask[:1])[0])
    assert abs(deviation) < 4 * information.std() / np.sqrt(len(out))


@pytest.mark.parametrize("what", ["log_prob", "entropy"])
def test_components_not_in_use_are_zero_and_count_for_nothing(what):
    """In value and in gradient, whatever the network puts out for them."""
    kind, used = tanh_normal(STDS), np.array([True, False, True, True, False, True])
    out, noise = (
        np.where(used, MEANS, 1e4).astype(np.float32),
        np.linspace(-2, 2, 6).astype(np.float32),
    )
    action = np.asarray(sample(kind, out, used, noise))
    np.testing.assert_array_equal(action == 0.0, ~used)
    value, gradient, rest = {
        "log_prob": (log_prob, log_prob_gradient, [action]),
        "entropy": (entropy, entropy_gradient, []),
    }[what]
    alone = value(tanh_normal(STDS[used]), out[used], used[used], *(x[used] for x in rest))
    np.testing.assert_allclose(value(kind, out, used, *rest), alone, rtol=1e-5)
    of_kind, of_out = gradient(kind, out, used, *rest)
    for g in (of_kind.log_std, of_out):
        assert np.all(np.isfinite(g))
        np.testing.assert_array_equal(np.asarray(g) != 0.0, used)


@pytest.mark.parametrize("mean", [0.0, 7.0, 30.0, -300.0])
@pytest.mark.parametrize("std", [1e-3, 1.0, 20.0])
def test_actions_at_the_limits_have_finite_log_probs_and_gradients(mean, std):
    kind, (out, mask) = tanh_normal([std] * 3), rows([mean] * 3, 1)
    action = sample(kind, out, mask, np.array([[-40.0, 0.0, 40.0]], np.float32))
    assert np.all(np.abs(action) <= LARGEST)
    numbers = (
        *(log_prob(kind, out, mask, action), log_prob_gradient(kind, out, mask, action)),
        *(entropy(kind, out, mask), entropy_gradient(kind, out, mask)),
    )
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(numbers))


def test_an_action_close_to_one_still_says_where_it_came_from():
    """d log N(x; μ, 1) / dμ is x at μ = 0, up to the limit: no gradient explodes there."""
    x = np.array([2.0, 5.0, 7.0, -7.0], np.float32)
    kind, (out, mask) = tanh_normal(np.ones(4)), rows(np.zeros(4), 1)
    _, slope = log_prob_gradient(kind, out, mask, sample(kind, out, mask, x[None]))
    np.testing.assert_allclose(slope[0], x, rtol=0.05)


KINDS = {"choice": Categorical(8), "components": MultiCategorical(SIZES), "real": TanhNormal(8)}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_divergence_is_the_mean_log_ratio_and_the_mode_what_greedy_actions_are(kind):
    """The mean is over samples of the first; masked parts count for nothing."""
    key, mask = jax.random.key(0), jnp.asarray(MASKS[1])
    one, other = jax.random.normal(key, (2, 8))
    first, second = kind.parameters(one, mask), kind.parameters(other, mask)
    noise = jax.vmap(kind.draw_noise)(jax.random.split(key, 20_000))
    actions = jax.vmap(lambda z: kind.sample_from_noise(one, mask, z))(noise)
    logs = [jax.vmap(lambda a, x=x: kind.log_prob(x, mask, a))(actions) for x in (one, other)]
    ratios = logs[0] - logs[1]
    divergence = kind.divergence(first, second, mask)
    np.testing.assert_allclose(divergence, ratios.mean(), atol=4 * ratios.std() / 20_000**0.5)
    np.testing.assert_allclose(kind.divergence(first, first, mask), 0, atol=1e-6)
    changed = kind.parameters(jnp.where(mask, other, 9.0), mask)
    np.testing.assert_allclose(kind.divergence(first, changed, mask), divergence, rtol=1e-5)
    greedy = kind.sample_from_noise(one, mask, jnp.zeros_like(noise[0]))
    np.testing.assert_allclose(kind.mode(first, mask), greedy, rtol=1e-6)
