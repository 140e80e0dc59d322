import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.networks.heads import Head, entropy_of, log_prob_of, mask_logits

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # less time compiling
LOGITS = jnp.array([[1.0, -2.0, 0.5, 3.0], [0.0, 40.0, -40.0, 1.0], [1e4, 0.0, -1e4, 0.0]])
MASK = jnp.array([[True, False, True, True], [True, True, True, True], [False, True, False, True]])


def probabilities(logits, mask):
    legal = np.where(mask, logits, -np.inf)
    p = np.exp(legal - np.max(legal, axis=-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def all_log_probs(masked):
    return log_prob_of(jnp.broadcast_to(masked[:, None], (3, 4, 4)), jnp.broadcast_to(jnp.arange(4), (3, 4)))


def test_masked_probabilities():
    log_probs = all_log_probs(mask_logits(LOGITS, MASK))
    expected = probabilities(np.asarray(LOGITS, np.float64), np.asarray(MASK))
    np.testing.assert_allclose(np.exp(log_probs), expected, atol=1e-6)
    np.testing.assert_array_equal(np.exp(log_probs)[~MASK], 0.0)  # exactly: never sampled
    assert np.all(np.isfinite(log_probs))


def test_a_forced_action_has_no_log_prob_and_no_entropy():
    masked = mask_logits(LOGITS, jnp.arange(4) == jnp.array([[2], [0], [1]]))
    np.testing.assert_array_equal(log_prob_of(masked, jnp.array([2, 0, 1])), 0.0)
    np.testing.assert_array_equal(entropy_of(masked), 0.0)


def test_entropy_is_that_of_the_legal_actions():
    p = probabilities(np.asarray(LOGITS, np.float64), np.asarray(MASK))
    expected = -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)
    np.testing.assert_allclose(entropy_of(mask_logits(LOGITS, MASK)), expected, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [lambda masked: entropy_of(masked).sum(), lambda masked: log_prob_of(masked, jnp.array([3, 0, 1])).sum()],
)
def test_gradients_are_finite_and_zero_for_illegal_actions(function):
    gradient = jax.grad(lambda logits: function(mask_logits(logits, MASK)))(LOGITS)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(np.asarray(gradient)[~np.asarray(MASK)], 0.0)
    assert np.any(gradient != 0.0)


def test_head_starts_near_zero():
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    y = jax.jit(lambda key, x: Head(6, 3, key=key)(x), compiler_options=QUICK)(jax.random.key(0), x)
    assert y.shape == (2, 5, 3)
    assert 0.0 < np.max(np.abs(y)) < 0.1
