"""Independent policies, the baselines: every agent decides by itself, with shared weights.

    ippo      the critic sees what the agent sees       (de Witt et al. 2020, arXiv 2011.09533)
    mappo     the critic sees the global state as well  (Yu et al. 2022, arXiv 2103.01955)

Both are a `Tower` for the actor and one for the critic: a view, hidden layers, a memory, a head.
Their layers are those of the sequence policies, with which they are compared, or plain ones
(`NetworkConfig.plain`), as in most other libraries.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from mam.config import NetworkConfig
from mam.networks.actions import ActionDistribution, agent_noise, make_distribution
from mam.networks.embed import ObservationEmbedding
from mam.networks.heads import Head, PlainHead
from mam.networks.layers import HIDDEN_GAIN, Dense, LayerNorm, activate
from mam.networks.memory.base import AbstractRecurrence, unroll_successors
from mam.networks.memory.registry import make_memory
from mam.types import (
    Action,
    EnvSpec,
    Evaluation,
    Greedy,
    Keys,
    Memory,
    Observation,
    Order,
    PolicyOutput,
    Reset,
)


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


class Tower(eqx.Module):
    """From observations to an output per agent: view, `num_blocks` hidden layers, memory, head."""

    view: ObservationEmbedding | GlobalView
    layers: tuple[Dense, ...]
    norms: tuple[LayerNorm | None, ...]
    memory: AbstractRecurrence
    head: Head | PlainHead

    def __init__(
        self,
        view: ObservationEmbedding | GlobalView,
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


class ActorCriticMemory(eqx.Module):
    """The memories of actor and critic, empty if they have none."""

    actor: PyTree
    critic: PyTree


class IndependentPolicy(eqx.Module):
    """Actor and critic shared by all agents: π(a | o) = Π_i π(a_i | o_i)."""

    actor: Tower
    critic: Tower
    distribution: ActionDistribution
    num_agents: int = eqx.field(static=True)

    def __init__(
        self,
        spec: EnvSpec,
        config: NetworkConfig,
        *,
        critic_view: Callable[..., ObservationEmbedding | GlobalView],
        key: Key[Array, ""],
    ):
        actor_view_key, critic_view_key, actor_key, critic_key = jax.random.split(key, 4)
        actor_view = ObservationEmbedding(spec, config, key=actor_view_key)
        self.distribution = make_distribution(spec)
        self.actor = Tower(
            actor_view, self.distribution.num_outputs, self.distribution, config, key=actor_key
        )
        self.critic = Tower(
            critic_view(spec, config, key=critic_view_key),
            1,
            self.distribution,
            config,
            key=critic_key,
        )
        self.num_agents = spec.num_agents

    @property
    def value_layer(self) -> Dense:
        """The value head's last layer."""
        return self.critic.head.out

    def init_memory(self, batch: tuple[int, ...] = ()) -> Memory:
        """Return the memories of actor and critic before an episode; see `mam.types.Policy`."""
        shape = (*batch, self.num_agents)
        return ActorCriticMemory(
            actor=self.actor.memory.init(shape), critic=self.critic.memory.init(shape)
        )

    def act(
        self, memory: Memory, obs: Observation, reset: Reset, key: Keys, *, greedy: Greedy = False
    ) -> tuple[Memory, PolicyOutput]:
        """Choose all agents' actions at once.

        Args:
            memory: of actor and critic, after step t − 1.
            obs: at step t; the actor reads an agent's own view, the critic its view of the whole.
            reset: whether t is the first step of an episode.
            key: gives every agent noise of its own.
            greedy: take every agent's most likely action.

        Returns:
            The memories after step t, and the joint action; the order is that of the agents.
        """
        noise = agent_noise(self.distribution, key, obs.alive.shape[-1])
        return self.act_on_noise(memory, obs, reset, jnp.where(greedy, 0.0, noise))

    def act_on_noise(
        self, memory: Memory, obs: Observation, reset: Reset, noise: Float[Array, "*batch N Z"]
    ) -> tuple[Memory, PolicyOutput]:
        """Choose the actions that noise leads to, the most likely ones where it is zero.

        Args:
            memory: of actor and critic, after step t − 1.
            obs: at step t.
            reset: whether t is the first step of an episode.
            noise: of every agent, as `draw_noise` of the distribution draws it.
        """
        num_agents = obs.alive.shape[-1]
        actor, out = self.actor.step(memory.actor, obs, reset)
        critic, value = self.critic.step(memory.critic, obs, reset)
        action = self.distribution.sample_from_noise(out, obs.action_mask, noise)
        memory = ActorCriticMemory(
            actor=self.actor.memory.note(actor, action),
            critic=self.critic.memory.note(critic, action),
        )
        return memory, PolicyOutput(
            action=action,
            log_prob=self.distribution.log_prob(out, obs.action_mask, action),
            value=value[..., 0],
            order=jnp.broadcast_to(jnp.arange(num_agents, dtype=jnp.int32), obs.alive.shape),
        )

    def evaluate(
        self, memory: Memory, obs: Observation, action: Action, order: Order, reset: Reset
    ) -> Evaluation:
        """Evaluate stored joint actions, all steps in one pass.

        Args:
            memory: of actor and critic, before the first step.
            obs: time first where there is memory.
            action: of each agent, evaluated by itself.
            order: not read, for nobody reads others' actions.
            reset: whether a step was the first of its episode.
        """
        out = self.actor.unroll(memory.actor, obs, reset, action)
        return Evaluation(
            log_prob=self.distribution.log_prob(out, obs.action_mask, action),
            entropy=self.distribution.entropy(out, obs.action_mask),
            value=self.critic.unroll(memory.critic, obs, reset, action)[..., 0],
            distribution=self.distribution.parameters(out, obs.action_mask),
        )

    def follow(
        self, memory: Memory, obs: Observation, action: Action, order: Order, reset: Reset
    ) -> Memory:
        """Return the memory after a step at which another acted; see `FollowingPolicy`."""
        return ActorCriticMemory(
            actor=self.actor.follow(memory.actor, obs, action, reset),
            critic=self.critic.follow(memory.critic, obs, action, reset),
        )

    def successor_values(
        self, memory: Memory, obs: Observation, action: Action, reset: Reset, successor: Observation
    ) -> Float[Array, "*batch N"]:
        """Return the values of what followed every step; see `mam.types.Policy`."""
        return self.critic.successors(memory.critic, obs, action, reset, successor)[..., 0]
