"""One episode step by step, for looking at it."""

from pathlib import Path

import jax
import numpy as np

from mam.types import Environment, Policy


def play(env: Environment, policy: Policy, seed: int, path: Path, *, greedy: bool = False) -> float:
    """Plays an episode and writes it as a GIF.

    Args:
        env: one environment that reports `episode_return`.
        policy: the weights to play with.
        seed: decides everything random.
        path: GIF to write.
        greedy: take the most likely actions instead of sampling.

    Returns:
        The episode's return.

    Raises:
        NotImplementedError: if nothing can draw this environment.
    """
    reset_key, key = jax.random.split(jax.random.key(seed))

    @jax.jit
    def step(state, timestep, memory, first, key):
        act_key, env_key, key = jax.random.split(key, 3)
        memory, output = policy.act(memory, timestep.observation, first, act_key, greedy=greedy)
        state, timestep = env.step(state, output.action, env_key)
        return state, timestep, memory, timestep.ended, key

    state, timestep = jax.jit(env.reset)(reset_key)
    memory, first, states = policy.init_memory(), np.True_, [state]
    ended = False
    while not ended:
        state, timestep, memory, first, key = step(state, timestep, memory, first, key)
        states.append(state)
        ended = bool(first)
    env.animate(states, path)
    return float(timestep.metrics["episode_return"])
