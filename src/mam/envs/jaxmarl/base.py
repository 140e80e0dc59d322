"""What the adapters of JaxMARL's suites share: stepping, importing, drawing.

JaxMARL's dictionaries by agent end here: rows are stacked in the order of its `env.agents`, by
name, because JAX sorts keys (`ally_10` before `ally_2`). It is stepped without its own auto-reset,
which would lose an episode's last observation. Task settings are those of the published MAM and
Sable benchmarks. JaxMARL takes seconds to import and starts JAX's backend, so that waits until the
first task is made.
"""

import abc
import contextlib
import io
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, Shaped

from mam.envs.base import Metrics, restart, strongly_typed, transition
from mam.errors import UserError
from mam.types import Action, EnvSpec, EnvState, Observation, TimeStep


@dataclass(frozen=True)
class JaxMarlEnv(abc.ABC):
    """A JaxMARL task: stepping, and telling the task's own end from its time limit."""

    spec: EnvSpec
    env: Any  # jaxmarl.environments.MultiAgentEnv

    def reset(self, key: Key[Array, ""]) -> tuple[EnvState, TimeStep]:
        views, state = self.env.reset(key)
        state = strongly_typed(state)
        return state, restart(self._observe(views, state), self._metrics(state))

    def step(
        self, state: EnvState, action: Action, key: Key[Array, ""]
    ) -> tuple[EnvState, TimeStep]:
        actions = dict(zip(self.env.agents, self._decode(action), strict=True))
        views, state, rewards, dones, info = self.env.step_env(key, state, actions)
        state = strongly_typed(state)
        ended, limit = dones["__all__"], self._is_cut_off(state)
        return state, transition(
            self._observe(views, state),
            reward=self._reward(rewards, info),
            terminated=ended & ~limit,
            truncated=ended & limit,
            metrics=self._metrics(state),
        )

    def animate(self, states: list[EnvState], path: Path) -> None:
        """Write a GIF of consecutive unbatched states.

        Raises:
            NotImplementedError: nothing can draw them.
        """
        raise NotImplementedError(f"{self.spec.name} cannot be drawn")

    @abc.abstractmethod
    def _observe(self, views: Mapping[str, Array], state: Any) -> Observation: ...

    def _is_cut_off(self, state: Any) -> Bool[Array, ""]:
        """Say whether an episode ended in `state` by its time limit alone; here, always."""
        del state
        return jnp.ones((), bool)

    def _decode(self, action: Action) -> Iterable[Any]:
        """Return the actions in JaxMARL's own form, one for each agent."""
        return action

    def _reward(self, rewards: Mapping[str, Array], info: Mapping[str, Any]) -> Float[Array, "N"]:
        del info
        return self._stack(rewards)

    def _metrics(self, state: Any) -> Metrics:
        del state
        return {}

    def _stack(self, rows: Mapping[str, Array]) -> Shaped[Array, "N ..."]:
        return jnp.stack([rows[agent] for agent in self.env.agents])

    def _all_alive(self) -> Bool[Array, "N"]:
        return jnp.ones(self.spec.num_agents, bool)

    def _all_legal(self) -> Bool[Array, "N A"]:
        return jnp.ones((self.spec.num_agents, self.spec.num_actions), bool)


def require_positive(name: str, **counts: int) -> None:
    for option, count in counts.items():
        if count < 1:
            raise UserError(f"{name}: {option} must be at least 1, got {count}")


def draw_discs(
    positions: np.ndarray,
    radius: np.ndarray,
    colours: np.ndarray,
    extent: tuple[int, int],
    path: Path,
) -> None:
    """Write a GIF of moving discs.

    Args:
        positions: [T, discs, 2].
        radius: [discs].
        colours: [T, discs, 3 or 4].
        extent: limits of both axes.
        path: of the GIF.
    """
    from matplotlib.animation import PillowWriter
    from matplotlib.collections import EllipseCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4))
    axes = figure.subplots()
    axes.set(xlim=extent, ylim=extent, aspect="equal", xticks=[], yticks=[])
    size = 2 * radius
    discs = EllipseCollection(
        size,
        size,
        np.zeros_like(size),
        units="xy",
        offsets=positions[0],
        offset_transform=axes.transData,
    )
    axes.add_collection(discs)
    writer = PillowWriter(fps=7)
    with writer.saving(figure, str(path), dpi=100):
        for step, (position, colour) in enumerate(zip(positions, colours, strict=True)):
            discs.set(offsets=position, facecolor=colour)
            axes.set_title(f"step {step}")
            writer.grab_frame()


def import_jaxmarl() -> None:
    """Import JaxMARL, all but its brax tasks, which would double the seconds that takes.

    They are held back by failing to import, as where there is no brax, and can be imported
    afterwards by name.
    """
    brax_tasks = "jaxmarl.environments.mabrax"
    held_back = sys.modules.setdefault(brax_tasks, cast(Any, None)) is None
    try:
        with quietly():
            import jaxmarl  # noqa: F401
    finally:
        if held_back:
            del sys.modules[brax_tasks]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    # JaxMARL and brax print as they are imported, and warn that brax is old; JaxMARL also replaces
    # both streams.
    streams = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(sys.stderr)
    with streams[0], streams[1], warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "Brax System", UserWarning)
        yield
