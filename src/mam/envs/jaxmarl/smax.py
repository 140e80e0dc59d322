"""SMAX from JaxMARL (`smax/…`): battles like SMAC's, where agents die and others fight on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from mam.envs.base import Metrics
from mam.envs.jaxmarl.base import JaxMarlEnv, draw_discs, import_jaxmarl, require_positive
from mam.types import EnvSpec, EnvState, Observation

# JaxMARL's limit of 100 is compared before the step is counted, so one more is taken.
SMAX_TIME_LIMIT = 101


def make_smax(task: str) -> "SmaxEnv":
    """Make a task of `SMAX_TASKS`: a battle against scripted units that shoot at the closest.

    The team earns the share of the enemies' health it takes, and 1 for winning. Walls kill. In a
    smacv2 task units and positions are random; JaxMARL starts some of those units beyond a wall,
    and they die at once.
    """
    import_jaxmarl()
    from jaxmarl.environments.smax import map_name_to_scenario

    return _smax(f"smax/{task}", SMAX_TIME_LIMIT, scenario=map_name_to_scenario(task))


def make_smax_auto(
    agents: int = 8,
    enemies: int = 0,
    random_units: bool = False,
    map_size: int = 32,
    limit: int = SMAX_TIME_LIMIT,
) -> "SmaxEnv":
    """Make a battle of any size; all units see each other: memory and time grow with its square.

    Args:
        agents: how many; 256 marines a side still find room on the usual map.
        enemies: how many; 0: as many as agents.
        random_units: units and positions as in the smacv2 tasks, instead of marines in two groups.
            (Enemies in excess of the agents are marines all the same: a flaw of JaxMARL's.)
        map_size: length of the map's sides.
        limit: time limit.

    Raises:
        UserError: an option is out of range.
    """
    enemies = enemies or agents
    require_positive("smax/auto", agents=agents, enemies=enemies, map_size=map_size, limit=limit)
    import_jaxmarl()
    return _smax(
        "smax/auto",
        limit,
        num_allies=agents,
        num_enemies=enemies,
        smacv2_position_generation=random_units,
        smacv2_unit_type_generation=random_units,
        map_width=map_size,
        map_height=map_size,
    )


@dataclass(frozen=True)
class SmaxEnv(JaxMarlEnv):
    """A battle. Metric `won`: whether all enemies are dead and some agent is not.

    A dead agent sees zeros, may do nothing but stop, and goes on earning the team's reward. The
    global state is JaxMARL's, scaled to [0, 1]: positions by the map, weapon cooldowns by the
    longest, types by their number.
    """

    def _observe(self, views: Mapping[str, Array], state: Any) -> Observation:
        return Observation(
            self._stack(views),
            action_mask=self._stack(self.env.get_avail_actions(state)).astype(bool),
            alive=self._alive(state)[0],
            state=jnp.clip(views["world_state"] * self._world_scale(), 0, 1),
            positions=state.state.unit_positions[: self.spec.num_agents],
        )

    def _is_cut_off(self, state: Any) -> Bool[Array, ""]:
        allies, enemies = self._alive(state)
        return allies.any() & enemies.any()

    def _metrics(self, state: Any) -> Metrics:
        allies, enemies = self._alive(state)
        return {"won": (allies.any() & ~enemies.any()).astype(jnp.float32)}

    def _alive(self, state: Any) -> tuple[Bool[Array, "N"], Bool[Array, "M"]]:
        alive = state.state.unit_alive
        return alive[: self.spec.num_agents], alive[self.spec.num_agents :]

    def _world_scale(self) -> np.ndarray:
        env, num_units = self.env, self.env.num_allies + self.env.num_enemies
        cooldown = np.asarray(env.unit_type_weapon_cooldowns).max()
        unit = [1, 1 / env.map_width, 1 / env.map_height, 1 / cooldown, *[1] * env.unit_type_bits]
        unit_type = 1 / (env.unit_type_bits - 1)
        return np.array([*unit * num_units, *[1] * num_units, *[unit_type] * num_units], np.float32)

    def animate(self, states: list[EnvState], path: Path) -> None:
        """Write a GIF: agents blue, enemies red, paler the less health they have left."""
        # JaxMARL's viewer takes half a second for each frame, and minutes for an episode with many
        # units.
        battles = [state.state for state in jax.device_get(states)]
        types = battles[0].unit_types
        health = (
            np.stack([battle.unit_health for battle in battles])
            / np.asarray(self.env.unit_type_health)[types]
        )
        colours = np.zeros((*health.shape, 4))
        colours[:, : self.spec.num_agents, 2] = colours[:, self.spec.num_agents :, 0] = 1
        colours[..., 3] = np.where(health > 0, 0.2 + 0.8 * health, 0)
        positions = np.stack([battle.unit_positions for battle in battles])
        draw_discs(
            positions,
            np.asarray(self.env.unit_type_radiuses)[types],
            colours,
            (0, self.env.map_width),
            path,
        )


def _smax(name: str, limit: int, **settings: Any) -> SmaxEnv:
    from jaxmarl.environments.smax import HeuristicEnemySMAX

    env = HeuristicEnemySMAX(
        attack_mode="closest",
        see_enemy_actions=True,
        walls_cause_death=True,
        max_steps=limit - 1,
        **settings,
    )
    spec = EnvSpec(
        name,
        env.num_agents,
        env.obs_size,
        env.num_ally_actions,
        limit,
        state_dim=env.state_size,
        position_dim=2,
    )
    return SmaxEnv(spec, env)
