"""Baselines: MAT's published way to decode, on the library's own weights, and fair sizes."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count as whole_numbers

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Key

from mam.config import NetworkConfig
from mam.networks.actions import agent_noise
from mam.networks.order import order_agents
from mam.networks.order import take_agents as _rows
from mam.networks.sequence import SequencePolicy
from mam.study.bench.inputs import count, policy_shapes
from mam.types import EnvSpec, Observation, PolicyOutput


def act_uncached(
    policy: SequencePolicy, obs: Observation, key: Key[Array, "*batch"], steps: int | Int[Array, ""]
) -> PolicyOutput:
    """Act by MAT's published decoding, which runs the whole decoder over all agents for each agent.

    With all steps it chooses what `policy.act` chooses: the noise is the same. Source: the code of
    MAT (arXiv 2205.14953), where no key or value is kept from one agent to the next.

    Args:
        policy: any policy of this kind; its decoder is run in the parallel form only.
        obs: what the agents see.
        key: one per batch element.
        steps: how many agents decide, at most N; what is returned for the others means nothing.
    """
    distribution = policy.distribution
    # 1. What does not depend on the actions, for all agents at once, in the order of deciding.
    order = order_agents(policy.order, obs)
    memory, first = policy.init_memory(order.shape[:-1]), jnp.ones(order.shape[:-1], bool)
    x = policy.memory.step(memory.agents, policy.embed(obs), first)[1]
    _, obs_rep = policy.encode(memory.encoder, x, obs, order, first)
    _, value = policy.values(memory.critic, obs_rep, obs, order, first)
    mask = _rows(obs.action_mask, order)
    noise = _rows(agent_noise(distribution, key, obs.alive.shape[-1]), order)

    # 2. One agent after another.
    axis = order.ndim - 1  # of the agents

    def decide(k: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        action, out = carry
        rows = (policy.decoder(distribution.token(action), obs_rep), mask, noise)
        out_k, mask_k, noise_k = (
            lax.dynamic_index_in_dim(v, k, axis, keepdims=False) for v in rows
        )
        chosen = distribution.sample_from_noise(out_k, mask_k, noise_k)
        return tuple(
            lax.dynamic_update_index_in_dim(*v, k, axis) for v in ((action, chosen), (out, out_k))
        )

    nobody = jnp.zeros_like(distribution.sample_from_noise(noise, mask, noise))
    action, out = lax.fori_loop(0, steps, decide, (nobody, jnp.zeros_like(noise)))
    # 3. Log-probabilities, and everything back in the order of the agents.
    log_prob, by_agent = distribution.log_prob(out, mask, action), jnp.argsort(order, axis=-1)
    return PolicyOutput(
        action=_rows(action, by_agent),
        log_prob=_rows(log_prob, by_agent),
        value=value,
        order=order,
    )


def matched_sizes(
    name: str, spec: EnvSpec, config: NetworkConfig, parameters: int
) -> NetworkConfig:
    """Return sizes whose d_model brings the named policy nearest to a number of parameters."""
    grain = math.lcm(8, config.num_heads)  # heads share d_model evenly

    def size(d_model: int) -> int:
        return count(policy_shapes(name, spec, replace(config, d_model=d_model)))

    return replace(config, d_model=matched_width(size, parameters, grain))


def matched_width(size: Callable[[int], int], parameters: int, grain: int = 1) -> int:
    """Return the width, a multiple of `grain`, that brings a size nearest to `parameters`.

    Args:
        size: number of parameters of a width, which grows with it.
        parameters: to come near to.
        grain: the smallest width.
    """
    larger = next(width for width in whole_numbers(grain, grain) if size(width) >= parameters)
    widths = (max(larger - grain, grain), larger)
    return min(widths, key=lambda width: abs(size(width) - parameters))
