"""MABrax from JaxMARL (`mabrax/…`): robots whose joints are shared out among the agents."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from mam.envs.jaxmarl.base import JaxMarlEnv, import_jaxmarl, quietly
from mam.types import EnvSpec, Observation

MABRAX_TIME_LIMIT = 1000


def make_mabrax(task: str) -> "MabraxEnv":
    """Make a task of `MABRAX_TASKS`: one robot whose joints are shared out among the agents.

    Agents that have fewer joints or see less than others are padded; the padding of actions is
    masked. JaxMARL writes agent i's one-hot index and then its features from position i + 1 on, so
    they overlap; kept, because published scores have it.
    """
    import_jaxmarl()
    with quietly(), contextlib.ExitStack() as undo:
        # Before JaxMARL's own import, during which the streams are closed files.
        import brax.envs  # noqa: F401
        import mujoco
        from jaxmarl.environments import mabrax

        # MuJoCo would write what it warns of into a file in the current folder.
        simulator: Any = mujoco  # its functions in C are not known to type checkers
        undo.callback(simulator.set_mju_user_warning, simulator.get_mju_user_warning())
        simulator.set_mju_user_warning(lambda message: None)
        env: Any = mabrax.MABraxEnv(
            task, MABRAX_TIME_LIMIT, auto_reset=False, homogenisation_method="max"
        )
    (obs_dim,), (num_actions,) = (
        env.observation_space(env.agents[0]).shape,
        env.action_space(env.agents[0]).shape,
    )
    spec = EnvSpec(
        f"mabrax/{task}", env.num_agents, obs_dim, num_actions, MABRAX_TIME_LIMIT, continuous=True
    )
    return MabraxEnv(spec, env)


@dataclass(frozen=True)
class MabraxEnv(JaxMarlEnv):
    """A robot. All joints of all agents move at once, and the reward is the team's."""

    def _observe(self, views: Mapping[str, Array], state: Any) -> Observation:
        del state
        num_joints = np.array([joints.size for joints in self.env.agent_action_mapping.values()])
        in_use = jnp.arange(self.spec.num_actions) < num_joints[:, None]
        return Observation(self._stack(views), in_use, self._all_alive())

    def _is_cut_off(self, state: Any) -> Bool[Array, ""]:
        return state.info["truncation"] > 0
