"""Vaults, the datasets of OG-MARL: reading any, and writing a dataset as one.

    <folder>/metadata.json    shapes and types of the experience tree
    <folder>/…                zarr arrays [1, time, agents, …] in one key–value store (OCDBT), by
                              leaf: observations, actions, rewards, terminals, truncations,
                              infos.legals, infos.state; and vault_index, the steps there are

What an episode's last action led to is not in a Vault of others: its last observation stands for
it. Steps behind the last end of an episode are left out. One that is written here has what is
missing as further leaves, called infos.<field>, and the task in metadata.json: it is read back to
the bit.

Source: Formanek et al. 2023 (arXiv 2302.00521) and the layout of flashbax's Vault, version 1.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mam.config import from_json
from mam.data.steps import OPTIONAL, SUCCESSOR, Rows, layout, to_rows, to_steps
from mam.data.store import reading, tensorstore
from mam.errors import UserError
from mam.types import EnvSpec, Transition

METADATA = "metadata.json"
_LEAVES = ("observations", "actions", "rewards", "terminals", "truncations")
_ENDS = ("terminated", "truncated")  # one number per agent in a Vault
_NAMES = {
    "observation.agents_view": "observations",
    "observation.action_mask": "infos.legals",
    "observation.state": "infos.state",
    "action": "actions",
    "reward": "rewards",
    "terminated": "terminals",
    "truncated": "truncations",
}
_LONGEST = int(10e12)  # the length of a Vault's time axis, most of which is never written


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
            known = found._metadata.get("optional", ())
        return replace(found, optional=tuple(name for name in OPTIONAL if name in known))

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the episodes come from, as far as the Vault says."""
        known = {"format": "vault", "version": self._metadata.get("version")}
        return known | self._metadata.get("provenance", {})

    @property
    def has_successors(self) -> bool:
        """Whether it was written here, and has what the last action of an episode led to."""
        return "spec" in self._metadata

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
        return tensorstore().open(_store(self.path, name), open=True).result()

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
            if self.has_successors:
                return from_json(EnvSpec, self._metadata["spec"])
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
        own = taken["has_successor"]
        taken |= {name: x[own] for name, x in taken.items() if name.startswith(SUCCESSOR)}
        return to_steps(taken)

    @cached_property
    def _rows(self) -> Rows:
        """All steps of whole episodes as rows, and a successor for each of them."""
        rows = self._own_rows() if self.has_successors else self._known_rows()
        last = {name: x for name, x in rows.items() if name.startswith("observation.")}
        return {name.replace("observation.", SUCCESSOR): x for name, x in last.items()} | rows

    def _own_rows(self) -> Rows:
        """Return the steps of a Vault that was written here."""
        stop, rows = len(self._ends[0]), {}
        for name, (_, dtype) in layout(self.spec, self.optional).items():
            x = self._leaf(_NAMES.get(name, f"infos.{name}"))[:stop]
            rows[name] = (x.all(axis=-1) if name in _ENDS else x).astype(dtype)
        return rows

    def _known_rows(self) -> Rows:
        """Return the steps of any other Vault."""
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


def write_vault(
    path: Path,
    spec: EnvSpec,
    optional: Sequence[str],
    provenance: Mapping[str, Any],
    batches: Iterable[Transition],
) -> None:
    """Write a dataset as a Vault, from which it is read back to the bit.

    Args:
        path: the Vault's folder, with nothing in it: for OG-MARL <name>.vlt/<uid>.
        spec: of the task, without agents' ids.
        optional: which of log_prob, value and order the steps have.
        provenance: where the episodes come from.
        batches: whole episodes, some at a time.

    Raises:
        UserError: if there is something in the folder, or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise UserError(f"{path} is not empty: choose another folder for the Vault")
    except OSError as error:
        raise UserError(f"cannot make the Vault {path}: {error.strerror or error}") from error
    arrays, num_steps = dict[str, Any](), 0
    for steps in batches:
        leaves = _to_leaves(to_rows(steps, spec, optional))
        if not arrays:
            arrays = {name: _create(path, name, x) for name, x in leaves.items()}
        stop = num_steps + len(leaves["rewards"])
        written = [arrays[name][0, num_steps:stop].write(x) for name, x in leaves.items()]
        for future in written:
            future.result()
        num_steps = stop
    index = _store(path, "vault_index") | {"dtype": "int32"}
    array = tensorstore().open(index, shape=(1,), create=True).result()
    array.write(np.array([num_steps], np.int32)).result()
    shapes = {name: str((1, num_steps, *x.shape[2:])) for name, x in arrays.items()}
    facts = {
        "version": 1.2,
        "structure_shape": _nested(shapes),
        "structure_dtype": _nested({name: x.dtype.name for name, x in arrays.items()}),
        "spec": asdict(spec),
        "optional": [*optional],
        "provenance": dict(provenance),
    }
    (path / METADATA).write_text(json.dumps(facts))  # last: without it there is no Vault


def _store(path: Path, name: str) -> dict[str, Any]:
    """Say where the array of a leaf is."""
    store = {"driver": "ocdbt", "base": f"file://{path.absolute()}", "path": name}
    return {"driver": "zarr", "kvstore": store}


def _create(path: Path, name: str, x: np.ndarray) -> Any:
    """Make the array of a leaf, whose time axis has no end."""
    asked = _store(path, f"{name}.") | {"metadata": {"compressor": {"id": "gzip", "level": 5}}}
    shape = (1, _LONGEST, *x.shape[1:])
    return tensorstore().open(asked, dtype=x.dtype.name, shape=shape, create=True).result()


def _to_leaves(rows: Rows) -> Rows:
    """Return rows as leaves of a Vault: real masks, ends of each agent, a successor everywhere."""
    own, num_agents, leaves = rows["has_successor"], rows["reward"].shape[1], Rows()
    for name, x in rows.items():
        if name in _ENDS:
            x = np.repeat(x[:, None], num_agents, axis=1)
        if name.startswith(SUCCESSOR):
            dense = np.zeros((len(own), *x.shape[1:]), x.dtype)
            dense[own] = x
            x = dense
        if name in (*_ENDS, "observation.action_mask"):
            x = x.astype(np.float32)
        leaves[_NAMES.get(name, f"infos.{name}")] = x
    return leaves


def _nested(leaves: Mapping[str, str]) -> dict[str, Any]:
    """Return names with dots as a tree."""
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *groups, last = name.split(".")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return tree
