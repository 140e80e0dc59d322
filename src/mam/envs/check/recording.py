"""What was played: plain arrays, from which every rule reads."""

from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import jax
import numpy as np

from mam.envs.check.report import Finding
from mam.types import EnvSpec, Observation, TimeStep

# A NumPy array, which the time steps of a recording hold in place of JAX's.
Numbers: TypeAlias = Any
STEP_LIMIT = 10_000  # of an episode whose time limit is unknown
BEYOND_LIMIT = 2  # steps played past the time limit, to see when the episode ends instead
RECORD_BYTES = 256 * 2**20  # of one round of episodes
PER_AGENT = ("agents_view", "action_mask", "alive", "grid", "reward")


@dataclass(frozen=True)
class Episode:
    """One episode of random legal actions; step 0 is the reset, step t follows the t-th action."""

    number: int
    observation: Observation  # [T+1, …] the first one, then the successor of every action
    action: Numbers  # [T, N], [T, N, K] or [T, N, A]
    timestep: TimeStep  # [T, …] as the environment returned them
    # What `reset` returned; None if the environment started this episode by itself.
    first: TimeStep | None
    clocks: Numbers  # [T+1, K] single numbers of the state, one of which may count steps

    @property
    def length(self) -> int:
        return len(self.action)

    @property
    def ended(self) -> bool:
        return bool(ends(self.timestep)[-1])


@dataclass
class Influence:
    """Counts of agents acting otherwise, all else being equal, and of the differences that made.

    Index N stands for all agents.
    """

    decisions: np.ndarray  # [N+1] actions of living agents that differed, before anything else did
    effects: np.ndarray  # [N+1] episodes in which anything that is seen or earned differed then
    # [N, N] of agent i's first such actions, how many changed agent j's next view
    at_once: np.ndarray

    @classmethod
    def none(cls, num_agents: int) -> "Influence":
        n = num_agents
        return cls(np.zeros(n + 1, int), np.zeros(n + 1, int), np.zeros((n, n), int))


@dataclass
class Recording:
    """Everything the rules need."""

    spec: EnvSpec
    resets_itself: (
        bool  # ExternalEnvironments: at an end, `observation` is the next episode's first
    )
    influence: Influence
    episodes: list[Episode] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)  # from comparing one run with another
    notes: list[str] = field(default_factory=list)  # what there was no time for

    @property
    def ended(self) -> list[Episode]:
        return [episode for episode in self.episodes if episode.ended]


def ends(timestep: TimeStep) -> Numbers:
    """Say whether the episode ends; unlike in `TimeStep.ended`, flags need not be boolean."""
    return np.asarray(timestep.terminated).astype(bool) | np.asarray(timestep.truncated).astype(
        bool
    )


def as_typed(observation: Observation) -> Observation:
    """Return boolean masks, so that one of another type is reported once and read by all rules."""
    mask, alive = (np.asarray(x).astype(bool) for x in (observation.action_mask, observation.alive))
    return replace(observation, action_mask=mask, alive=alive)


def steps_that_fit(timestep: TimeStep) -> int:
    """Return how many such time steps are recorded at most."""
    return max(
        1,
        RECORD_BYTES // sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(timestep)),
    )


def choose(spec: EnvSpec, mask: Any, noise: Any, xp: Any = np) -> Any:
    """Choose random legal actions [..., N], [..., N, K] or [..., N, A].

    They are made of uniform noise [..., N, A + 1].

    Continuous components are uniform in (−1, 1), except that one agent in ten plays ±1 in all of
    them.
    """
    noise, extreme = noise[..., :-1], noise[..., -1:] < 0.1
    if spec.action_components is not None:
        parts = component_parts(spec, xp.where(mask, noise, -1), xp)
        return xp.stack([xp.argmax(part, axis=-1) for part in parts], axis=-1).astype(np.int32)
    if not spec.continuous:
        return xp.argmax(xp.where(mask, noise, -1), axis=-1).astype(np.int32)
    action = 2 * noise - 1
    return (xp.where(extreme, xp.sign(action), action) * mask).astype(np.float32)


def component_parts(spec: EnvSpec, x: Any, xp: Any = np) -> list[Any]:
    """Cut [..., A] into one array for each component; a single choice is one component."""
    sizes = spec.action_components or (spec.num_actions,)
    return xp.split(x, np.cumsum(sizes)[:-1], axis=-1)


def differs(one: Any, other: Any, xp: Any = np) -> Any:
    """Say where two arrays are not the same, up to rounding."""
    if one.dtype.kind in "biu":
        return one != other
    return ~xp.isclose(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


def first_difference(
    one: TimeStep, other: TimeStep, num_lead: int = 0
) -> tuple[str, list[int]] | None:
    """Return the first field that differs between two time steps, and where (in leading axes)."""
    ours, theirs = (dict(jax.tree_util.tree_flatten_with_path(tree)[0]) for tree in (one, other))
    for path in [path for path in ours if path in theirs]:
        mine, its = np.asarray(ours[path]), np.asarray(theirs[path])
        name = jax.tree_util.keystr(path).removeprefix(".").removeprefix("observation.")
        if mine.shape != its.shape:
            return name, []
        if len(places := np.argwhere(differs(mine, its))):
            return name, [
                int(i) for i in places[0][: num_lead + (name.split(".")[-1] in PER_AGENT)]
            ]
    return None


def not_repeated(
    field: str, agent: int | None, step: int, episode: int | None, what: str
) -> Finding:
    """Return the finding that the same keys (or seed) and actions led to something else."""
    got = "other values the second time"
    return Finding(
        "determinism",
        "error",
        field,
        f"the same values for the same {what}",
        got,
        agent,
        step,
        episode,
    )


def dead_acts(acts: Numbers, episode: int | None = None) -> Finding:
    """Return the finding that other actions of dead agents, `acts` [T, N], changed something."""
    step, agent = (int(i) for i in np.argwhere(acts)[0])
    expected, got = "the actions of dead agents to be ignored", "another outcome for another action"
    return Finding("dead_acts", "error", "alive", expected, got, agent, step + 1, episode)
