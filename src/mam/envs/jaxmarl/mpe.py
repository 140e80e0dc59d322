"""MPE from JaxMARL (`mpe/…`): particles that spread over landmarks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mam.envs.jaxmarl.base import JaxMarlEnv, draw_discs, import_jaxmarl, require_positive
from mam.errors import UserError
from mam.types import Action, EnvSpec, EnvState, Observation

# JaxMARL's limit of 25 is compared before the step is counted, so one more is taken.
MPE_TIME_LIMIT = 26


def make_mpe(task: str) -> "MpeEnv":
    """Make a task of `MPE_TASKS`: as many landmarks as agents, to be covered without collisions."""
    agents, _, kind = task.removeprefix("simple_spread_").partition("-")
    return _mpe(f"mpe/{task}", int(agents), int(agents), local_ratio=0.5, continuous=not kind)


def make_mpe_auto(
    agents: int = 3,
    landmarks: int = 0,
    local_ratio: float = 0.5,
    continuous: bool = False,
    limit: int = MPE_TIME_LIMIT,
) -> "MpeEnv":
    """Make simple_spread of any size.

    Args:
        agents: how many.
        landmarks: how many; 0: as many as agents.
        local_ratio: of an agent's reward, the part that is for its own collisions; 0: all earn the
            same.
        continuous: actions are strengths instead of directions.
        limit: time limit.

    Raises:
        UserError: an option is out of range.
    """
    landmarks = landmarks or agents
    require_positive("mpe/auto", agents=agents, landmarks=landmarks, limit=limit)
    if not 0 <= local_ratio <= 1:
        raise UserError(f"mpe/auto: local_ratio must be between 0 and 1, got {local_ratio}")
    return _mpe("mpe/auto", agents, landmarks, local_ratio, continuous, limit)


@dataclass(frozen=True)
class MpeEnv(JaxMarlEnv):
    """simple_spread: nothing, left, right, down and up.

    Continuous actions push left, right, down and up at once. JaxMARL takes the strengths from 0 to
    1, after a fifth number, for nothing, which it does not read.
    """

    def _observe(self, views: Mapping[str, Array], state: Any) -> Observation:
        positions = state.p_pos[: self.spec.num_agents]
        return Observation(
            self._stack(views), self._all_legal(), self._all_alive(), positions=positions
        )

    def _decode(self, action: Action) -> Iterable[Any]:
        return jnp.pad((action + 1) / 2, ((0, 0), (1, 0))) if self.spec.continuous else action

    def animate(self, states: list[EnvState], path: Path) -> None:
        """Write a GIF: agents green, landmarks dark."""
        positions = np.stack([state.p_pos for state in jax.device_get(states)])
        colours = np.broadcast_to(np.array(self.env.colour) / 255, (*positions.shape[:2], 3))
        draw_discs(positions, np.asarray(self.env.rad), colours, (-2, 2), path)


def _mpe(
    name: str,
    agents: int,
    landmarks: int,
    local_ratio: float,
    continuous: bool,
    limit: int = MPE_TIME_LIMIT,
) -> MpeEnv:
    import_jaxmarl()
    from jaxmarl.environments.mpe import SimpleSpreadMPE

    env: Any = SimpleSpreadMPE(
        num_agents=agents,
        num_landmarks=landmarks,
        local_ratio=local_ratio,
        action_type="Continuous" if continuous else "Discrete",
        max_steps=limit - 1,
    )
    (obs_dim,) = env.observation_space(env.agents[0]).shape
    num_actions = 4 if continuous else 5
    spec = EnvSpec(
        name,
        agents,
        obs_dim,
        num_actions,
        limit,
        continuous=continuous,
        team_reward=local_ratio == 0,
        position_dim=2,
    )
    return MpeEnv(spec, env)
