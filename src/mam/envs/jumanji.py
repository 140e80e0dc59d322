"""Tasks of Jumanji: `lbf/…` (foraging), `rware/…` (warehouse), `connector/…`, `cleaner/…`.

All are cooperative here: every agent receives the team's reward. What agents see is in
`jumanji_grids`. Settings of the named tasks are those of the published MAM and Sable benchmarks
(Cleaner: Jumanji's own limits). Jumanji takes seconds to import and starts JAX's backend, so that
waits until the first task is made.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Int, Key

from mam.envs import jumanji_grids as grids
from mam.envs.base import Metrics, restart, strongly_typed, transition
from mam.envs.tasks import CLEANER_TASKS, CONNECTOR_TASKS, LBF_TASKS, RWARE_SIZES
from mam.errors import UserError
from mam.types import EnvSpec, EnvState, Observation, TimeStep

# What Jumanji's state and observation look like to the agents.
Observe = Callable[[Any, Any], Observation]
Measure = Callable[[Any], Metrics]  # metrics of Jumanji's state

LBF_TIME_LIMIT = 100
RWARE_TIME_LIMIT = 500


def make_lbf(task: str) -> "JumanjiEnv":
    """Make a task of `LBF_TASKS`.

    Agents (level 1 or 2) and food have levels; agents next to food that load at the same step eat
    it if their levels add up to its own. The return is at most 1: the share of all food, by level,
    that was eaten. "2s" = sight of 2 cells instead of the whole grid, "coop" = food so heavy that
    both must load. A flaw of Jumanji's generator is kept, because published scores have it: to keep
    agents off the food it excludes whole rows of the grid from their start positions.
    """
    from jumanji.environments.routing.lbf.env import LevelBasedForaging
    from jumanji.environments.routing.lbf.generator import RandomGenerator

    generator = RandomGenerator(**LBF_TASKS[task], max_agent_level=2)
    env = LevelBasedForaging(generator, time_limit=LBF_TIME_LIMIT + 1)
    return _adapt(f"lbf/{task}", env, LBF_TIME_LIMIT, grids.vector_view)


def make_lbf_auto(
    agents: int | tuple[int, int] = 8,
    food: int = 0,
    grid: int = 0,
    sight: int = 2,
    levels: int = 2,
    coop: bool = False,
    limit: int = 100,
) -> "JumanjiEnv":
    """Make LBF of any size; the size of its views depends on `sight` only, so `agents` may change.

    Agents start on any cells that hold nothing else, unlike in Jumanji's own generator (see
    `make_lbf`).

    Args:
        agents: how many; of a range, as in 8-64, another number in every episode. Those that are
            missing in one are dead from its start.
        food: items; 0: as many as agents.
        grid: rows and columns; 0: 16 cells for every agent and item.
        sight: cells to each side that an agent sees.
        levels: highest level of an agent, 2 or more.
        coop: every item takes as much as the three weakest agents have together.
        limit: time limit.

    Raises:
        UserError: it does not fit.
    """
    require = partial(_require, "lbf/auto")
    least, agents = agents if isinstance(agents, tuple) else (agents, agents)
    require("agents", least, at_least=1)
    require("agents", agents, at_least=least)
    as_many, food = not food, food or agents
    require("food", food, at_least=1)
    grid = grid or math.ceil(4 * math.sqrt(agents + food))
    require("grid", grid, at_least=5)
    inner = (grid - 2) ** 2  # food needs one of them, and keeps other food off the four beside it
    require("agents", agents, at_most=inner - 6, why=f" at {grid=}")
    require("food", food, at_most=(inner - agents - 1) // 5, why=f" at {grid=}, {agents=}")
    require("sight", sight, at_least=1, at_most=grid, why=f" at {grid=}")
    require("levels", levels, at_least=2)
    require("limit", limit, at_least=1)
    from jumanji.environments.routing.lbf.env import LevelBasedForaging

    fewest = least if least < agents else None
    generator = _anywhere(grid, agents, food, sight, levels, coop, fewest=fewest, as_many=as_many)
    env = LevelBasedForaging(generator, time_limit=limit + 1)
    name = _auto_name(
        "lbf",
        agents=agents if fewest is None else f"{least}-{agents}",
        food=food,
        grid=grid,
        sight=sight,
        levels=levels,
        coop=coop,
        limit=limit,
    )
    return _adapt(name, env, limit, partial(grids.local_view, grid_size=grid, sight=sight))


def make_rware(task: str) -> "JumanjiEnv":
    """Make a task of `RWARE_TASKS`.

    Robots carry requested shelves to a goal; the team earns 1 per delivery. Two robots on one cell
    end the episode. As many shelves are requested as there are robots, half as many in a "-hard"
    task.
    """
    size, agents, *hard = task.split("-")
    num_agents = int(agents.removesuffix("ag"))
    num_requests = num_agents // 2 if hard else num_agents
    return _warehouse(
        f"rware/{task}", *RWARE_SIZES[size], 8, num_agents, 1, num_requests, RWARE_TIME_LIMIT
    )


def make_rware_auto(
    agents: int = 4,
    rows: int = 1,
    columns: int = 3,
    height: int = 8,
    sight: int = 1,
    requests: int = 0,
    limit: int = 500,
) -> "JumanjiEnv":
    """Make RWARE of any size; the size of its views depends on `sight` only.

    Args:
        agents: robots.
        rows: clusters of shelves, one below the other.
        columns: clusters side by side; an odd number.
        height: shelves in a cluster, which is two wide.
        sight: cells to each side that a robot sees.
        requests: shelves requested at any time; 0: as many as robots.
        limit: time limit.

    Raises:
        UserError: it does not fit.
    """
    require = partial(_require, "rware/auto")
    requests = requests or agents
    for option, value in {
        "rows": rows,
        "columns": columns,
        "height": height,
        "sight": sight,
        "limit": limit,
    }.items():
        require(option, value, at_least=1)
    if columns % 2 == 0:
        raise UserError(f"rware/auto: columns must be odd, got {columns}")
    if rows * columns == 1:
        raise UserError("rware/auto: rows must be at least 2 with columns=1, got 1")
    size = f"{rows=}, {columns=}, {height=}"
    cells = ((height + 1) * rows + 2) * (3 * columns + 1)
    require("agents", agents, at_least=1, at_most=cells, why=f", the cells of {size}")
    shelves = 2 * height * (rows * columns - 1)  # a cluster is left out in front of the goals
    require(
        "requests",
        requests,
        at_least=1,
        at_most=shelves - 1,
        why=f", one less than the shelves of {size}",
    )
    name = _auto_name(
        "rware",
        agents=agents,
        rows=rows,
        columns=columns,
        height=height,
        sight=sight,
        requests=requests,
        limit=limit,
    )
    return _warehouse(name, rows, columns, height, agents, sight, requests, limit)


def make_connector(task: str) -> "JumanjiEnv":
    """Make a task of `CONNECTOR_TASKS`.

    Agents draw paths, which no agent can cross, from start to target. Connecting earns 1, every
    step before it costs 0.03. The episode ends when all are connected or stuck; a connected agent
    can but stand still.
    """
    from jumanji.environments.routing.connector.env import Connector
    from jumanji.environments.routing.connector.generator import RandomWalkGenerator

    size, num_agents = _square(task)
    time_limit = CONNECTOR_TASKS[task]
    env = Connector(
        RandomWalkGenerator(grid_size=size, num_agents=num_agents), time_limit=time_limit + 1
    )
    return _adapt(f"connector/{task}", env, time_limit, grids.connector_view, _share_connected)


def make_cleaner(task: str) -> "JumanjiEnv":
    """Make a task of `CLEANER_TASKS`.

    Agents start in one corner of a maze and clean the tiles they pass: the team earns 1 per tile,
    less 0.5 per step. The episode ends when all is clean, or an agent walks into a wall.
    """
    from jumanji.environments.routing.cleaner.env import Cleaner
    from jumanji.environments.routing.cleaner.generator import RandomGenerator

    size, num_agents = _square(task)
    time_limit = CLEANER_TASKS[task]
    env = Cleaner(
        RandomGenerator(num_rows=size, num_cols=size, num_agents=num_agents),
        time_limit=time_limit + 1,
    )
    return _adapt(f"cleaner/{task}", env, time_limit, grids.cleaner_view, _share_cleaned)


@dataclass(frozen=True)
class JumanjiEnv:
    """A Jumanji environment under this library's protocol.

    Jumanji's tasks disagree on the time limit: LBF and Connector truncate there, RWARE and Cleaner
    report a termination. The wrapped environment is therefore built with a limit one step beyond
    `spec.time_limit`, which it never reaches; an end that it reports is the task's own, and the
    limit is counted here.
    """

    spec: EnvSpec
    env: Any  # jumanji.Environment whose observation has step_count
    observe: Observe
    measure: Measure

    def reset(self, key: Key[Array, ""]) -> tuple[EnvState, TimeStep]:
        state, timestep = self.env.reset(key)
        observation = self.observe(state, timestep.observation)
        return strongly_typed(state), restart(observation, self.measure(state))

    def step(
        self, state: EnvState, action: Int[Array, "N"], key: Key[Array, ""]
    ) -> tuple[EnvState, TimeStep]:
        del key  # Jumanji keeps one in the state
        state, timestep = self.env.step(state, action)
        terminated = timestep.last()
        return strongly_typed(state), transition(
            self.observe(state, timestep.observation),
            reward=timestep.reward.sum(),  # LBF and Connector split it between the agents
            terminated=terminated,
            truncated=(timestep.observation.step_count >= self.spec.time_limit) & ~terminated,
            metrics=self.measure(state),
        )

    def animate(self, states: list[EnvState], path: Path) -> None:
        """Write a GIF of consecutive unbatched states, drawn by Jumanji's own viewer."""
        import matplotlib.pyplot as plt

        frames = jax.device_get([state.replace(key=None) for state in states])
        if hasattr(frames[0], "food_items"):
            frames = [grids.without_the_missing(state) for state in frames]
        with plt.rc_context({"animation.writer": "pillow"}):  # the default needs ffmpeg
            self.env.animate(frames, interval=150, save_path=str(path))


def _anywhere(*sizes: Any, fewest: int | None, as_many: bool) -> Any:
    """Make LBF's generator, except that agents start on any cells that hold nothing else.

    Args:
        *sizes: of Jumanji's generator.
        fewest: of the agents, the least that an episode has; None: all of them always.
        as_many: whether there is as much food as agents.
    """
    from jumanji.environments.routing.lbf.generator import RandomGenerator

    class Generator(RandomGenerator):
        def __call__(self, key: Key[Array, ""]) -> Any:
            number_key = jax.random.fold_in(key, 2)  # beside 0 and 1, into which it is split
            position_key, key = jax.random.split(key)
            state: Any = super().__call__(key)
            food_position, position = grids.draw_positions(
                position_key, self.grid_size, self.num_food, self.num_agents
            )
            state = state.replace(
                agents=state.agents.replace(position=position),
                food_items=state.food_items.replace(position=food_position),
            )
            if fewest is None:
                return state
            number = jax.random.randint(number_key, (), fewest, self.num_agents + 1)
            how = {"as_many": as_many, "coop": self.force_coop}
            return grids.with_fewer(state, number, self.grid_size, **how)

    return Generator(*sizes)


def _warehouse(
    name: str,
    rows: int,
    columns: int,
    height: int,
    agents: int,
    sight: int,
    requests: int,
    limit: int,
) -> JumanjiEnv:
    from jumanji.environments.routing.robot_warehouse.env import RobotWarehouse
    from jumanji.environments.routing.robot_warehouse.generator import RandomGenerator

    env = RobotWarehouse(
        RandomGenerator(rows, columns, height, agents, sight, requests), time_limit=limit + 1
    )
    return _adapt(name, env, limit, grids.vector_view)


def _adapt(
    name: str, env: Any, time_limit: int, observe: Observe, measure: Measure = lambda state: {}
) -> JumanjiEnv:
    def first(key: Key[Array, ""]) -> Observation:
        state, timestep = env.reset(key)
        return observe(state, timestep.observation)

    # Sizes as they are, nothing computed.
    observation = jax.eval_shape(first, jax.eval_shape(jax.random.key, 0))
    num_agents, obs_dim = observation.agents_view.shape
    spec = EnvSpec(
        name=name,
        num_agents=num_agents,
        obs_dim=obs_dim,
        num_actions=observation.action_mask.shape[-1],
        time_limit=time_limit,
        grid_shape=None if observation.grid is None else observation.grid.shape[1:],
        grid_dtype="bool",
        state_dim=None if observation.state is None else observation.state.size,
        position_dim=None if observation.positions is None else observation.positions.shape[-1],
    )
    return JumanjiEnv(spec, env, observe, measure)


def _share_connected(state: Any) -> Metrics:
    return {"connected": state.agents.connected.mean()}


def _share_cleaned(state: Any) -> Metrics:
    dirty, wall = ((state.grid == value).sum() for value in (0, 2))
    return {"cleaned": 1 - dirty / (state.grid.size - wall)}


def _square(task: str) -> tuple[int, int]:
    """Read "10x10x3a": size and number of agents."""
    size, _, agents = task.removesuffix("a").split("x")
    return int(size), int(agents)


def _auto_name(suite: str, **options: Any) -> str:
    return f"{suite}/auto:" + ",".join(
        f"{name}={str(value).lower()}" for name, value in options.items()
    )


def _require(
    task: str,
    name: str,
    value: int,
    *,
    at_least: int = 1,
    at_most: int | None = None,
    why: str = "",
) -> None:
    if value < at_least:
        raise UserError(f"{task}: {name} must be at least {at_least}, got {value}")
    if at_most is not None and value > at_most:
        raise UserError(f"{task}: {name} must be at most {at_most}{why}, got {value}")
