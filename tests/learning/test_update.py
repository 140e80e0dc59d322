"""Learning from one rollout: which sequences each gradient step reads, how many, to what effect."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mam.config import PPOConfig
from mam.errors import UserError
from mam.learning.objective import Batch, make_batch
from mam.learning.ppo import PPO, PPOTargets, ppo_loss
from mam.learning.rollout import Rollout
from mam.learning.update import make_optimiser, update
from mam.types import Evaluation, Observation, Transition

NUM_AGENTS, OBS_DIM, NUM_ACTIONS = 2, 3, 4


@partial(jax.jit, static_argnames=("optimiser", "ppo"))
def update_ppo(policy, opt_state, batch, key, *, optimiser, ppo, lr_scale=1.0):
    return update(policy, opt_state, batch, key, optimiser, PPO(ppo), ppo, lr_scale=lr_scale)


class Learner(eqx.Module):
    """What updates need of a policy."""

    def init_memory(self, batch=()):
        return ()

    def act(self, memory, obs, reset, key, *, greedy=False):
        raise NotImplementedError

    def successor_values(self, memory, obs, action, reset, successor):
        raise NotImplementedError


class Linear(Learner):
    """Logits and value are linear in what an agent sees."""

    actor: jax.Array
    critic: jax.Array

    def evaluate(self, memory, obs, action, order, reset):
        log_probs = jax.nn.log_softmax(obs.agents_view @ self.actor)
        log_prob = jnp.take_along_axis(log_probs, action[..., None], axis=-1)[..., 0]
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1)
        return Evaluation(log_prob, entropy, value=obs.agents_view @ self.critic)


class Table(Learner):
    """One number per row, found by what the agents see: NaN unless their memory agrees."""

    numbers: jax.Array

    def evaluate(self, memory, obs, action, order, reset):
        row = obs.agents_view[..., 0].astype(int)
        value = self.numbers[row]
        if jax.tree.leaves(memory):
            value = jnp.where(row == memory[:, None], value, jnp.nan)
        return Evaluation(jnp.zeros_like(value), jnp.zeros_like(value), value)


def observe(view):
    action_mask = jnp.ones((*view.shape[:-1], NUM_ACTIONS), bool)
    return Observation(view, action_mask, alive=jnp.ones(view.shape[:-1], bool))


@pytest.fixture(scope="module")
def policy():
    actor_key, critic_key = jax.random.split(jax.random.key(0))
    return Linear(
        jax.random.normal(actor_key, (OBS_DIM, NUM_ACTIONS)),
        jax.random.normal(critic_key, (OBS_DIM,)),
    )


@pytest.fixture(scope="module")
def batch(policy):
    """32 steps of random actions, with the log-probabilities and values of `policy`."""
    keys = jax.random.split(jax.random.key(1), 4)
    shape = (1, 32, NUM_AGENTS)
    obs = observe(jax.random.normal(keys[0], (*shape, OBS_DIM)))
    action = jax.random.randint(keys[1], shape, 0, NUM_ACTIONS)
    order = jnp.broadcast_to(jnp.arange(NUM_AGENTS), shape)
    reset = jnp.zeros((1, 32), bool)
    memory = policy.init_memory((32,))
    old = policy.evaluate(memory, obs, action, order, reset)
    advantage, target = (jax.random.normal(key, shape) for key in keys[2:])
    return Batch(
        obs, reset, memory, action, order, PPOTargets(old.log_prob, old.value, advantage, target)
    )


def rows_visited(key, size, ppo, length=None):
    """How often each gradient step reads each row: [steps, rows], from the gradients it sees.

    Rows are steps of a policy without memory, or sequences of `length` steps of one whose memory
    says which it is.
    """
    num_steps = ppo.num_epochs * ppo.num_minibatches

    def record(gradients, state, params=None):
        step, seen = state
        visits = gradients.numbers / (-ppo.vf_coef * ppo.num_minibatches / size)
        return jax.tree.map(jnp.zeros_like, gradients), (step + 1, seen.at[step].set(visits))

    optimiser = optax.GradientTransformation(
        lambda policy: (jnp.array(0), jnp.zeros((num_steps, size))), record
    )
    shape = (length or 1, size, NUM_AGENTS)
    view = jnp.broadcast_to(jnp.arange(size)[:, None, None], (*shape, 1)).astype(float)
    zeros, ones = jnp.zeros(shape), jnp.ones(shape)
    whole, memory = jnp.zeros(shape, jnp.int32), () if length is None else jnp.arange(size)[None]
    targets = PPOTargets(zeros, zeros, zeros, target=ones)
    batch = Batch(observe(view), jnp.zeros(shape[:2], bool), memory, whole, whole, targets)
    policy = Table(jnp.zeros(size))
    _, (step, seen), _ = update_ppo(
        policy, optimiser.init(policy), batch, key, optimiser=optimiser, ppo=ppo
    )
    assert step == num_steps
    np.testing.assert_allclose(seen, np.round(seen), atol=1e-5)
    return np.round(seen).astype(int)


@pytest.mark.parametrize("length", [None, 5])
def test_each_epoch_visits_each_row_once(length):
    """Steps, or sequences in one piece and with their own memory."""
    ppo = PPOConfig(num_epochs=3, num_minibatches=4)
    visits = rows_visited(jax.random.key(0), 24, ppo, length)
    np.testing.assert_array_equal(visits.sum(axis=1), 24 / 4)
    epochs = visits.reshape(3, 4, 24)
    np.testing.assert_array_equal(epochs.sum(axis=1), 1)
    assert len({epoch.tobytes() for epoch in epochs}) == 3  # each in its own order
    np.testing.assert_array_equal(rows_visited(jax.random.key(0), 24, ppo, length), visits)
    assert (rows_visited(jax.random.key(1), 24, ppo, length) != visits).any()


def test_sequences_must_be_dealt_evenly():
    with pytest.raises(UserError) as refused:
        rows_visited(jax.random.key(0), 6, PPOConfig(num_minibatches=4), length=8)
    assert str(refused.value) == (
        "a policy with memory learns from sequences of 8 steps: "
        "ppo.num_minibatches must divide the 6 sequences of a rollout, got 4"
    )


LENGTH, NUM_ENVS = 4, 5
CODE = jnp.arange(LENGTH * NUM_ENVS).reshape(LENGTH, NUM_ENVS)  # t B + b


def coded_batch(memory):
    """A batch whose numbers tell their step and environment; booleans tell whether it is odd."""
    per_agent = jnp.broadcast_to(CODE[..., None], (LENGTH, NUM_ENVS, NUM_AGENTS))
    numbers, odd = per_agent.astype(float), CODE % 2 == 1
    obs = Observation(
        agents_view=jnp.broadcast_to(numbers[..., None], (LENGTH, NUM_ENVS, NUM_AGENTS, OBS_DIM)),
        action_mask=jnp.broadcast_to(
            odd[..., None, None], (LENGTH, NUM_ENVS, NUM_AGENTS, NUM_ACTIONS)
        ),
        alive=jnp.broadcast_to(odd[..., None], (LENGTH, NUM_ENVS, NUM_AGENTS)),
        grid=jnp.broadcast_to(
            CODE[..., None, None, None, None], (LENGTH, NUM_ENVS, NUM_AGENTS, 2, 2, 1)
        ),
        state=numbers[..., :1],
    )
    transitions = Transition(
        observation=obs,
        reset=odd,
        action=per_agent,
        log_prob=numbers + 0.1,
        value=numbers + 0.2,
        order=per_agent + 1,
        reward=numbers,
        terminated=odd,
        truncated=odd,
        final_observation=obs,
        metrics={},
    )
    targets = PPOTargets(
        numbers + 0.1, numbers + 0.2, advantage=numbers + 0.3, target=numbers + 0.4
    )
    return make_batch(Rollout(transitions, memory, obs.alive[-1]), targets)


def assert_coded(batch, rows):
    """Element [l, m] of every field is that of the step and environment `rows[l, m]` stands for."""
    expected = {
        **{"action": rows, "order": rows + 1},
        **{
            "log_prob": rows + 0.1,
            "value": rows + 0.2,
            "advantage": rows + 0.3,
            "target": rows + 0.4,
        },
    }
    assert batch.num_sequences == rows.shape[1]
    for name, values in expected.items():
        actual = getattr(batch if hasattr(batch, name) else batch.targets, name)
        assert actual.shape == (*rows.shape, NUM_AGENTS)
        np.testing.assert_allclose(
            actual, np.broadcast_to(values[..., None], actual.shape), rtol=1e-6
        )
    np.testing.assert_array_equal(batch.reset, rows % 2 == 1)
    np.testing.assert_array_equal(batch.observation.agents_view[..., 1, 2], rows)
    np.testing.assert_array_equal(batch.observation.alive[..., 1], rows % 2 == 1)
    np.testing.assert_array_equal(batch.observation.action_mask[..., 1, 3], rows % 2 == 1)
    np.testing.assert_array_equal(batch.observation.grid[..., 1, 1, 0, 0], rows)
    np.testing.assert_array_equal(batch.observation.state[..., 0], rows)


def test_without_memory_every_step_of_an_environment_is_a_sequence():
    """Of length 1: number t B + b is step t in environment b."""
    batch = coded_batch(memory=())
    assert batch.memory == ()
    assert_coded(batch, np.arange(LENGTH * NUM_ENVS)[None])


def test_with_memory_every_environment_is_a_sequence():
    """A row has all steps of an environment, and only the memory before the first of them."""
    batch = coded_batch(memory={"a": CODE[:1], "b": jnp.stack([CODE, -CODE], axis=-1)[:1]})
    assert_coded(batch, np.asarray(CODE))
    np.testing.assert_array_equal(batch.memory["a"], CODE[:1])
    np.testing.assert_array_equal(batch.memory["b"], np.stack([CODE, -CODE], axis=-1)[:1])


@pytest.mark.parametrize("length", [1, 2])
def test_with_memory_a_rollout_may_be_several_sequences(length):
    """Number k B + b has steps k L, k L + 1, … of environment b, and the memory before them."""
    batch = coded_batch(memory=CODE[::length])
    rows = np.concatenate(
        [np.asarray(CODE)[k : k + length] for k in range(0, LENGTH, length)], axis=1
    )
    assert_coded(batch, rows)
    np.testing.assert_array_equal(batch.memory, rows[:1])


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e9])
def test_the_optimiser_is_adam_behind_a_limit_on_the_norm(max_grad_norm):
    lr, epsilon = 3e-3, 1e-5
    optimiser = make_optimiser(PPOConfig(lr=lr, max_grad_norm=max_grad_norm))
    state = optimiser.init({"a": jnp.zeros(2), "b": jnp.zeros(())})
    mean, square = np.zeros(3), np.zeros(3)
    for step, gradient in enumerate(
        np.array([[3.0, -4.0, 12.0], [1e-5, 0.0, 2e-5], [-0.1, 0.2, 0.3]]), start=1
    ):
        updates, state = optimiser.update(
            {"a": jnp.array(gradient[:2]), "b": jnp.array(gradient[2])}, state
        )
        limited = gradient * min(1, max_grad_norm / np.linalg.norm(gradient))
        mean, square = 0.9 * mean + 0.1 * limited, 0.999 * square + 0.001 * limited**2
        expected = -lr * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + epsilon)
        np.testing.assert_allclose([*updates["a"], updates["b"]], expected, rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("lr_scale", [1.0, 0.3])
def test_equals_gradient_steps_by_hand(policy, batch, lr_scale):
    """With one minibatch the order of rows does not matter: epochs can be a plain loop."""
    ppo = PPOConfig(
        lr=0.01, num_epochs=4, num_minibatches=1, ent_coef=0.03, vf_coef=0.7, max_grad_norm=0.1
    )
    optimiser = make_optimiser(ppo)

    def loss(policy):
        new = policy.evaluate(
            batch.memory, batch.observation, batch.action, batch.order, batch.reset
        )
        targets = batch.targets
        old = (targets.log_prob, targets.value, targets.advantage, targets.target)
        losses = ppo_loss(
            new, *old, batch.observation.alive, clip_eps=0.2, ent_coef=0.03, vf_coef=0.7
        )
        return losses.loss, losses

    @jax.jit
    def step(policy, state):
        gradients, losses = jax.grad(loss, has_aux=True)(policy)
        updates, state = optimiser.update(gradients, state)
        return (
            jax.tree.map(lambda p, u: p + lr_scale * u, policy, updates),
            state,
            losses,
            gradients,
        )

    by_hand, state, steps, norms = policy, optimiser.init(policy), [], []
    for _ in range(ppo.num_epochs):
        by_hand, state, losses, gradients = jax.device_get(step(by_hand, state))
        steps.append(losses)
        norms.append(np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradients))))
    scaled = partial(update_ppo, optimiser=optimiser, ppo=ppo, lr_scale=jnp.float32(lr_scale))
    learned, _, metrics = jax.device_get(
        scaled(policy, optimiser.init(policy), batch, jax.random.key(0))
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), learned, by_hand)
    means = {name: np.mean([getattr(step, name) for step in steps]) for name in metrics.losses}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), metrics.losses, means)
    assert metrics.grad_norm == pytest.approx(np.mean(norms), rel=1e-3)
    assert min(norms) > ppo.max_grad_norm  # reported before clipping


def test_steps_metrics_and_the_first_ratio_deviation(policy, batch):
    """Defect 1. The deviation is zero if acting and evaluating agree, however far the update goes.

    It is not if the log-probabilities belong to other agents.
    """
    ppo = PPOConfig(lr=0.1, num_epochs=3, num_minibatches=4)
    optimiser = make_optimiser(ppo)

    def run(batch):
        key = jax.random.key(0)
        return jax.device_get(
            update_ppo(policy, optimiser.init(policy), batch, key, optimiser=optimiser, ppo=ppo)[1:]
        )

    state, metrics = run(batch)
    assert optax.tree.get(state, "ScaleByAdamState").count == 3 * 4
    assert all(np.isfinite(leaf) and np.shape(leaf) == () for leaf in jax.tree.leaves(metrics))
    assert metrics.first["ratio_deviation"] <= 1e-6
    assert metrics.losses["ratio_deviation"] > 0.1
    swapped = eqx.tree_at(lambda b: b.targets.log_prob, batch, batch.targets.log_prob[:, :, ::-1])
    assert run(swapped)[1].first["ratio_deviation"] > 0.1


def test_what_was_frozen_moves_on_as_if_it_had_not_been(policy, batch):
    """Adam without moments of its gradients would take a step of several learning rates."""
    ppo = PPOConfig(num_epochs=1, num_minibatches=1, lr=1e-4, max_grad_norm=1e9)
    optimiser, key = make_optimiser(ppo), jax.random.key(2)
    free = jax.tree.map(lambda _: jnp.array(False), policy)
    frozen = eqx.tree_at(lambda p: p.actor, free, jnp.array(True))
    take = jax.jit(lambda p, s, f: update(p, s, batch, key, optimiser, PPO(ppo), ppo, frozen=f)[:2])
    held, state = policy, optimiser.init(policy)
    for _ in range(200):
        held, state = take(held, state, frozen)
    np.testing.assert_array_equal(held.actor, policy.actor)
    assert (held.critic != policy.critic).all()
    for _ in range(10):
        before, (held, state) = held, take(held, state, free)
        assert 0 < jnp.abs(held.actor - before.actor).max() < 1.1 * ppo.lr
