"""What candidates are run on: random numbers, a synthetic task, and policies without training."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from mam.config import NetworkConfig
from mam.learning.objective import Batch
from mam.learning.ppo import PPOTargets
from mam.networks.decoding.decide import Decoding
from mam.networks.policy import SEQUENTIAL, make_policy
from mam.types import EnvSpec, Observation, Policy

OBS_DIM, NUM_ACTIONS = 32, 8  # of the synthetic task
CHANNELS = 6  # of synthetic images


def normal(*shape: int, seed: int = 0) -> Float[Array, "..."]:
    """Draw standard normal numbers, float32, the same at every call; they repeat after 2^20."""
    drawn = np.random.default_rng(seed).standard_normal(min(math.prod(shape), 1 << 20), np.float32)
    return jnp.asarray(np.resize(drawn, shape))


def random_like(shapes: PyTree) -> PyTree:
    """Draw arrays with a standard deviation of 0.1, for a tree of shapes.

    They stand for weights: no time depends on them, and initialising properly takes longer to
    compile than most candidates.
    """
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.0, 0.1, leaf.shape), leaf.dtype), shapes
    )


def count(tree: PyTree) -> int:
    """Count the numbers in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def policy_shapes(
    name: str, spec: EnvSpec, config: NetworkConfig, decoding: Decoding = SEQUENTIAL
) -> PyTree:
    """Make a policy with shapes in place of arrays; nothing is computed."""
    build = partial(make_policy, name, spec, config, decoding)
    return jax.eval_shape(lambda key: build(key=key), jax.random.key(0))


def random_policy(
    name: str, spec: EnvSpec, config: NetworkConfig, decoding: Decoding = SEQUENTIAL
) -> Policy:
    """Make a named policy with random weights."""
    return random_like(policy_shapes(name, spec, config, decoding))


def synthetic_task(num_agents: int) -> EnvSpec:
    """Specify a task that has sizes and no environment; its agents are in a plane."""
    sizes = (num_agents, OBS_DIM, NUM_ACTIONS)
    return EnvSpec("bench/synthetic", *sizes, time_limit=None, position_dim=2)


def synthetic_images(num_agents: int, side: int) -> EnvSpec:
    """Specify a task whose agents see an image of side × side cells, and nothing else."""
    sizes = (num_agents, 0, NUM_ACTIONS)
    return EnvSpec("bench/images", *sizes, time_limit=None, grid_shape=(side, side, CHANNELS))


def random_observation(spec: EnvSpec, *batch: int) -> Observation:
    """Draw what agents see, [*batch, N, …]: all alive, every action legal."""
    agents = (*batch, spec.num_agents)
    mask = jnp.ones((*agents, spec.num_actions), bool)
    return Observation(
        normal(*agents, spec.obs_dim),
        action_mask=mask,
        alive=jnp.ones(agents, bool),
        grid=None if spec.grid_shape is None else normal(*agents, *spec.grid_shape) > 1,
        positions=normal(*agents, spec.position_dim, seed=3) if spec.position_dim else None,
    )


def random_batch(policy: Policy, spec: EnvSpec, steps: int, length: int) -> Batch:
    """Draw environment steps for a policy to learn from.

    Args:
        policy: the one that learns from them.
        spec: of the task.
        steps: about so many of them.
        length: of sequences, if the policy has memory; one without reads each step by itself.
    """
    length = min(length, steps) if jax.tree.leaves(policy.init_memory()) else 1
    sequences = steps // length
    shape = (length, sequences, spec.num_agents)
    advantage, target, value = normal(3, *shape)
    return Batch(
        observation=random_observation(spec, length, sequences),
        reset=jnp.zeros((length, sequences), bool),
        memory=jax.tree.map(lambda x: x[None], policy.init_memory((sequences,))),
        action=jax.random.randint(jax.random.key(1), shape, 0, spec.num_actions),
        order=jnp.broadcast_to(jnp.arange(spec.num_agents, dtype=jnp.int32), shape),
        targets=PPOTargets(
            log_prob=jnp.full(shape, -jnp.log(spec.num_actions)),
            value=value,
            advantage=advantage,
            target=target,
        ),
    )
