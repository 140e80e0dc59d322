"""Playing whole episodes with fixed weights."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from mam.types import Environment, EnvState, Memory, Policy, TimeStep


class Episodes(eqx.Module):
    """Episodes being played side by side."""

    env_state: EnvState
    timestep: TimeStep  # [M, …]
    memory: Memory
    over: Bool[Array, "M"]
    metrics: dict[str, Float[Array, "M"]]  # as of each episode's last step
    key: Key[Array, ""]


def evaluate(
    env: Environment, policy: Policy, key: Key[Array, ""], num_episodes: int, *, greedy: bool = False
) -> dict[str, Float[Array, "M"]]:
    """Plays episodes side by side, each from a fresh reset to its end, and stops when the last one is over.

    Args:
        env: one environment that reports its metrics, such as `EpisodeStatistics`; it need not reset itself.
        policy: the weights to evaluate.
        key: decides everything random.
        num_episodes: M.
        greedy: take the most likely actions instead of sampling.

    Returns:
        The environment's metrics at the end of each episode: `episode_return`, `episode_length`, …
    """
    reset_key, play_key = jax.random.split(key)
    env_state, timestep = jax.vmap(env.reset)(jax.random.split(reset_key, num_episodes))
    episodes = Episodes(
        env_state=env_state,
        timestep=timestep,
        memory=policy.init_memory((num_episodes,)),
        over=jnp.zeros(num_episodes, bool),
        metrics=timestep.metrics,
        key=play_key,
    )

    def step(episodes: Episodes) -> Episodes:
        act_key, env_key, next_key = jax.random.split(episodes.key, 3)
        before = episodes.timestep
        first = episodes.metrics["episode_length"] == 0
        memory, output = policy.act(
            episodes.memory, before.observation, first, jax.random.split(act_key, num_episodes), greedy=greedy
        )
        keys = jax.random.split(env_key, num_episodes)
        env_state, timestep = jax.vmap(env.step)(episodes.env_state, output.action, keys)
        metrics = {
            name: jnp.where(episodes.over, episodes.metrics[name], timestep.metrics[name]) for name in timestep.metrics
        }
        return Episodes(env_state, timestep, memory, episodes.over | timestep.ended, metrics, next_key)

    return lax.while_loop(lambda e: ~jnp.all(e.over), step, episodes).metrics
