"""Networks of agents that are read one by one: a view, hidden layers, a memory, a head.

They are the actors and critics of independent policies, and critics of sequence policies. Their
layers are those of the sequence policies, with which they are compared, or plain ones
(`NetworkConfig.plain`), as in most other libraries.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from mam.config import NetworkConfig
from mam.errors import UserError
from mam.networks.actions import ActionDistribution
from mam.networks.embed import ObservationEmbedding
from mam.networks.heads import Head, PlainHead
from mam.networks.layers import HIDDEN_GAIN, Dense, LayerNorm, activate
from mam.networks.memory.base import AbstractRecurrence, unroll_successors
from mam.networks.memory.registry import make_memory
from mam.types import Action, EnvSpec, Memory, Observation, Reset


class GlobalView(eqx.Module):
    """The view of an agent beside the global state: x_i = LN(GELU(embed(o_i) + W s)).

    s is the environment's global state; where it gives none, the embedded observations of all
    agents side by side, zeros for the dead.

    A plain one is one dense layer, x_i = ReLU(V o_i + W s), and reads observations as they are.

    Source: Yu et al. 2022 (arXiv 2103.01955), §5.2 ("agent-specific" state). Difference: their
    first layer is dense, as the plain one's.
    """

    embed: ObservationEmbedding
    state_norm: LayerNorm | None  # None where the environment gives no state, or a normalised one
    joint: Dense
    norm: LayerNorm | None  # None if plain

    def __init__(self, spec: EnvSpec, config: NetworkConfig, *, key: Key[Array, ""]):
        embed_key, joint_key = jax.random.split(key)
        d_model = config.d_model
        self.embed = ObservationEmbedding(spec, config, key=embed_key)
        by_layer = config.observation_norm == "layer"
        self.state_norm = (
            LayerNorm(spec.state_dim) if by_layer and spec.state_dim is not None else None
        )
        seen_dim = self.embed.dense.weight.shape[0] if config.plain else d_model
        joint_dim = spec.num_agents * seen_dim if spec.state_dim is None else spec.state_dim
        self.joint = Dense(joint_dim, d_model, key=joint_key, gain=HIDDEN_GAIN)
        self.norm = None if config.plain else LayerNorm(d_model)

    def __call__(self, obs: Observation) -> Float[Array, "*batch N E"]:
        if self.norm is None:
            seen = self.embed.features(obs)
            own = self.embed.dense(seen)
        else:
            seen = own = self.embed(obs)
        if obs.state is not None:
            joint = obs.state if self.state_norm is None else self.state_norm(obs.state)
        else:
            joint = jnp.where(obs.alive[..., None], seen, 0.0).reshape(*seen.shape[:-2], -1)
        return activate(own + self.joint(joint)[..., None, :], self.norm)


class PooledView(eqx.Module):
    """The view of an agent beside the mean of the living.

        x_i = LN(GELU(embed(o_i) + W mean_j embed(o_j)))

    or ReLU(…) without the norm, if plain. Its weights serve any number of agents, at linear cost.

    Source: the mean embedding of Hüttenrauch et al. 2019 (arXiv 1807.06613), §3.2.
    """

    embed: ObservationEmbedding
    pooled: Dense
    norm: LayerNorm | None  # None if plain

    def __init__(self, spec: EnvSpec, config: NetworkConfig, *, key: Key[Array, ""]):
        embed_key, pooled_key = jax.random.split(key)
        self.embed = ObservationEmbedding(spec, config, key=embed_key)
        self.pooled = Dense(config.d_model, config.d_model, key=pooled_key, gain=HIDDEN_GAIN)
        self.norm = None if config.plain else LayerNorm(config.d_model)

    def __call__(self, obs: Observation) -> Float[Array, "*batch N E"]:
        own, alive = self.embed(obs), obs.alive[..., None]
        total = jnp.sum(jnp.where(alive, own, 0.0), axis=-2, keepdims=True)
        count = jnp.maximum(jnp.sum(alive, axis=-2, keepdims=True), 1)
        return activate(own + self.pooled(total / count), self.norm)


View = ObservationEmbedding | GlobalView | PooledView
# What a critic of its own reads, by its name in `network.critic`.
VIEWS: dict[str, Callable[..., View]] = {
    "own": ObservationEmbedding,
    "joint": GlobalView,
    "pooled": PooledView,
}


class Tower(eqx.Module):
    """From observations to an output per agent: view, `num_blocks` hidden layers, memory, head."""

    view: View
    layers: tuple[Dense, ...]
    norms: tuple[LayerNorm | None, ...]
    memory: AbstractRecurrence
    head: Head | PlainHead

    def __init__(
        self,
        view: View,
        out_dim: int,
        distribution: ActionDistribution,
        config: NetworkConfig,
        *,
        key: Key[Array, ""],
    ):
        """Build the layers.

        Args:
            view: what it reads.
            out_dim: O, numbers put out for an agent.
            distribution: of an agent's actions.
            config: of the network.
            key: of the weights.
        """
        memory_key, head_key, *layer_keys = jax.random.split(key, 2 + config.num_blocks)
        d_model = config.d_model
        self.view = view
        self.layers = tuple(Dense(d_model, d_model, key=k, gain=HIDDEN_GAIN) for k in layer_keys)
        self.norms = tuple(None if config.plain else LayerNorm(d_model) for _ in layer_keys)
        self.memory = make_memory(config, distribution, key=memory_key)
        self.head = (PlainHead if config.plain else Head)(d_model, out_dim, key=head_key)

    def _features(self, obs: Observation) -> Float[Array, "*batch N E"]:
        x = self.view(obs)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = activate(layer(x), norm)
        return x

    def step(self, memory: Memory, obs: Observation, reset: Bool[Array, "*batch"]):
        """Return the memory after one environment step, and the output [*batch, N, out_dim].

        Args:
            memory: before the step.
            obs: what the agents see at the step.
            reset: whether the step is the first of its episode.
        """
        memory, x = self.memory.step(memory, self._features(obs), reset)
        return memory, self.head(x)

    def follow(
        self, memory: Memory, obs: Observation, action: Action, reset: Bool[Array, "*batch"]
    ) -> Memory:
        """Return the memory after one environment step and what was done at it.

        Args:
            memory: before the step.
            obs: what the agents see at the step.
            action: what they did.
            reset: whether the step is the first of its episode.
        """
        return self.memory.note(self.step(memory, obs, reset)[0], action)

    def unroll(
        self, memory: Memory, obs: Observation, reset: Bool[Array, "*batch"], action: Action
    ) -> Float[Array, "*batch N O"]:
        """Return the outputs of T steps, of which `memory` is what it was before the first.

        Args:
            memory: without the time axis.
            obs: what the agents see at step t, time first.
            reset: whether step t is the first of its episode.
            action: what the agents did at step t.
        """
        return self.head(self.memory.unroll(memory, self._features(obs), reset, action)[1])

    def successors(
        self, memory: Memory, obs: Observation, action: Action, reset: Reset, successor: Observation
    ) -> Float[Array, "*batch N O"]:
        """Return the outputs for what followed each step, from one memory.

        Args:
            memory: before the first step, without the time axis.
            obs: what the agents saw at step t, time first.
            action: the joint action at t, which the memory may read.
            reset: whether step t was the first of its episode.
            successor: what the action at t led to, before any auto-reset.
        """
        x, successor_x = self._features(obs), self._features(successor)
        return self.head(unroll_successors(self.memory, memory, x, reset, action, successor_x))


def make_critic(
    config: NetworkConfig,
    spec: EnvSpec,
    distribution: ActionDistribution,
    *,
    view_key: Key[Array, ""],
    key: Key[Array, ""],
) -> Tower:
    """Build the network for values alone that `config.critic` names.

    Args:
        config: of the networks, with `critic` a name of `VIEWS`.
        spec: of the task.
        distribution: of an agent's actions, which a memory may read.
        view_key: of the view's weights.
        key: of the others.

    Raises:
        UserError: where the critic is no such network.
    """
    if config.critic not in VIEWS:
        raise UserError(
            f"network.critic must be {', '.join(VIEWS)} where agents decide by themselves, "
            f"got {config.critic}"
        )
    view = VIEWS[config.critic](spec, config, key=view_key)
    return Tower(view, 1, distribution, config, key=key)
