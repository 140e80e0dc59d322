"""Overcooked from JaxMARL (`overcooked/…`): two cooks in a kitchen."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mam.envs.jaxmarl.base import JaxMarlEnv, import_jaxmarl
from mam.types import EnvSpec, EnvState, Observation

OVERCOOKED_TIME_LIMIT = 400


def make_overcooked(task: str) -> "OvercookedEnv":
    """Make a task of `OVERCOOKED_TASKS`: cooks in a kitchen, which each sees as a whole.

    The team earns 20 for each soup. In most kitchens chance never serves a soup. A "-shaped" task
    adds JaxMARL's shaped rewards of all agents, for filling pots, fetching plates and taking up
    soups; its returns are not those of the task without. JaxMARL's second version, which it
    recommends over the first.
    """
    import_jaxmarl()
    from jaxmarl.environments import OvercookedV2

    layout, _, shaped = task.partition("-")
    env = OvercookedV2(layout, max_steps=OVERCOOKED_TIME_LIMIT)
    rows, columns, channels = cast(tuple[int, int, int], env.obs_shape)
    spec = EnvSpec(
        f"overcooked/{task}",
        env.num_agents,
        obs_dim=0,
        num_actions=env.num_actions,
        time_limit=OVERCOOKED_TIME_LIMIT,
        grid_shape=(rows, columns, channels),
    )
    return OvercookedEnv(spec, env, shaped=bool(shaped))


@dataclass(frozen=True)
class OvercookedEnv(JaxMarlEnv):
    """A kitchen, as an image for each agent."""

    shaped: bool = False

    def _observe(self, views: Mapping[str, Array], state: Any) -> Observation:
        del state
        return Observation(
            agents_view=jnp.zeros((self.spec.num_agents, 0)),
            action_mask=self._all_legal(),
            alive=self._all_alive(),
            # Counts up to 20, in a quarter of the memory.
            grid=self._stack(views).astype(jnp.uint8),
        )

    def _reward(self, rewards: Mapping[str, Array], info: Mapping[str, Any]) -> Float[Array, "N"]:
        reward = self._stack(rewards)
        return reward + self._stack(info["shaped_reward"]).sum() if self.shaped else reward

    def animate(self, states: list[EnvState], path: Path) -> None:
        """Write a GIF drawn by JaxMARL."""
        from PIL import Image

        try:
            from jaxmarl.viz.overcooked_v2_visualizer import OvercookedV2Visualizer
        except ImportError as error:
            raise NotImplementedError(
                f"drawing {self.spec.name} needs imageio: pip install imageio"
            ) from error
        pictures = OvercookedV2Visualizer().render_sequence(
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        )
        first, *rest = [Image.fromarray(picture) for picture in np.asarray(pictures)]
        first.save(path, save_all=True, append_images=rest, duration=150, loop=0)
