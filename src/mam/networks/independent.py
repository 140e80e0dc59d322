"""Independent policies, the baselines: every agent decides by itself, with shared weights.

    ippo      the critic sees what the agent sees       (de Witt et al. 2020, arXiv 2011.09533)
    mappo     the critic sees the global state as well  (Yu et al. 2022, arXiv 2103.01955)

Both are a `Tower` for the actor and one for the critic, whose view makes the difference
(`network.critic`).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from mam.config import NetworkConfig
from mam.networks.actions import ActionDistribution, agent_noise, make_distribution
from mam.networks.embed import ObservationEmbedding
from mam.networks.layers import Dense
from mam.networks.tower import Tower, make_critic
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
        key: Key[Array, ""],
    ):
        actor_view_key, critic_view_key, actor_key, critic_key = jax.random.split(key, 4)
        actor_view = ObservationEmbedding(spec, config, key=actor_view_key)
        self.distribution = make_distribution(spec)
        self.actor = Tower(
            actor_view, self.distribution.num_outputs, self.distribution, config, key=actor_key
        )
        self.critic = make_critic(
            config, spec, self.distribution, view_key=critic_view_key, key=critic_key
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
