"""Playing whole episodes with fixed weights."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mam.config import EvalConfig
from mam.learning.sharding import WHOLE, Shard
from mam.types import Environment, EnvState, Memory, Policy, TimeStep

UNFINISHED = "unfinished"  # the metric that is 1 for an episode that was cut off by the evaluation's own limit


class Episodes(eqx.Module):
    """Episodes being played side by side."""

    env_state: EnvState
    timestep: TimeStep  # [M, …]
    memory: Memory
    over: Bool[Array, "M"]
    metrics: dict[str, Float[Array, "M"]]  # as of each episode's last step
    key: Key[Array, ""]


def evaluate(
    env: Environment,
    policy: Policy,
    key: Key[Array, ""],
    num_episodes: int,
    *,
    greedy: bool | Bool[Array, ""] = False,
    max_steps: int | Int[Array, ""] = EvalConfig.max_episode_steps,
    shard: Shard = WHOLE,
) -> dict[str, Float[Array, "M"]]:
    """Plays episodes side by side, each from a fresh reset to its end, and stops when the last one is over or cut off.

    Args:
        env: one environment that reports its metrics, such as `EpisodeStatistics`; it need not reset itself.
        policy: the weights to evaluate.
        key: decides everything random.
        num_episodes: M.
        greedy: take the most likely actions instead of sampling; the rest is the same for the same key.
        max_steps: steps after which what has not ended is cut off.
        shard: plays its share of the episodes; all devices return those of all.

    Returns:
        The environment's metrics at the end of each episode: `episode_return`, `episode_length`, …; and UNFINISHED.
    """
    share = -(-num_episodes // shard.num_shards)

    def keys_of(key: Key[Array, ""]) -> Key[Array, "M"]:
        return shard.part(jax.random.split(key, share * shard.num_shards))

    reset_key, play_key = jax.random.split(key)
    env_state, timestep = jax.vmap(env.reset)(keys_of(reset_key))
    episodes = Episodes(
        env_state=env_state,
        timestep=timestep,
        memory=policy.init_memory((share,)),
        over=jnp.zeros(share, bool),
        metrics=timestep.metrics,
        key=play_key,
    )

    def step(episodes: Episodes) -> Episodes:
        act_key, env_key, next_key = jax.random.split(episodes.key, 3)
        before = episodes.timestep
        first = episodes.metrics["episode_length"] == 0
        memory, output = policy.act(episodes.memory, before.observation, first, keys_of(act_key), greedy=greedy)
        env_state, timestep = jax.vmap(env.step)(episodes.env_state, output.action, keys_of(env_key))
        metrics = {
            name: jnp.where(episodes.over, episodes.metrics[name], timestep.metrics[name]) for name in timestep.metrics
        }
        return Episodes(env_state, timestep, memory, episodes.over | timestep.ended, metrics, next_key)

    def goes_on(episodes: Episodes) -> Bool[Array, ""]:
        return jnp.any(~episodes.over & (episodes.metrics["episode_length"] < max_steps))

    episodes = lax.while_loop(goes_on, step, episodes)
    metrics = episodes.metrics | {UNFINISHED: (~episodes.over).astype(jnp.float32)}
    return {name: shard.gather(value)[:num_episodes] for name, value in metrics.items()}
