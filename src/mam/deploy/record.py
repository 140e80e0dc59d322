"""Steps of the real environment that an export is checked on, and what the policy did at each."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import jax
import numpy as np

from mam.config import Config
from mam.learning.experience import Environments, environments
from mam.learning.sharding import WHOLE
from mam.networks.actions import agent_noise, make_distribution
from mam.types import EnvSpec, ExportablePolicy, Observation

NUM_ENVS, STEPS = 4, 32
TOLERANCE = 1e-5


@contextmanager
def few_environments(config: Config) -> Iterator[Environments]:
    """Make the task of a run, in as many environments as `record` plays, and end them after it."""
    ppo = replace(config.ppo, num_envs=NUM_ENVS, rollout_length=STEPS, sequence_length=None)
    source = environments(replace(config, ppo=ppo, num_seeds=1, num_devices=1))
    try:
        yield source
    finally:
        source.close()


def record(source: Environments, policy: ExportablePolicy, seed: int) -> dict[str, np.ndarray]:
    """Play some steps, and return what a program reads and what the policy answers, [T, B, …].

    Every other environment is played greedily.

    Args:
        source: `few_environments` of the task.
        policy: the weights, of its sizes.
        seed: decides the episodes and the noise.
    """
    spec, key = source.spec, jax.random.key(seed)
    if source.compiled:
        carry = source.init(policy, key, WHOLE)
        play = jax.jit(lambda p, c, k: source.collect(p, c, k, WHOLE)[1].transitions)
        played = play(policy, carry, key)
    else:
        seeds = jax.tree.map(lambda x: x[None], (policy, key))
        carry = jax.tree.map(lambda x: x[None], source.init(policy, key, WHOLE))
        played = source.collect(seeds[0], carry, seeds[1], WHOLE)[1].transitions
        played = jax.tree.map(lambda x: x[0], played)
    played = jax.device_get((played.observation, played.reset))
    keys = jax.random.split(jax.random.fold_in(key, 1), (STEPS, NUM_ENVS))
    noise = np.array(agent_noise(make_distribution(spec), keys, spec.num_agents))
    noise[:, 1::2] = 0
    observation, reset = played
    return _answers(spec, policy, observation, reset, noise)


def _answers(
    spec: EnvSpec, policy: ExportablePolicy, obs: Observation, reset: np.ndarray, noise: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the arrays by their names, and the jitted policy's answers."""
    reset = np.concatenate([np.ones_like(reset[:1]), reset[1:]])  # memory starts here
    act = jax.jit(lambda policy, *args: policy.act_on_noise(*args))
    memory, outputs = policy.init_memory((NUM_ENVS,)), []
    for t in range(STEPS):
        now = jax.tree.map(lambda x, t=t: x[t], obs)
        memory, output = act(policy, memory, now, reset[t], noise[t])
        outputs.append((output.action, output.log_prob))
    action, log_prob = (np.stack(arrays) for arrays in zip(*outputs, strict=True))
    tolerance = np.full(log_prob.shape, TOLERANCE, np.float32)
    if spec.continuous:  # densities are those of atanh a, whose slope is 1 / (1 − a²)
        tolerance *= np.sum(1 / (1 - np.square(action)), axis=-1)
    arrays = {f.name: getattr(obs, f.name) for f in fields(obs)}
    arrays["agents_view"] = arrays["agents_view"][..., spec.id_dim :]
    arrays |= {"reset": reset, "noise": noise, "action": action, "log_prob": log_prob}
    arrays |= {"log_prob_tolerance": tolerance}
    return {name: array for name, array in arrays.items() if array is not None}
