"""CAMAR (`camar/…`): continuous routing of many agents, each to its own goal among obstacles.

What an agent sees does not depend on how many there are: the way to its goal, and what is nearest
to it. CAMAR takes seconds to import and starts JAX's backend, so that waits until the first task is
made.

Source: CAMAR (arXiv 2508.12845), package camar.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from mam.envs.base import Metrics, restart, strongly_typed, transition
from mam.envs.jaxmarl.base import draw_discs, require_positive
from mam.errors import UserError
from mam.types import EnvSpec, EnvState, Observation, TimeStep

# CAMAR's limit of 100 is compared before the step is counted, so one more is taken.
CAMAR_TIME_LIMIT = 101


def make_camar(task: str) -> "CamarEnv":
    """Make a task of `CAMAR_TASKS`: so many agents on CAMAR's own random grids."""
    env = make_camar_auto(int(task.removeprefix("random_grid-")))
    return replace(env, spec=replace(env.spec, name=f"camar/{task}"))


def make_camar_auto(
    agents: int = 32,
    rows: int = 20,
    columns: int = 20,
    density: float = 0.2,
    nearest: int = 3,
    shaping: float = 1.0,
    differential: bool = False,
    limit: int = CAMAR_TIME_LIMIT,
) -> "CamarEnv":
    """Make random grids of any size; time grows with agents times obstacles, and agents squared.

    Args:
        agents: how many.
        rows: cells from top to bottom.
        columns: cells from left to right.
        density: share of the cells that are obstacles.
        nearest: other agents and obstacles that an agent sees.
        shaping: reward for each unit of length that an agent comes nearer to its goal.
        differential: agents drive on two wheels instead of being pushed in any direction.
        limit: time limit.

    Raises:
        UserError: an option is out of range, or the agents do not fit.
    """
    require_positive(
        "camar/auto", agents=agents, rows=rows, columns=columns, nearest=nearest, limit=limit
    )
    if not 0 <= density < 1:
        raise UserError(f"camar/auto: density must lie in [0, 1), got {density}")
    free = rows * columns - int(density * rows * columns)
    if 2 * agents > free:
        raise UserError(
            f"camar/auto: agents and their goals need a cell each, "
            f"{2 * agents} of which {free} are free at {rows=}, {columns=}, {density=}"
        )
    from camar import camar_v0

    sizes = {"num_rows": rows, "num_cols": columns, "obstacle_density": density}
    env: Any = camar_v0(
        "random_grid",
        "DiffDriveDynamic" if differential else "HolonomicDynamic",
        max_steps=limit - 1,
        max_obs=nearest,
        pos_shaping_factor=shaping,
        map_kwargs=sizes | {"num_agents": agents},
    )
    spec = EnvSpec(
        "camar/auto",
        agents,
        env.observation_size,
        env.action_size,
        limit,
        continuous=True,
        team_reward=False,
        position_dim=2,
    )
    return CamarEnv(spec, env)


@dataclass(frozen=True)
class CamarEnv:
    """Routing: real components of a force, or speeds of two wheels, in [-1, 1].

    An agent earns 0.5 on its goal, 0.5 when all are on theirs, −1 for a collision, and for coming
    nearer. The episode ends when all are on their goals. Metrics: `success_rate`, the share of the
    agents on their goals; `flow_time` and `makespan`, the sum and the largest of the seconds until
    agents reached their goals (the limit, where they have not); `collisions`, steps of an agent in
    which it touched something.
    """

    spec: EnvSpec
    env: Any  # camar.environment.Camar

    def reset(self, key: Key[Array, ""]) -> tuple[EnvState, TimeStep]:
        views, state = self.env.reset(key)
        state = strongly_typed(state)
        return state, restart(self._observe(views, state), _metrics(state))

    def step(
        self, state: EnvState, action: Float[Array, "N A"], key: Key[Array, ""]
    ) -> tuple[EnvState, TimeStep]:
        views, state, reward, _, _ = self.env.step(key, state, action)
        state = strongly_typed(state)
        terminated = state.on_goal.all()
        return state, transition(
            self._observe(views, state),
            reward=reward[:, 0],
            terminated=terminated,
            truncated=(state.step >= self.spec.time_limit) & ~terminated,
            metrics=_metrics(state),
        )

    def animate(self, states: list[EnvState], path: Path) -> None:
        """Write a GIF: obstacles dark, agents blue, their goals green."""
        world, frames = self.env.map_generator, jax.device_get(states)
        positions = np.stack(
            [
                np.concatenate([f.landmark_pos, f.goal_pos, f.physical_state.agent_pos])
                for f in frames
            ]
        )
        n = self.spec.num_agents
        counts = (positions.shape[1] - 2 * n, n, n)
        # Goals are drawn as large as agents: they are specks.
        radius = np.repeat([world.landmark_rad, world.agent_rad, world.agent_rad], counts)
        colours = np.repeat(np.array([[0.2, 0.2, 0.2], [0, 0.7, 0.3], [0, 0.3, 0.9]]), counts, 0)
        half = math.ceil(np.abs(positions).max() + world.landmark_rad)
        colours = np.broadcast_to(colours, (*positions.shape[:2], 3))
        draw_discs(positions, radius, colours, (-half, half), path)

    def _observe(self, views: Float[Array, "N O"], state: Any) -> Observation:
        n, num_actions = self.spec.num_agents, self.spec.num_actions
        return Observation(
            views,
            jnp.ones((n, num_actions), bool),
            alive=jnp.ones(n, bool),
            positions=state.physical_state.agent_pos,
        )


def _metrics(state: Any) -> Metrics:
    return {
        "success_rate": state.on_goal.mean(),
        "flow_time": state.time_to_reach_goal.sum(),
        "makespan": state.time_to_reach_goal.max(),
        "collisions": state.num_collisions.astype(jnp.float32).mean(),
    }
