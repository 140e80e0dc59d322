"""Reading Vaults, the datasets of OG-MARL.

    <folder>/metadata.json    shapes and types of the experience tree
    <folder>/…                zarr arrays [1, time, agents, …] in one key–value store (OCDBT), by
                              leaf: observations, actions, rewards, terminals, truncations,
                              infos.legals, infos.state; and vault_index, the steps there are

What an episode's last action led to is not in a Vault: its last observation stands for it. Steps
behind the last end of an episode are left out.

Source: Formanek et al. 2023 (arXiv 2302.00521) and the layout of flashbax's Vault, version 1.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mam.data.steps import SUCCESSOR, to_steps
from mam.data.store import reading, tensorstore
from mam.errors import UserError
from mam.types import EnvSpec, Transition

METADATA = "metadata.json"
_LEAVES = ("observations", "actions", "rewards", "terminals", "truncations")


@dataclass(frozen=True)
class Vault:
    """Episodes of a Vault; see `mam.data.store.Dataset`, whose members it has."""

    path: Path
    optional: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path) -> "Vault":
        """Open a Vault: the folder with its metadata.json.

        Raises:
            UserError: if it is damaged, or not of joint trajectories.
        """
        found = cls(path)
        with reading(path):
            if missing := [name for name in _LEAVES if name not in found._shapes]:
                raise ValueError(f"there is no {missing[0]} in it")
            if not len(found.lengths):
                raise ValueError("no episode in it has ended")
        return found

    @property
    def provenance(self) -> Mapping[str, Any]:
        return {"format": "vault", "version": self._metadata.get("version")}

    @cached_property
    def _metadata(self) -> dict[str, Any]:
        return json.loads((self.path / METADATA).read_bytes())

    @cached_property
    def _shapes(self) -> dict[str, str]:
        def flat(tree: Mapping, prefix: str = "") -> dict[str, str]:
            found = {}
            for name, value in tree.items():
                inner = isinstance(value, Mapping)
                found |= flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
            return found

        return flat(self._metadata["structure_shape"])

    def _open(self, name: str) -> Any:
        base = f"file://{self.path.absolute()}"
        store = {"driver": "ocdbt", "base": base, "path": name}
        return tensorstore().open({"driver": "zarr", "kvstore": store}, open=True).result()

    def _leaf(self, name: str) -> np.ndarray:
        """Read all steps of a leaf, [T, …]."""
        return np.asarray(self._open(f"{name}.")[0, : self._num_steps].read().result())

    @cached_property
    def _num_steps(self) -> int:
        return int(self._open("vault_index").read().result()[0])

    @cached_property
    def _ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Which steps end an episode as terminated, and which as truncated, up to the last end."""
        terminals, truncations = self._leaf("terminals") > 0, self._leaf("truncations") > 0
        ended: Any = np.logical_or(terminals, truncations).all(axis=-1)
        stop = int(np.flatnonzero(ended)[-1]) + 1 if ended.any() else 0
        terminated: Any = ended & terminals.all(axis=-1)
        return terminated[:stop], (ended & ~terminated)[:stop]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Steps of each episode."""
        return np.diff(np.concatenate([[-1], np.flatnonzero(self._ends[0] | self._ends[1])]))

    @cached_property
    def _rewards(self) -> np.ndarray:
        return self._leaf("rewards").astype(np.float32)[: len(self._ends[0])]

    @cached_property
    def returns(self) -> np.ndarray:
        """Return of each episode: the sum of its rewards, averaged over agents."""
        means = self._rewards.astype(np.float64).mean(axis=-1)
        return np.add.reduceat(means, np.cumsum(self.lengths) - self.lengths)

    @cached_property
    def spec(self) -> EnvSpec:
        """Sizes of the task, as far as the Vault knows them."""
        with reading(self.path):
            rows, rewards = self._rows, self._rewards
            n, num_actions = rows["observation.action_mask"].shape[1:]
            state = rows.get("observation.state")
            return EnvSpec(
                name=f"vault/{self.path.absolute().parent.name.removesuffix('.vlt')}",
                num_agents=n,
                obs_dim=rows["observation.agents_view"].shape[-1],
                num_actions=num_actions,
                time_limit=None,
                continuous=rows["action"].dtype.kind == "f",
                state_dim=None if state is None else state.shape[-1],
                team_reward=bool((rewards == rewards[:, :1]).all()),
            )

    @property
    def fingerprint(self) -> str:
        """Return what tells Vaults of other contents apart."""
        facts = (self._metadata, self.lengths.tolist(), self.returns.tolist())
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def read(self, episodes: Sequence[int] | np.ndarray | None = None) -> Transition:
        """Read episodes, one after another, [steps, …]; all of them if None.

        Raises:
            UserError: if there are none.
        """
        wanted = np.arange(len(self.lengths)) if episodes is None else np.asarray(episodes)
        if not len(wanted):
            raise UserError(f"the dataset {self.path} holds no episodes")
        with reading(self.path):
            stops = np.cumsum(self.lengths)
            rows = [np.arange(stops[k] - self.lengths[k], stops[k]) for k in wanted]
            chosen = np.concatenate(rows)
            taken = {name: x[chosen] for name, x in self._rows.items()}
        ended = taken["has_successor"]
        taken |= {
            name.replace("observation.", SUCCESSOR): x[ended]
            for name, x in taken.items()
            if name.startswith("observation.")
        }
        return to_steps(taken)

    @cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        """All steps of whole episodes as rows, but for the successors."""
        terminated, truncated = self._ends
        stop, ended = len(terminated), terminated | truncated
        action, view = self._leaf("actions")[:stop], self._leaf("observations")[:stop]
        discrete = action.dtype.kind in "iu"
        legal = self._leaf("infos.legals")[:stop] > 0 if "infos.legals" in self._shapes else None
        if legal is None:
            size = int(action.max()) + 1 if discrete else action.shape[-1]
            legal = np.ones((*action.shape[:2], size), bool)
        rows = {
            "observation.agents_view": view.astype(np.float32),
            "observation.action_mask": legal,
            "observation.alive": self._alive(stop, ended),
            "action": action.astype(np.int32 if discrete else np.float32),
            "reward": self._rewards,
            "terminated": terminated,
            "truncated": truncated,
            "has_successor": ended,
        }
        if "infos.state" in self._shapes:
            state = self._leaf("infos.state")[:stop].astype(np.float32)
            rows["observation.state"] = state.reshape(stop, -1)
        return rows

    def _alive(self, stop: int, ended: np.ndarray) -> np.ndarray:
        """Say which agents have not terminated before, in their episode, [T, N]."""
        over = (self._leaf("terminals")[:stop] > 0).astype(np.int64)
        before = np.concatenate([np.zeros_like(over[:1]), np.cumsum(over, axis=0)[:-1]])
        first = np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        return before == before[first]
