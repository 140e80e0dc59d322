"""Many lanes of one environment in one compiled step, of which some deviate on purpose.

Lanes come in groups. All lanes of a group share the keys of reset and step, and the noise that
their random legal actions are made of, except that

    lane 0      is the episode that is recorded
    lane 1      every agent draws on other noise
    lane 2      every dead agent does
    lane 3 + j  agent `probed[j]` does

so whatever differs from lane 0 is the effect of those agents' actions.
"""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mam.envs.check.recording import choose, differs
from mam.types import Action, EnvSpec, EnvState, Observation, TimeStep

DEAD_LANE, AGENT_LANES = 2, 3


class Carry(eqx.Module):
    """All lanes at one step."""

    state: EnvState  # [L, …]
    observation: Observation  # [L, …]


class Record(eqx.Module):
    """A step as it is kept: lane 0 of every group, and how the V other lanes differ from it."""

    timestep: TimeStep  # [G, …]
    action: Action  # [G, …]
    clocks: Float[Array, "G K"]
    acts: Bool[Array, "G V N"]  # the agent's action differs
    sees: Bool[Array, "G V N"]  # the agent's next view or grid differs
    rest: Bool[Array, "G V"]  # anything else that is seen or earned differs
    ended: Bool[Array, "G V"]


@dataclass(frozen=True)
class Lanes:
    """`num_groups` groups of lanes as two functions to compile."""

    env: Any
    spec: EnvSpec
    num_groups: int
    num_probed: int

    @property
    def group_size(self) -> int:
        return AGENT_LANES + self.num_probed

    def begin(self, keys: Array) -> tuple[Carry, TimeStep, Array]:
        """Reset every group, repeat it in its lanes; also return lane 0's time step and clocks."""
        state, timestep = jax.vmap(self.env.reset)(jax.random.wrap_key_data(keys))
        carry = jax.tree.map(
            lambda x: jnp.repeat(x, self.group_size, axis=0), Carry(state, timestep.observation)
        )
        return carry, timestep, _clocks(state, self.num_groups)

    def advance(
        self, carry: Carry, keys: Array, noise: Array, probed: Array
    ) -> tuple[Carry, Record]:
        """Step all lanes.

        Args:
            carry: the lanes.
            keys: of every group's step, as numbers.
            noise: what actions are made of, the usual and the other, [2, G, N, A + 1].
            probed: the agents that deviate, one in each of the lanes 3, 4, …, [P].
        """
        mask, alive = (
            x.astype(bool) for x in (carry.observation.action_mask, carry.observation.alive)
        )
        usual, other = noise[:, :, None]
        deviates = self._deviates(self._grouped(alive), probed)
        noise = jnp.where(deviates[..., None], other, usual)
        action = choose(self.spec, mask, noise.reshape(-1, *noise.shape[2:]), jnp)
        keys = jnp.repeat(keys, self.group_size, axis=0)
        state, timestep = jax.vmap(self.env.step)(
            carry.state, action, jax.random.wrap_key_data(keys)
        )
        record = Record(
            timestep=jax.tree.map(self._recorded, timestep),
            action=self._recorded(action),
            clocks=self._recorded(_clocks(state, len(keys))),
            acts=self._deviation(action, per_agent=True),
            sees=self._deviation(
                timestep.observation.agents_view, timestep.observation.grid, per_agent=True
            ),
            rest=self._deviation(
                *(
                    timestep.observation.action_mask,
                    timestep.observation.alive,
                    timestep.observation.state,
                    timestep.observation.positions,
                ),
                *(timestep.reward, timestep.terminated, timestep.truncated),
            ),
            ended=self._grouped(timestep.terminated.astype(bool) | timestep.truncated.astype(bool))[
                :, 1:
            ],
        )
        return Carry(state, timestep.observation), record

    def _deviates(self, alive: Array, probed: Array) -> Array:
        """Say which agents draw on the other noise, [G, 1 + V, N], as in the module's table."""
        nobody, everybody = jnp.zeros_like(alive[:, :1]), jnp.ones_like(alive[:, :1])
        one_each = probed[:, None] == jnp.arange(self.spec.num_agents)
        one_each = jnp.broadcast_to(one_each, (self.num_groups, *one_each.shape))
        return jnp.concatenate(
            [nobody, everybody, ~alive[:, DEAD_LANE : DEAD_LANE + 1], one_each], axis=1
        )

    def _grouped(self, x: Array) -> Array:
        return x.reshape(self.num_groups, self.group_size, *x.shape[1:])

    def _recorded(self, x: Array) -> Array:
        return x[:: self.group_size]

    def _deviation(self, *fields: Array | None, per_agent: bool = False) -> Array:
        """Say whether lanes 1, 2, … differ from lane 0, [G, V] or [G, V, N]."""
        found: Any = False
        for x in fields:
            if x is not None:
                lanes = self._grouped(x)
                different = differs(lanes[:, 1:], lanes[:, :1], jnp)
                found |= different.any(axis=tuple(range(2 + per_agent, different.ndim)))
        return found


def _clocks(state: EnvState, num_lanes: int) -> Array:
    """Return the single numbers of every lane's state, [lanes, K]."""
    numbers = [
        x for x in jax.tree.leaves(state) if x.ndim == 1 and jnp.issubdtype(x.dtype, jnp.number)
    ]
    return (
        jnp.stack([x.astype(jnp.float32) for x in numbers], axis=1)
        if numbers
        else jnp.zeros((num_lanes, 0))
    )
