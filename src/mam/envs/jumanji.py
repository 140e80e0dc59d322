"""Level-Based Foraging (`lbf/…`) and the robotic warehouse (`rware/…`) from Jumanji.

Both are cooperative here: every agent receives the team's reward. Views are Jumanji's own integers as
floats, not normalised. Task settings are those of the published MAM and Sable benchmarks. Jumanji takes
seconds to import and starts JAX's backend, so that waits until the first task is made.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from mam.envs.base import restart, transition
from mam.errors import UserError
from mam.types import EnvSpec, EnvState, Observation, TimeStep

LBF_TIME_LIMIT = 100
RWARE_TIME_LIMIT = 500

# In the words of Jumanji's LBF generator; fov = field of view, in cells to each side.
LBF_TASKS: dict[str, dict[str, Any]] = {
    "2s-8x8-2p-2f-coop": {"grid_size": 8, "fov": 2, "num_agents": 2, "num_food": 2, "force_coop": True},
    "8x8-2p-2f-coop": {"grid_size": 8, "fov": 8, "num_agents": 2, "num_food": 2, "force_coop": True},
    "2s-10x10-3p-3f": {"grid_size": 10, "fov": 2, "num_agents": 3, "num_food": 3},
    "10x10-3p-3f": {"grid_size": 10, "fov": 10, "num_agents": 3, "num_food": 3},
    "15x15-3p-5f": {"grid_size": 15, "fov": 15, "num_agents": 3, "num_food": 5},
    "15x15-4p-3f": {"grid_size": 15, "fov": 15, "num_agents": 4, "num_food": 3},
    "15x15-4p-5f": {"grid_size": 15, "fov": 15, "num_agents": 4, "num_food": 5},
}

# Shelf clusters down and across; a task's name adds the number of agents.
RWARE_SIZES = {"tiny": (1, 3), "small": (2, 3), "medium": (2, 5), "large": (3, 5), "xlarge": (4, 5)}
RWARE_TASKS = (
    *("tiny-2ag", "tiny-2ag-hard", "tiny-4ag", "tiny-4ag-hard", "small-4ag", "small-4ag-hard"),
    *("medium-4ag", "medium-4ag-hard", "medium-6ag", "large-4ag", "large-4ag-hard"),
    *("large-8ag", "large-8ag-hard", "xlarge-4ag", "xlarge-4ag-hard"),
)


def make_lbf(task: str) -> "JumanjiEnv":
    """Makes a task of `LBF_TASKS`.

    Agents (level 1 or 2) and food have levels; agents next to food that load at the same step eat it if
    their levels add up to its own. The return is at most 1: the share of all food, by level, that was eaten.
    "2s" = sight of 2 cells instead of the whole grid, "coop" = food so heavy that both must load.
    A flaw of Jumanji's generator is kept, because published scores have it: to keep agents off the food it
    excludes whole rows of the grid from their start positions.
    """
    _require_jumanji()
    from jumanji.environments.routing.lbf.env import LevelBasedForaging
    from jumanji.environments.routing.lbf.generator import RandomGenerator

    generator = RandomGenerator(**LBF_TASKS[task], max_agent_level=2)
    env = LevelBasedForaging(generator, time_limit=LBF_TIME_LIMIT + 1)
    return JumanjiEnv(f"lbf/{task}", env, LBF_TIME_LIMIT)


def make_rware(task: str) -> "JumanjiEnv":
    """Makes a task of `RWARE_TASKS`.

    Robots carry requested shelves to a goal; the team earns 1 per delivery. Two robots on one cell end the
    episode. As many shelves are requested as there are robots, half as many in a "-hard" task.
    """
    _require_jumanji()
    from jumanji.environments.routing.robot_warehouse.env import RobotWarehouse
    from jumanji.environments.routing.robot_warehouse.generator import RandomGenerator

    size, agents, *hard = task.split("-")
    shelf_rows, shelf_columns = RWARE_SIZES[size]
    num_agents = int(agents.removesuffix("ag"))
    generator = RandomGenerator(
        shelf_rows=shelf_rows,
        shelf_columns=shelf_columns,
        column_height=8,
        num_agents=num_agents,
        sensor_range=1,
        request_queue_size=num_agents // 2 if hard else num_agents,
    )
    env = RobotWarehouse(generator, time_limit=RWARE_TIME_LIMIT + 1)
    return JumanjiEnv(f"rware/{task}", env, RWARE_TIME_LIMIT)


@dataclass(frozen=True)
class JumanjiEnv:
    """A Jumanji environment under this library's protocol.

    Jumanji's tasks disagree on the time limit: LBF truncates there, RWARE reports a termination. The
    wrapped environment is therefore built with a limit one step beyond `time_limit`, which it never
    reaches; an end that it reports is the task's own, and the limit is counted here.
    """

    name: str
    env: Any  # jumanji.Environment whose observation has agents_view, action_mask and step_count
    time_limit: int

    @property
    def spec(self) -> EnvSpec:
        num_agents, obs_dim = self.env.observation_spec.agents_view.shape
        num_actions = self.env.observation_spec.action_mask.shape[-1]
        return EnvSpec(self.name, num_agents, obs_dim, num_actions, self.time_limit)

    def reset(self, key: Key[Array, ""]) -> tuple[EnvState, TimeStep]:
        state, timestep = self.env.reset(key)
        return jax.tree.map(_strongly_typed, state), restart(_convert(timestep.observation))

    def step(self, state: EnvState, action: Int[Array, "N"], key: Key[Array, ""]) -> tuple[EnvState, TimeStep]:
        del key  # Jumanji keeps one in the state
        state, timestep = self.env.step(state, action)
        terminated = timestep.last()
        return jax.tree.map(_strongly_typed, state), transition(
            _convert(timestep.observation),
            reward=timestep.reward.sum(),  # LBF splits it between the agents, RWARE does not
            terminated=terminated,
            truncated=(timestep.observation.step_count >= self.time_limit) & ~terminated,
        )

    def animate(self, states: list[EnvState], path: Path) -> None:
        """Writes a GIF of consecutive unbatched states, drawn by Jumanji's own viewer."""
        import matplotlib.pyplot as plt

        frames = [state.replace(key=None) for state in states]
        with plt.rc_context({"animation.writer": "pillow"}):  # the default needs ffmpeg
            self.env.animate(jax.device_get(frames), interval=150, save_path=str(path))


def _convert(observation: Any) -> Observation:
    view = observation.agents_view.astype(jnp.float32)
    return Observation(view, observation.action_mask, alive=jnp.ones(view.shape[0], bool))


def _strongly_typed(leaf: Array) -> Array:
    # RWARE's reset returns weakly typed leaves and its step does not: every jitted loop would compile twice.
    return jnp.asarray(leaf, leaf.dtype)


def _require_jumanji() -> None:
    try:
        import jumanji  # noqa: F401
    except ImportError as error:
        raise UserError('this task needs Jumanji: pip install "mam[jumanji]"') from error
