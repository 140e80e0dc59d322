"""The PPO loss: a NumPy implementation, the relations that define it, and the uncounted dead."""

from functools import partial

import jax
import numpy as np
import pytest

from mam.learning.ppo import ppo_loss
from mam.types import Evaluation

COEFFICIENTS = {"clip_eps": 0.2, "ent_coef": 0.03, "vf_coef": 0.7}
NAMES = (
    "log_prob",
    "entropy",
    "value",
    "old_log_prob",
    "old_value",
    "advantage",
    "target",
    "alive",
)
SHAPE = (64, 4)


def losses_of(numbers, **coefficients):
    """`ppo_loss` on a dictionary of arrays."""
    new = Evaluation(*(numbers[name] for name in ("log_prob", "entropy", "value")))
    rest = (numbers[name] for name in NAMES[3:])
    return ppo_loss(new, *rest, **(COEFFICIENTS | coefficients))


@partial(jax.jit, static_argnames=("part", "clip_eps", "ent_coef", "vf_coef"))
def _losses_and_gradients(numbers, part, **coefficients):
    learned = {name: numbers[name] for name in ("log_prob", "entropy", "value")}

    def of(learned):
        losses = losses_of(numbers | learned, **coefficients)
        return getattr(losses, part), losses

    gradients, losses = jax.grad(of, has_aux=True)(learned)
    return losses, gradients


def losses_and_gradients(numbers, part="loss", **coefficients):
    """All parts, and the gradient of one with respect to what the policy computes."""
    return jax.device_get(_losses_and_gradients(numbers, part, **coefficients))


def make_numbers(alive_probability=0.7, seed=0):
    rng = np.random.default_rng(seed)
    numbers = {name: rng.normal(size=SHAPE).astype(np.float32) for name in NAMES[:-1]}
    numbers["old_log_prob"] = (
        numbers["log_prob"] + 0.3 * numbers["old_log_prob"]
    )  # ratios on both sides of the clip
    numbers["value"] = numbers["old_value"] + 0.3 * numbers["value"]
    return numbers | {"alive": rng.random(SHAPE) < alive_probability}


@pytest.fixture(scope="module")
def numbers():
    return make_numbers()


def in_numpy(numbers, clip_eps, ent_coef, vf_coef):
    """Equations 7 and 9 of PPO on the living, who are picked out first: float64, no masks."""
    living = {name: x[numbers["alive"]].astype(np.float64) for name, x in numbers.items()}
    advantage = (living["advantage"] - living["advantage"].mean()) / living["advantage"].std()
    ratio = np.exp(living["log_prob"] - living["old_log_prob"])
    clipped = np.clip(ratio, 1 - clip_eps, 1 + clip_eps)
    policy_loss = -np.minimum(ratio * advantage, clipped * advantage).mean()
    near = np.clip(living["value"], living["old_value"] - clip_eps, living["old_value"] + clip_eps)
    errors = [(value - living["target"]) ** 2 for value in (living["value"], near)]
    value_loss = np.maximum(*errors).mean() / 2
    entropy = living["entropy"].mean()
    return {
        "loss": policy_loss - ent_coef * entropy + vf_coef * value_loss,
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "approx_kl": (ratio - 1 - np.log(ratio)).mean(),
        "clip_fraction": (np.abs(ratio - 1) > clip_eps).mean(),
        "ratio_deviation": np.abs(ratio - 1).max(),
    }


@pytest.mark.parametrize("alive_probability", [1.0, 0.7, 0.1])
def test_equals_numpy(alive_probability):
    numbers = make_numbers(alive_probability)
    losses, _ = losses_and_gradients(numbers)
    expected = in_numpy(numbers, **COEFFICIENTS)
    assert set(losses.__dataclass_fields__) == set(expected)
    for name, value in expected.items():
        assert getattr(losses, name) == pytest.approx(value, rel=2e-6, abs=1e-7), name
    assert 0.1 < losses.clip_fraction < 0.9  # both branches were taken


def test_at_ratio_one_the_loss_is_the_policy_gradient(numbers):
    """The loss is minus the mean normalised advantage, zero; its gradient −advantage / count."""
    same = numbers | {"old_log_prob": numbers["log_prob"]}
    losses, gradients = losses_and_gradients(same, "policy_loss")
    assert losses.policy_loss == pytest.approx(0, abs=1e-6)
    assert (losses.approx_kl, losses.clip_fraction, losses.ratio_deviation) == (0, 0, 0)
    alive = numbers["alive"]
    living = numbers["advantage"][alive].astype(np.float64)
    expected = np.zeros(SHAPE)
    expected[alive] = -(living - living.mean()) / living.std() / alive.sum()
    np.testing.assert_allclose(gradients["log_prob"], expected, atol=1e-7)


@pytest.mark.parametrize("garbage", [-1e30, 1e30, 1e4, "mixed"])
def test_the_dead_contribute_nothing(numbers, garbage):
    """Defect 8. Whatever a dead agent's numbers are, loss and gradient stay the same to the bit."""
    alive = numbers["alive"]
    rng = np.random.default_rng(1)

    def fill(with_garbage):
        filled = {"alive": alive}
        for name in NAMES[:-1]:
            dead = rng.choice([-1e30, 1e30], SHAPE) if garbage == "mixed" else garbage
            filled[name] = np.where(alive, numbers[name], dead if with_garbage else 0).astype(
                np.float32
            )
        return filled

    clean, dirty = (losses_and_gradients(fill(with_garbage)) for with_garbage in (False, True))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    for gradient in clean[1].values():
        np.testing.assert_array_equal(gradient[~alive], 0)
        assert np.isfinite(gradient).all()
    assert not any((gradient[alive] == 0).all() for gradient in clean[1].values())


def test_without_a_living_agent_there_is_nothing_to_learn(numbers):
    losses, gradients = losses_and_gradients(numbers | {"alive": np.zeros(SHAPE, bool)})
    assert not any(jax.tree.leaves(losses))
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("ratio", "good", "learns"),
    [
        (1.5, True, False),
        (0.5, True, True),
        (1.5, False, True),
        (0.5, False, False),
        (1.1, True, True),
    ],
)
def test_the_ratio_is_clipped_where_it_went_too_far(ratio, good, learns):
    """A good action that is already likelier, or a bad one that is already rarer, is let be."""
    pair = {name: np.zeros((1, 2), np.float32) for name in NAMES[:-1]} | {
        "alive": np.ones((1, 2), bool)
    }
    pair["advantage"] = np.array([[1, -1] if good else [-1, 1]], np.float32)
    pair["log_prob"] = np.array([[np.log(ratio), 0]], np.float32)
    losses, gradients = losses_and_gradients(pair, "policy_loss")
    assert (gradients["log_prob"][0, 0] != 0) == learns
    if learns:
        assert (gradients["log_prob"][0, 0] < 0) == good  # descent makes good actions likelier
    assert losses.clip_fraction == (0.5 if abs(ratio - 1) > 0.2 else 0)


@pytest.mark.parametrize(
    ("value", "target", "learns"),
    [(0.5, 1, False), (-0.5, 1, True), (0.1, 1, True), (0.5, -1, True), (1.5, 1, False)],
)
def test_the_value_is_clipped_to_the_worse_of_two_errors(value, target, learns):
    """A value that has moved more than ε towards its target (from 0) is let be."""
    one = {name: np.zeros((1, 1), np.float32) for name in NAMES[:-1]} | {
        "alive": np.ones((1, 1), bool)
    }
    one |= {
        "value": np.full((1, 1), value, np.float32),
        "target": np.full((1, 1), target, np.float32),
    }
    losses, gradients = losses_and_gradients(one, "value_loss")
    clipped = np.clip(value, -0.2, 0.2)
    assert losses.value_loss == pytest.approx(
        max((value - target) ** 2, (clipped - target) ** 2) / 2
    )
    assert gradients["value"][0, 0] == pytest.approx(value - target if learns else 0)


def test_entropy_is_a_bonus(numbers):
    count = numbers["alive"].sum()
    _, gradients = losses_and_gradients(numbers)
    np.testing.assert_allclose(
        gradients["entropy"], -COEFFICIENTS["ent_coef"] * numbers["alive"] / count, rtol=1e-5
    )


def test_coefficients_weigh_the_parts(numbers):
    losses, _ = losses_and_gradients(numbers, ent_coef=0.0, vf_coef=0.0)
    assert losses.loss == losses.policy_loss
    losses, _ = losses_and_gradients(numbers, ent_coef=2.0, vf_coef=3.0)
    assert losses.loss == pytest.approx(
        losses.policy_loss - 2 * losses.entropy + 3 * losses.value_loss, rel=1e-6
    )


def test_advantages_are_normalised_over_the_living(numbers):
    """Neither their scale nor their mean matters, nor what the dead would add to either."""
    expected, _ = losses_and_gradients(numbers)
    shifted = np.where(numbers["alive"], 5 * numbers["advantage"] + 3, 1e3).astype(np.float32)
    losses, _ = losses_and_gradients(numbers | {"advantage": shifted})
    assert losses.policy_loss == pytest.approx(expected.policy_loss, rel=1e-5)


def test_equal_advantages_are_finite(numbers):
    losses, gradients = losses_and_gradients(
        numbers | {"advantage": np.full(SHAPE, 0.5, np.float32)}
    )
    assert losses.policy_loss == pytest.approx(0, abs=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
