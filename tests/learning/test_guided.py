"""A student and its teacher: who acts, what both remember, and that one learns from the other."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import DistillConfig, NetworkConfig, RecurrenceConfig
from mam.errors import UserError
from mam.learning.alignment import _distance
from mam.learning.guided import Guided
from mam.learning.objective import Batch, InTurn, Losses, same_for_all
from mam.learning.sharding import WHOLE
from mam.learning.train import init_policy, make_train
from mam.types import EnvSpec, Evaluation, Observation
from small_run import CONFIG

NUM_ENVS = 400
SPEC = EnvSpec("own/task", num_agents=2, obs_dim=3, num_actions=4, time_limit=None)
NETWORK = NetworkConfig(d_model=8, d_state=2, recurrence=RecurrenceConfig(last_action=True))
BASE = replace(CONFIG, policy="rec_ippo", network=NETWORK, agent_id="none")


@jax.jit
def act(guided, obs, reset, key):
    """One step of both together, and what each of them does and remembers by itself."""
    memory = guided.init_memory(reset.shape)
    keys = jax.random.split(key, len(reset))
    after, output = guided.act(memory, obs, reset, keys)
    done = (obs, output.action, output.order, reset)
    followed = [
        one.follow(own, *done)
        for one, own in ((guided.student, memory.student), (guided.teacher, memory.teacher))
    ]
    alone = [
        one.act(own, obs, reset, jax.vmap(lambda k: jax.random.split(k, 3))(keys)[:, index])[1]
        for one, own, index in (
            (guided.student, memory.student, 0),
            (guided.teacher, memory.teacher, 2),
        )
    ]
    return [after.student, after.teacher], followed, output, alone


@pytest.mark.parametrize("share", [None, 0.0, 0.25, 1.0])
def test_the_teacher_acts_at_its_share_of_the_steps_and_both_remember_them(share):
    draw = partial(init_policy, BASE, SPEC)
    policies = [draw(key=jax.random.key(k)) for k in (0, 1)]
    view = np.random.default_rng(0).normal(size=(NUM_ENVS, 2, 3)).astype(np.float32)
    alive = np.arange(2) < np.array([[2], [1]] * (NUM_ENVS // 2))
    obs = Observation(view, np.ones((NUM_ENVS, 2, 4), bool), alive)
    guided = Guided(*policies, share if share is None else jnp.float32(share))
    key = jax.random.key(0)
    remembered, followed, output, alone = act(guided, obs, np.ones(NUM_ENVS, bool), key)
    jax.tree.map(np.testing.assert_array_equal, remembered, followed)
    by_student, by_teacher = ((output.action == one.action).all(axis=-1) for one in alone)
    assert (by_student | by_teacher).all()
    clear = np.asarray(by_student != by_teacher)
    atol = 0.1 if share == 0.25 else 0
    np.testing.assert_allclose(np.mean(by_teacher[clear]), share or 0, atol=atol)
    np.testing.assert_array_equal(output.value, alone[0].value)


def taught(student, teacher, num_updates=3, learn="distill", **distill):
    """Losses of a student that learns from another policy drawn at random, or from itself."""
    distill = DistillConfig(teacher_until=1.0, **distill)
    # Without statistics, which would change what the student does while it learns nothing.
    network = replace(CONFIG.network, observation_norm="layer")
    base = replace(CONFIG, num_seeds=1, network=network, ppo=replace(CONFIG.ppo, lr=0.01))
    config = replace(base, policy=student, learn=learn, teacher="unread", distill=distill)
    kind = replace(base, policy=teacher)
    trainer = make_train(config, teacher=kind)
    state = trainer.init(np.arange(1))
    drawn = jax.vmap(lambda key: init_policy(kind, trainer.spec, key=key))
    own = jax.tree.map(jnp.copy, state.policy)
    weights = own if student == teacher else drawn(jax.random.split(jax.random.key(7), 1))
    if student != teacher:  # first weights do nearly nothing
        noise = np.random.default_rng(0)
        weights = jax.tree.map(lambda x: x + np.float32(noise.normal(0, 0.4, x.shape)), weights)
    state, reported = replace(state, teacher=weights), []
    for _ in range(num_updates):
        state, values = trainer.train_step(state)
        reported.append({name: np.asarray(x).item() for name, x in values.items()})
    return reported


def test_a_policy_that_distills_itself_stays_what_it_is():
    for values in taught("mam", "mam"):
        assert values["teacher_kl"] < 1e-4
        assert values["teacher_value_loss"] < 1e-4


@pytest.mark.parametrize(("student", "teacher"), [("mam2", "mat"), ("ippo", "sable")])
def test_any_policy_learns_from_any_other(student, teacher):
    """Whichever of them remembers."""
    reported = taught(student, teacher, num_updates=12, teacher_share=0.5)
    assert all(np.isfinite([*values.values()]).all() for values in reported)
    kl, value_loss = (
        [values[f"teacher_{name}"] for values in reported] for name in ("kl", "value_loss")
    )
    assert np.mean(kl[-3:]) < 0.5 * np.mean(kl[:3])
    assert np.mean(value_loss[-3:]) < 0.5 * np.mean(value_loss[:3])
    np.testing.assert_allclose(reported[0]["teacher_share"], 0.5)
    assert reported[5]["teacher_share"] < 0.1


def test_beside_ppo_the_student_acts_and_the_teacher_fades():
    reported = taught("ippo", "rec_ippo", num_updates=6, learn="ppo", kl_coef=100.0)
    assert all(np.isfinite([*values.values()]).all() for values in reported)
    assert max(values["first_ratio_deviation"] for values in reported) < 1e-5
    assert reported[-1]["teacher_kl"] < 0.8 * reported[0]["teacher_kl"]
    for index, values in enumerate(reported):
        ppo = values["policy_loss"] - 0.01 * values["entropy"] + 0.5 * values["value_loss"]
        weight = 100 * (1 - index / 6)
        np.testing.assert_allclose(values["loss"], ppo + weight * values["teacher_kl"], rtol=1e-3)


def test_mixers_are_aligned_before_actions_are_learned():
    """One stage after another: matrices, what blocks put out, actions."""
    stages = {"matrix_updates": 8, "hidden_updates": 8}
    reported = taught("mam", "mat", num_updates=24, **stages)
    for name, start in (("matrix_distance", 0), ("hidden_distance", 8), ("teacher_kl", 16)):
        values = [values[name] for values in reported]
        own = slice(start, start + 8)
        numbers = np.isin(np.arange(24), np.arange(24)[own])
        np.testing.assert_array_equal(np.isfinite(values), numbers)  # no others are computed
        values = values[own]
        assert np.mean(values[-3:]) < 0.95 * np.mean(values[:3]), name


def test_all_seeds_are_in_one_stage():
    """A choice by what they have in common stays one where they are vectorised."""

    def choose(index, x):
        return jax.lax.switch(index, [jnp.sin, jnp.cos], x)

    index, x = jnp.ones(3, jnp.int32), jnp.arange(3.0)
    common = jax.vmap(lambda index, x: choose(same_for_all(index), x))
    np.testing.assert_allclose(common(index, x), jnp.cos(x))
    np.testing.assert_allclose(jax.vmap(same_for_all, axis_size=3)(index), 1)
    assert "cond[" in str(jax.make_jaxpr(common)(index, x))
    assert "cond[" not in str(jax.make_jaxpr(jax.vmap(choose))(index, x))


class Weight(eqx.Module):
    """All there is of a policy."""

    weight: jax.Array
    init_memory = act = evaluate = successor_values = lambda self: None


class Term:
    """An objective that says what it was given, in a type of its own."""

    needs_values = False

    def __init__(self, name, dtype):
        self.name, self.dtype = name, dtype

    def prepare(self, policy, rollout, estimates):
        return None

    def loss(self, policy, evaluation, batch, targets, shard):
        loss = policy.weight.astype(self.dtype)
        return Losses(loss, {self.name: loss}, {f"most_{self.name}": loss})


@pytest.mark.parametrize("index", [0, 1])
def test_one_objective_at_a_time_whatever_its_type(index):
    terms = Term("a", jnp.bfloat16), Term("b", jnp.float32)

    def loss(policy):
        unread = object.__new__(Evaluation), object.__new__(Batch), [None, None], WHOLE
        losses = InTurn(terms, jnp.int32(index)).loss(policy, *unread)
        return losses.loss, losses

    slope, losses = jax.grad(loss, has_aux=True)(Weight(jnp.float32(2.0)))
    assert (slope.weight, losses.loss, losses.loss.dtype) == (1, 2, jnp.float32)
    found = losses.means | losses.maxima
    one, other = "ab"[index], "ba"[index]
    assert (found[one], found[f"most_{one}"]) == (2, 2)
    assert jnp.isposinf(found[other])
    assert jnp.isposinf(found[f"most_{other}"])


def test_heads_are_put_beside_each_other():
    """Several of the student's beside one of the teacher's."""
    one, other = np.zeros((2, 4, 3), np.float32), np.zeros((2, 2, 3), np.float32)
    one[0, 3], other[0, 1] = 2.0, 1.0
    distance = _distance(jnp.asarray(one), jnp.asarray(other))
    np.testing.assert_allclose(distance, [(3 + 3) / 4, 0])
    with pytest.raises(UserError, match="have 3 heads and the teacher's 2: one number must"):
        _distance(jnp.zeros((2, 3, 3)), jnp.zeros((2, 2, 3)))
