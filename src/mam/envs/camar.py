"""CAMAR (`camar/…`): continuous routing of many agents, each to its own goal among obstacles.

What an agent sees does not depend on how many there are: the way to its goal, and what is nearest
to it. CAMAR takes seconds to import and starts JAX's backend, so that waits until the first task is
made.

Source: CAMAR (arXiv 2508.12845), package camar.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from mam.envs.base import Metrics, restart, strongly_typed, transition
from mam.envs.jaxmarl.base import draw_discs, require_positive
from mam.envs.tasks import CAMAR_TASKS
from mam.errors import UserError
from mam.types import EnvSpec, EnvState, Observation, TimeStep

# CAMAR's limit of 100 is compared before the step is counted, so one more is taken.
CAMAR_TIME_LIMIT = 101


# Three aisles between shelves, the map of `camar/text` unless a file is given.
SHELVES = """
................
................
..####..####..##
..####..####..##
................
................
##..####..####..
##..####..####..
................
................
"""


def make_camar(task: str) -> "CamarEnv":
    """Make a task of `CAMAR_TASKS`: so many agents on CAMAR's random grids."""
    env = make_camar_auto(**CAMAR_TASKS[task])
    return replace(env, spec=replace(env.spec, name=f"camar/{task}"))


def make_camar_auto(
    agents: int = 32,
    rows: int = 20,
    columns: int = 20,
    density: float = 0.2,
    nearest: int = 3,
    shaping: float = 1.0,
    frameskip: int = 2,
    differential: bool = False,
    limit: int = CAMAR_TIME_LIMIT,
) -> "CamarEnv":
    """Make random grids of any size.

    Args:
        agents: how many.
        rows: cells from top to bottom.
        columns: cells from left to right.
        density: share of the cells that are obstacles.
        nearest: other agents and obstacles that an agent sees.
        shaping: reward for each unit of length that an agent comes nearer to its goal.
        frameskip: moves of 0.01 s, in which an agent gets 2 mm far, after the first of each step.
        differential: agents drive on two wheels instead of being pushed in any direction.
        limit: time limit.

    Raises:
        UserError: an option is out of range, or the agents do not fit.
    """
    name = "camar/auto"
    require_positive(name, agents=agents, rows=rows, columns=columns, nearest=nearest, limit=limit)
    if not 0 <= density < 1:
        raise UserError(f"{name}: density must lie in [0, 1), got {density}")
    free = rows * columns - int(density * rows * columns)
    if 2 * agents > free:
        raise UserError(
            f"{name}: agents and their goals need a cell each, "
            f"{2 * agents} of which {free} are free at {rows=}, {columns=}, {density=}"
        )
    from camar.maps import random_grid

    from mam.envs import camar_cells as cells

    world = random_grid(rows, columns, density, agents)
    places = cells.grid_places(world)
    return _make(name, world, places, nearest, shaping, frameskip, differential, limit)


def make_camar_caves(
    agents: int = 32,
    size: int = 128,
    nearest: int = 3,
    shaping: float = 1.0,
    frameskip: int = 2,
    differential: bool = False,
    limit: int = CAMAR_TIME_LIMIT,
) -> "CamarEnv":
    """Make caves, the free parts of Perlin noise, drawn anew in every episode.

    Args:
        agents: how many; each twice as wide as a cell.
        size: cells from side to side.
        nearest: as in `make_camar_auto`.
        shaping: as there.
        frameskip: as there.
        differential: as there.
        limit: time limit.

    Raises:
        UserError: an option is out of range, or the agents do not fit.
    """
    name = "camar/caves"
    require_positive(name, agents=agents, nearest=nearest, limit=limit)
    if size < 14:
        raise UserError(f"{name}: size must be at least 14, got {size}")
    from camar.maps import caves_cont

    from mam.envs import camar_cells as cells

    world = caves_cont(size, size, num_agents=agents)
    _require_room(name, agents, world.free_rank)
    places = cells.cave_places(world)
    return _make(name, world, places, nearest, shaping, frameskip, differential, limit)


def make_camar_text(
    file: str = "",
    agents: int = 8,
    nearest: int = 3,
    shaping: float = 1.0,
    frameskip: int = 2,
    differential: bool = False,
    limit: int = CAMAR_TIME_LIMIT,
) -> "CamarEnv":
    """Make maps that are drawn as text: `#`, `@` and `*` are obstacles, all else is free.

    Args:
        file: one map, or several of one size with a blank line between, of which every episode
            draws one; MovingAI's header may stand first. Shelves and aisles if it is empty.
        agents: how many.
        nearest: as in `make_camar_auto`.
        shaping: as there.
        frameskip: as there.
        differential: as there.
        limit: time limit.

    Raises:
        UserError: an option is out of range, the file holds no maps, or the agents do not fit.
    """
    name = "camar/text"
    require_positive(name, agents=agents, nearest=nearest, limit=limit)
    from camar.maps import batched_string_grid

    from mam.envs import camar_cells as cells

    maps = _read_maps(name, file)
    _require_room(
        name, agents, min(sum(cell not in "#@*" for cell in "".join(one)) for one in maps)
    )
    world = batched_string_grid(["\n".join(one) for one in maps], num_agents=agents)
    places = cells.text_places(world)
    return _make(name, world, places, nearest, shaping, frameskip, differential, limit)


def _read_maps(name: str, file: str) -> list[list[str]]:
    """Return the lines of every map."""
    try:
        text = Path(file).read_text() if file else SHELVES
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: no maps can be read from {file}: {error}") from None
    text = text.partition("\nmap\n")[2] if text.startswith("type") else text
    blocks = re.split(r"\n\s*\n", text.replace("\r", "").strip())
    maps = [[line.strip() for line in block.split("\n")] for block in blocks]
    sizes = {(len(one), len(line)) for one in maps for line in one}
    if len(sizes) > 1:
        raise UserError(f"{name}: all lines and all maps of {file} must be of one length")
    return maps


def _require_room(name: str, agents: int, free: int) -> None:
    if agents > free:
        raise UserError(f"{name}: {agents} agents need a cell each, of which {free} are free")


def _make(
    name: str,
    world: Any,
    places: list[np.ndarray],
    nearest: int,
    shaping: float,
    frameskip: int,
    differential: bool,
    limit: int,
) -> "CamarEnv":
    """Return the environment of a map, `camar.maps.base_map`, whose obstacles stand at `places`."""
    if frameskip < 0:
        raise UserError(f"{name}: frameskip must be at least 0, got {frameskip}")
    from camar import camar_v0

    from mam.envs.camar_cells import CellCamar

    dynamic = "DiffDriveDynamic" if differential else "HolonomicDynamic"
    suite: Any = camar_v0(
        world,
        dynamic,
        max_steps=limit - 1,
        max_obs=nearest,
        pos_shaping_factor=shaping,
        frameskip=frameskip,
    )
    spec = EnvSpec(
        name,
        world.num_agents,
        suite.observation_size,
        suite.action_size,
        limit,
        continuous=True,
        team_reward=False,
        position_dim=2,
    )
    return CamarEnv(spec, CellCamar(suite, places))


@dataclass(frozen=True)
class CamarEnv:
    """Routing: real components of a force, or speeds of two wheels, in [-1, 1].

    An agent earns 0.5 on its goal, 0.5 when all are on theirs, −1 for a collision, and for coming
    nearer. The episode ends when all are on their goals. Metrics: `success_rate`, the share of the
    agents on their goals; `flow_time` and `makespan`, the sum and the largest of the seconds until
    agents reached their goals (the limit, where they have not); `collisions`, steps of an agent in
    which it touched something; `coordination`, the share of steps in which agents did not.
    """

    spec: EnvSpec
    env: Any  # mam.envs.camar_cells.CellCamar

    def reset(self, key: Key[Array, ""]) -> tuple[EnvState, TimeStep]:
        views, state = self.env.reset(key)
        state = strongly_typed(state)
        return state, restart(self._observe(views, state), self._metrics(state))

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
            metrics=self._metrics(state),
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
        half = math.ceil(max(world.width, world.height) / 2 + world.landmark_rad)
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

    def _metrics(self, state: Any) -> Metrics:
        time, never = state.time_to_reach_goal, self.env.max_time
        # The suite's time of those who never were there is that of the step before the last.
        latest = self.spec.time_limit * self.env.step_dt
        time = jnp.where((time >= never) & ~state.on_goal, latest, time)
        collisions = state.num_collisions.astype(jnp.float32).mean()
        return {
            "success_rate": state.on_goal.mean(),
            "flow_time": time.sum(),
            "makespan": time.max(),
            "collisions": collisions,
            "coordination": 1 - collisions / jnp.maximum(state.step, 1),
        }
