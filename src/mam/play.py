"""One episode step by step, for looking at it."""

from pathlib import Path

import jax
import numpy as np

from mam.envs.wrappers import IdEncoding, agent_ids
from mam.types import Environment, Observation, Policy

FRAME_MILLISECONDS = 100


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


def play_on_host(
    name: str, agent_id: IdEncoding, policy: Policy, seed: int, path: Path, *, greedy: bool = False
) -> float:
    """Plays an episode of an environment that JAX does not step, in this process, and writes it as a GIF.

    Args:
        name: of the environment, as for `mam.envs.registry.make_host`.
        agent_id: as for `make_host`.
        policy: as for `play`.
        seed: as for `play`.
        path: as for `play`.
        greedy: as for `play`.

    Returns:
        The episode's return.

    Raises:
        NotImplementedError: if the environment does not draw itself.
    """
    from PIL import Image

    from mam.envs.host.factories import find_factory
    from mam.envs.host.pettingzoo import PettingZooEnv

    env = PettingZooEnv(find_factory(name)(render_mode="rgb_array"), name)
    ids = agent_ids(env.layout.num_agents, agent_id)
    act = jax.jit(lambda *inputs: policy.act(*inputs, greedy=greedy))
    key, memory, frames, episode_return, over = jax.random.key(seed), policy.init_memory(), [], 0.0, False
    arrays = env.reset(seed)
    while not over:
        view = np.concatenate([ids, arrays["agents_view"]], axis=1)
        memory, output = act(memory, Observation(**(arrays | {"agents_view": view})), np.array(not frames), key)
        if (frame := env.frame()) is None:
            raise NotImplementedError(f'{name} cannot be drawn: it does not take render_mode="rgb_array"')
        frames.append(Image.fromarray(np.asarray(frame, np.uint8)))
        outcome = env.step(np.asarray(output.action))
        arrays, key = outcome.observation, jax.random.fold_in(key, len(frames))
        episode_return += float(outcome.reward.mean())
        over = outcome.terminated or outcome.truncated
    env.close()
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_MILLISECONDS, loop=0)
    return episode_return
