"""A run of `ExternalEnvironments` from a reset on, cut into episodes and compared with another."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import numpy as np

from mam.envs.check.recording import Episode, Numbers, as_typed, differs, ends
from mam.types import TimeStep


@dataclass(frozen=True)
class Run:
    """All environments from a reset on."""

    action: Numbers  # [S, B, …]
    timestep: TimeStep  # [S+1, B, …], the reset included

    @property
    def length(self) -> int:
        return len(self.action)

    def first(self, num_steps: int) -> TimeStep:
        """Return the reset and the first `num_steps` steps."""
        return jax.tree.map(lambda x: x[: num_steps + 1], self.timestep)


def deviation(main: Run, run: Run, env: int) -> tuple[Numbers, Numbers, Numbers]:
    """Say where one environment differs between two runs.

    Returns:
        Agents' views [S, N], all else [S], and agents' actions [S, N].
    """
    length = min(main.length, run.length)
    one, other = (jax.tree.map(lambda x: x[1 : length + 1, env], r.timestep) for r in (main, run))

    def compare(x: Numbers, y: Numbers, num_axes: int) -> Numbers:
        return differs(x, y).any(axis=tuple(range(num_axes, x.ndim)))

    sees = compare(one.observation.agents_view, other.observation.agents_view, 2)
    if one.observation.grid is not None:
        sees |= compare(one.observation.grid, other.observation.grid, 2)
    pairs = [
        (getattr(one, name), getattr(other, name)) for name in ("reward", "terminated", "truncated")
    ]
    names = ("action_mask", "alive", "state")
    pairs += [(getattr(one.observation, name), getattr(other.observation, name)) for name in names]
    rest = np.any([compare(x, y, 1) for x, y in pairs if x is not None], axis=0)
    return sees, rest, compare(main.action[:length, env], run.action[:length, env], 2)


def stack(actions: list[Numbers], timesteps: list[TimeStep], shape: tuple[int, ...]) -> Run:
    """Return the run of these steps, which may be none; `shape` is that of an action."""
    names = set.intersection(*(set(timestep.metrics) for timestep in timesteps))
    common = [
        replace(timestep, metrics={name: timestep.metrics[name] for name in names})
        for timestep in timesteps
    ]
    return Run(
        np.stack(actions) if actions else np.zeros((0, *shape)),
        jax.tree.map(lambda *x: np.stack(x), *common),
    )


def cut(run: Run) -> Iterator[Episode]:
    """Yield the episodes of a run, the last of every environment perhaps without its end."""
    number = 0
    for env in range(run.action.shape[1]):
        stream, action = jax.tree.map(lambda x, b=env: x[:, b], run.timestep), run.action[:, env]
        stops = [*(np.flatnonzero(ends(stream)[1:]) + 1), run.length]
        start = 0
        for stop in stops:
            if stop > start:
                steps = jax.tree.map(lambda x, a=start, z=stop: x[a + 1 : z + 1], stream)
                yield _episode(number, stream, steps, action[start:stop], start)
                number += 1
            start = stop


def _episode(
    number: int, stream: TimeStep, steps: TimeStep, action: Numbers, start: int
) -> Episode:
    last = steps.final_observation if ends(steps)[-1] else steps.observation

    def join(first: Numbers, middle: Numbers, last: Numbers) -> Numbers:
        return np.concatenate([first[start : start + 1], middle[:-1], last[-1:]])

    observation = as_typed(jax.tree.map(join, stream.observation, steps.observation, last))
    first = jax.tree.map(lambda x: x[0], stream) if start == 0 else None
    return Episode(number, observation, action, steps, first, np.zeros((len(action) + 1, 0)))
