"""What learning holds in memory, read off the compiled program: never the states of all agents."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import NetworkConfig
from mam.networks.policy import make_policy
from mam.types import EnvSpec, Observation

NUM_ENVS, NUM_AGENTS = 256, 64
SIZES = {"d_model": 16, "d_state": 64, "head_dim": 16}
ALL_STATES = (
    NUM_ENVS * NUM_AGENTS * 2 * SIZES["d_model"] * SIZES["d_state"]
)  # numbers in B · N · d_inner · d_state


def make_loss(name, **sizes):
    """A policy, by its shapes, and a function of it and of a batch."""
    spec = EnvSpec("test/memory", NUM_AGENTS, obs_dim=4, num_actions=3, time_limit=10)
    shape = (NUM_ENVS, NUM_AGENTS)
    obs = Observation(
        agents_view=jnp.zeros((*shape, spec.obs_dim)),
        action_mask=jnp.ones((*shape, spec.num_actions), bool),
        alive=jnp.ones(shape, bool),
    )
    order = jnp.broadcast_to(jnp.arange(NUM_AGENTS, dtype=jnp.int32), shape)
    policy = jax.eval_shape(
        lambda key: make_policy(name, spec, NetworkConfig(**SIZES | sizes), key=key),
        jax.random.key(0),
    )

    def loss(policy, obs, action, order):
        memory, reset = policy.init_memory((NUM_ENVS,)), jnp.zeros(NUM_ENVS, bool)
        result = policy.evaluate(memory, obs, action, order, reset)
        return sum(jnp.sum(v) for v in (result.log_prob, result.entropy, result.value))

    return policy, loss, (obs, jnp.zeros(shape, jnp.int32), order)


def compile_gradient(name, **sizes):
    """The gradient of a policy on a batch; compiled, not run."""
    policy, loss, data = make_loss(name, **sizes)
    return jax.jit(jax.grad(loss)).lower(policy, *data).compile()


def largest_array(program):
    """Elements of the largest array that the program names."""
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text())
    return max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)


@functools.cache
def published():
    return compile_gradient("mam", scan="associative")


def temporary(program):
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", ["mam", "mam2"])
def test_the_states_of_all_agents_are_never_held(name):
    program = compile_gradient(name)
    assert largest_array(program) < ALL_STATES / 4
    assert temporary(program) < temporary(published()) / 5


def test_the_published_form_holds_them():
    """What the test above is sensitive to."""
    assert largest_array(published()) >= ALL_STATES
    assert temporary(published()) > 4 * 4 * ALL_STATES


def test_chunks_keep_what_is_between_them():
    """A quarter of the agents at a time; XLA's compiler for CPUs cannot undo it."""
    at_once, in_chunks = (
        temporary(compile_gradient("mam", d_state=2, agent_chunk=chunk)) for chunk in (None, 16)
    )
    assert in_chunks < 0.7 * at_once


def test_rematerialisation_keeps_less_for_the_backward_pass():
    def kept(remat):
        policy, loss, data = make_loss("mam2", num_blocks=3, remat=remat)
        residuals = jax.eval_shape(
            lambda policy: jax.vjp(lambda policy: loss(policy, *data), policy)[1], policy
        )
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    assert kept(True) < kept(False) / 3
