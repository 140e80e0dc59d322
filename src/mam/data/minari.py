"""Reading Minari datasets whose spaces have a part for each agent.

    <folder>/data/metadata.json      spaces of observations and actions; format, name
    <folder>/data/main_data.hdf5     a group for each episode: observations (T + 1), actions (T),
                                     rewards, terminations, truncations

A joint trajectory is one whose observations and actions are Dict or Tuple spaces with the same
parts, one for each agent and all alike. The reward is the team's, and all agents are alive.

Source: the documentation of Minari 0.5, "Dataset Standards".
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mam.data.steps import SUCCESSOR, Rows, to_steps
from mam.data.store import reading
from mam.errors import UserError, needs_extra
from mam.types import EnvSpec, Transition

METADATA = Path("data", "metadata.json")
_MAIN = Path("data", "main_data.hdf5")
_PROPER, _MASK = "observation", "action_mask"  # of an agent that sees which actions are legal


@dataclass(frozen=True)
class Minari:
    """Episodes of a Minari dataset; see `mam.data.store.Dataset`, whose members it has."""

    path: Path
    optional: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path) -> "Minari":
        """Open a dataset: the folder with `data` in it.

        Raises:
            UserError: if it is damaged, or not of joint trajectories.
        """
        found = cls(path)
        with reading(path):
            kind = found._metadata.get("data_format", "hdf5")
        if kind != "hdf5":
            raise UserError(f"the dataset {path} is stored as {kind}: only hdf5 is read")
        _ = found.spec
        if not len(found.lengths):
            raise UserError(f"the dataset {path} holds no episodes")
        return found

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the dataset says of itself."""
        told = {name: x for name, x in self._metadata.items() if not name.endswith("_space")}
        return {"format": "minari", **told}

    @cached_property
    def _metadata(self) -> dict[str, Any]:
        return json.loads((self.path / METADATA).read_bytes())

    def _parts(self, name: str) -> dict[str, dict[str, Any]]:
        """Return the agents' spaces, by the names of their groups."""
        with reading(self.path):
            if name not in self._metadata:
                raise ValueError(f"there is no {name} in its metadata")
            space = json.loads(self._metadata[name])
            if space["type"] == "Dict":
                return space["subspaces"]
            if space["type"] == "Tuple":
                return {f"_index_{k}": part for k, part in enumerate(space["subspaces"])}
        raise self._unlike(f"its {name} is a {space['type']}, not a Dict of agents")

    def _unlike(self, why: str) -> UserError:
        return UserError(f"the dataset {self.path} holds no joint trajectories: {why}")

    @cached_property
    def _agents(self) -> dict[str, "_Agent"]:
        """The agents by the names of their groups, all alike."""
        views, actions = self._parts("observation_space"), self._parts("action_space")
        if views.keys() != actions.keys():
            raise self._unlike(f"{[*views]} observe and {[*actions]} act")
        found = {}
        for name, view in views.items():
            with reading(self.path):
                agent, why = _agent_of(view, actions[name])
            if agent is None:
                raise self._unlike(f"{why} of {name}")
            found[name] = agent
        sizes = {(agent.obs_dim, agent.sizes, agent.masked) for agent in found.values()}
        if len(sizes) != 1:
            raise self._unlike("its agents have different spaces")
        return found

    @cached_property
    def spec(self) -> EnvSpec:
        """Sizes of the task."""
        agents = self._agents
        one = next(iter(agents.values()))
        return EnvSpec(
            name=f"minari/{self._metadata.get('dataset_id', self.path.absolute().name)}",
            num_agents=len(agents),
            obs_dim=one.obs_dim,
            num_actions=sum(one.sizes),
            time_limit=None,
            continuous=one.bounds is not None,
            action_components=one.sizes if len(one.sizes) > 1 else None,
            agent_names=tuple(name.removeprefix("_index_") for name in agents),
        )

    @contextmanager
    def _file(self) -> Iterator[Any]:
        with needs_extra("a Minari dataset", "h5py", "minari"):
            import h5py
        with reading(self.path), h5py.File(self.path / _MAIN, "r") as file:
            yield file

    @cached_property
    def _rewards(self) -> list[np.ndarray]:
        with self._file() as file:
            return [np.asarray(file[f"episode_{k}/rewards"][()]) for k in range(len(file))]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Steps of each episode."""
        return np.array([len(rewards) for rewards in self._rewards], np.int64)

    @cached_property
    def returns(self) -> np.ndarray:
        """Return of each episode."""
        return np.array([rewards.sum(dtype=np.float64) for rewards in self._rewards])

    @property
    def fingerprint(self) -> str:
        """Return what tells datasets of other contents apart."""
        facts = (self._metadata, self.lengths.tolist(), self.returns.tolist())
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def read(self, episodes: Sequence[int] | np.ndarray | None = None) -> Transition:
        """Read episodes, one after another, [steps, …]; all of them if None.

        Raises:
            UserError: if they are not what the spaces say.
        """
        wanted = range(len(self.lengths)) if episodes is None else episodes
        with self._file() as file:
            parts = [self._read(file[f"episode_{k}"]) for k in wanted]
        return to_steps({name: np.concatenate([rows[name] for rows in parts]) for name in parts[0]})

    def _read(self, group: Any) -> Rows:
        """Read an episode as rows; one that does not end was cut off."""
        agents, seen = self._agents.items(), group["observations"]
        views = {
            "agents_view": np.stack([one.view(seen[name]) for name, one in agents], axis=1),
            "action_mask": np.stack([one.mask(seen[name]) for name, one in agents], axis=1),
        }
        views["alive"] = np.ones(views["action_mask"].shape[:2], bool)
        action = np.stack([one.action(group["actions"][name]) for name, one in agents], axis=1)
        last = np.arange(len(action)) == len(action) - 1
        terminated = last & (group["terminations"][()] > 0)
        rewards = np.asarray(group["rewards"][()], np.float32)
        return {
            **{f"observation.{name}": x[:-1] for name, x in views.items()},
            **{f"{SUCCESSOR}{name}": x[-1:] for name, x in views.items()},
            "has_successor": last,
            "action": action,
            "reward": np.repeat(rewards[:, None], len(agents), axis=1),
            "terminated": terminated,
            "truncated": last & ~terminated,
        }


@dataclass(frozen=True)
class _Agent:
    """How the arrays of one agent are read."""

    obs_dim: int
    masked: bool
    sizes: tuple[int, ...]  # of its choices, or the number of its real components
    start: np.ndarray  # of its choices
    bounds: tuple[np.ndarray, np.ndarray] | None  # of real components

    def view(self, data: Any) -> np.ndarray:
        return np.asarray((data[_PROPER] if self.masked else data)[()], np.float32)

    def mask(self, data: Any) -> np.ndarray:
        if self.masked:
            return np.asarray(data[_MASK][()]) > 0
        return np.ones((len(data), sum(self.sizes)), bool)

    def action(self, data: Any) -> np.ndarray:
        found = np.asarray(data[()])
        if self.bounds is None:
            choices = (found - self.start).astype(np.int32)
            return choices[:, 0] if choices.shape[1:] == (1,) else choices
        low, high = self.bounds
        return (2 * (found - low) / (high - low) - 1).astype(np.float32)


def _agent_of(view: dict[str, Any], action: dict[str, Any]) -> tuple[_Agent | None, str]:
    """Return how an agent is read, or None and why it is not."""
    masked = view["type"] == "Dict" and view["subspaces"].keys() == {_PROPER, _MASK}
    if masked:
        view = view["subspaces"][_PROPER]
    if view["type"] != "Box" or len(view["shape"]) != 1:
        return None, f"only vectors are read, not the observation {_named(view)}"
    if action["type"] == "Box" and len(action["shape"]) == 1:
        low, high = (np.array(action[name], np.float64) for name in ("low", "high"))
        if not np.isfinite(high - low).all():
            return None, "only actions within bounds are read, not the real ones"
        return _Agent(view["shape"][0], masked, (len(low),), np.zeros(()), (low, high)), ""
    if action["type"] == "Discrete":
        sizes, start = (action["n"],), np.array(action.get("start", 0))
    elif action["type"] == "MultiDiscrete" and np.ndim(action["nvec"]) == 1:
        sizes, start = tuple(action["nvec"]), np.array(action.get("start", 0))
    else:
        return None, f"only choices and vectors are read, not the action {_named(action)}"
    return _Agent(view["shape"][0], masked, sizes, start, None), ""


def _named(space: dict[str, Any]) -> str:
    return f"{space['type']}{space.get('shape', '')}"
