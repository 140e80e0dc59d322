"""Playing whole episodes with fixed weights."""

import re
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mam.config import EvalConfig
from mam.learning.sharding import WHOLE, Shard
from mam.types import Environment, EnvSpec, EnvState, Memory, Policy, TimeStep

# The metric that is 1 for an episode that was cut off by the evaluation's own limit
UNFINISHED = "unfinished"
AGENT_RETURN = "agent_return"  # each agent's own, where rewards are not a team's
MOST_KINDS = 16  # of agents, whose returns are metrics


class Episodes(eqx.Module):
    """Episodes being played side by side."""

    env_state: EnvState
    timestep: TimeStep  # [M, …]
    memory: Memory
    over: Bool[Array, "M"]
    metrics: dict[str, Float[Array, "M"]]  # as of each episode's last step
    agent_return: Float[Array, "M N"] | None  # so far; None of a team
    key: Key[Array, ""]

    @classmethod
    def start(
        cls, env: Environment, policy: Policy, reset_keys: Key[Array, "M"], key: Key[Array, ""]
    ) -> "Episodes":
        """Reset an environment for each episode.

        Args:
            env: one environment.
            policy: says what memory is before the first step.
            reset_keys: decide how the M episodes start.
            key: of all later steps.
        """
        env_state, timestep = jax.vmap(env.reset)(reset_keys)
        size = reset_keys.shape
        return cls(
            env_state=env_state,
            timestep=timestep,
            memory=policy.init_memory(size),
            over=jnp.zeros(size, bool),
            metrics=timestep.metrics,
            agent_return=None if env.spec.team_reward else jnp.zeros_like(timestep.reward),
            key=key,
        )

    def after(
        self, env_state: EnvState, timestep: TimeStep, memory: Memory, key: Key[Array, ""]
    ) -> "Episodes":
        """Return the episodes one step later; those that were over keep metrics and returns.

        Args:
            env_state: after the step, [M, …].
            timestep: what the step led to, [M, …]; that of an episode that is over means nothing.
            memory: after it.
            key: of all later steps.
        """
        metrics = {
            name: jnp.where(self.over, self.metrics[name], timestep.metrics[name])
            for name in timestep.metrics
        }
        agent_return = self.agent_return
        if agent_return is not None:
            agent_return += jnp.where(self.over[:, None], 0.0, timestep.reward)
        over = self.over | timestep.ended
        return Episodes(env_state, timestep, memory, over, metrics, agent_return, key)


def evaluate(
    env: Environment,
    policy: Policy,
    key: Key[Array, ""],
    num_episodes: int,
    *,
    greedy: bool | Bool[Array, ""] = False,
    max_steps: int | Int[Array, ""] = EvalConfig.max_episode_steps,
    shard: Shard = WHOLE,
) -> dict[str, Float[Array, "M *agents"]]:
    """Play episodes side by side, each from a fresh reset to its end or its cut-off.

    Args:
        env: one environment that reports its metrics, such as `EpisodeStatistics`; it need not
            reset itself.
        policy: the weights to evaluate.
        key: decides everything random.
        num_episodes: M.
        greedy: take the most likely actions instead of sampling; the rest is the same for the same
            key.
        max_steps: steps after which an episode that has not ended is cut off.
        shard: plays its share of the episodes; all devices return those of all.

    Returns:
        The environment's metrics at the end of each episode, `episode_return`, `episode_length`, …;
        UNFINISHED; and, where rewards are not a team's, AGENT_RETURN, [M, N].
    """
    share = -(-num_episodes // shard.num_shards)

    def keys_of(key: Key[Array, ""]) -> Key[Array, "M"]:
        return shard.local_slice(jax.random.split(key, share * shard.num_shards))

    reset_key, play_key = jax.random.split(key)
    episodes = Episodes.start(env, policy, keys_of(reset_key), play_key)

    def step(episodes: Episodes) -> Episodes:
        act_key, env_key, next_key = jax.random.split(episodes.key, 3)
        before = episodes.timestep
        first = episodes.metrics["episode_length"] == 0
        memory, output = policy.act(
            episodes.memory, before.observation, first, keys_of(act_key), greedy=greedy
        )
        env_state, timestep = jax.vmap(env.step)(
            episodes.env_state, output.action, keys_of(env_key)
        )
        return episodes.after(env_state, timestep, memory, next_key)

    def goes_on(episodes: Episodes) -> Bool[Array, ""]:
        return jnp.any(~episodes.over & (episodes.metrics["episode_length"] < max_steps))

    episodes = lax.while_loop(goes_on, step, episodes)
    metrics = episodes.metrics | {UNFINISHED: (~episodes.over).astype(jnp.float32)}
    if episodes.agent_return is not None:
        metrics |= {AGENT_RETURN: episodes.agent_return}
    return {name: shard.gather(value)[:num_episodes] for name, value in metrics.items()}


def with_kinds(
    metrics: Mapping[str, Any], spec: EnvSpec, *, each_agent: bool = False
) -> dict[str, Any]:
    """Replace AGENT_RETURN by `return_<kind>`, the mean over the agents of a kind.

    Args:
        metrics: of episodes, as `evaluate` returns them.
        spec: of the environment.
        each_agent: keep AGENT_RETURN.
    """
    metrics = dict(metrics)
    if (of_agents := metrics.get(AGENT_RETURN)) is None:
        return metrics
    if not each_agent:
        del metrics[AGENT_RETURN]
    kinds = agents_by_kind(spec.agent_names or ())
    return metrics | {
        f"return_{kind}": of_agents[..., rows].mean(-1) for kind, rows in kinds.items()
    }


def agents_by_kind(names: tuple[str, ...]) -> dict[str, Int[np.ndarray, "n"]]:
    """Return the agents of each kind, which is a name without the number at its end.

    There are none where all are of one kind, or there are more than MOST_KINDS.
    """
    kinds = [re.sub(r"[\W_]*\d+$", "", name) or "agent" for name in names]
    different = dict.fromkeys(kinds)
    if not 1 < len(different) <= MOST_KINDS:
        return {}
    return {kind: np.flatnonzero([kind == other for other in kinds]) for kind in different}
