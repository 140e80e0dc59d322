"""What a dataset holds, in numbers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mam.data.minari import METADATA as MINARI
from mam.data.minari import Minari
from mam.data.steps import illegal
from mam.data.store import Dataset
from mam.data.vault import METADATA, Vault
from mam.types import Transition

Trajectories = Dataset | Vault | Minari
_BATCH = 256  # episodes that are read at a time


def open_dataset(path: Path) -> Trajectories:
    """Open a dataset of this library, a Vault or one of Minari's; no trajectory is read.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    if (path / MINARI).exists():
        return Minari.open(path)
    return Vault.open(path) if (path / METADATA).exists() else Dataset.open(path)


def batches(data: Trajectories) -> Iterator[Transition]:
    """Read all episodes, some at a time.

    Raises:
        UserError: if it is damaged, or empty.
    """
    if not len(data.lengths):
        data.read()
    for first in range(0, len(data.lengths), _BATCH):
        yield data.read(np.arange(first, min(first + _BATCH, len(data.lengths))))


@dataclass(frozen=True)
class Summary:
    """The contents of a dataset, all of which was read, and its checksums compared."""

    terminated: int  # episodes
    truncated: int
    alive: np.ndarray  # [N]: share of the steps at which each agent is alive
    # Of the living, [N, A]: how often each choice was made, or the mean of each real component
    actions: np.ndarray
    deviations: np.ndarray | None  # of real components
    illegal: int  # actions of the living that are none, or not allowed by the mask
    non_finite: int  # numbers
    missing: tuple[str, ...]


def summarise(data: Trajectories) -> Summary:
    """Read a whole dataset.

    Raises:
        UserError: if it is damaged, or empty.
    """
    spec, ends = data.spec, np.zeros(2, int)
    alive, count = np.zeros(spec.num_agents), 0
    sums, squares = np.zeros((2, spec.num_agents, spec.num_actions))
    wrong = non_finite = 0
    for steps in batches(data):
        seen, living = steps.observation, np.asarray(steps.observation.alive)
        ends += steps.terminated.sum(), steps.truncated.sum()
        alive, count = alive + living.sum(axis=0), count + len(living)
        chosen = _chosen(np.asarray(steps.action), data)
        here = np.where(living[..., None], chosen, 0.0)
        sums, squares = sums + here.sum(axis=0), squares + np.square(here).sum(axis=0)
        wrong += int(illegal(seen, steps.action, spec).sum())
        of_interest = [
            seen.agents_view[living],
            steps.reward,
            *([] if seen.state is None else [seen.state]),
        ]
        non_finite += sum(int((~np.isfinite(x)).sum()) for x in of_interest)
    mean = sums / np.maximum(alive, 1)[:, None]
    variance = squares / np.maximum(alive, 1)[:, None] - np.square(mean)
    return Summary(
        terminated=int(ends[0]),
        truncated=int(ends[1]),
        alive=alive / count,
        actions=mean,
        deviations=np.sqrt(np.maximum(variance, 0)) if spec.continuous else None,
        illegal=wrong,
        non_finite=non_finite,
        missing=_missing(data),
    )


def _chosen(action: np.ndarray, data: Trajectories) -> np.ndarray:
    """Return choices as one-hot, [T, N, A], side by side of all components; reals as they are."""
    spec = data.spec
    if spec.continuous:
        return action
    sizes = spec.action_components or (spec.num_actions,)
    columns = action.reshape(*action.shape[:2], len(sizes))
    return np.concatenate(
        [columns[..., k, None] == np.arange(size) for k, size in enumerate(sizes)], axis=-1
    ).astype(np.float64)


def _missing(data: Trajectories) -> tuple[str, ...]:
    """Name what other datasets have and this one lacks."""
    found = [name for name in ("log_prob", "value", "order") if name not in data.optional]
    found += ["state"] * (data.spec.state_dim is None) + ["grid"] * (data.spec.grid_shape is None)
    if isinstance(data, Vault) and not data.has_successors:
        found.append("what the last action of an episode led to")
    return tuple(found)
