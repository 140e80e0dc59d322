"""A PettingZoo environment, and the same with one bug each for `mam.envs.external.audit`.

Free of JAX.
"""

from dataclasses import dataclass

import numpy as np
from gymnasium import spaces


class Walkers:
    """Two walkers on a line; ann terminates at its end, all are truncated at step 10."""

    possible_agents = ("ann", "bob")
    metadata = {}  # noqa: RUF012
    length, end = 10, 4.0
    observed = spaces.Box(-20, 20, (2,))
    state_space = spaces.Box(-20, 20, (2,))

    def observation_space(self, agent):
        return self.observed

    def action_space(self, agent):
        return spaces.Discrete(3)

    def reset(self, seed=None, options=None):
        self.random = np.random.default_rng(seed)
        self.agents, self.steps = list(self.possible_agents), 0
        self.at = dict.fromkeys(self.agents, 0.0)
        return self.views(self.agents), self.infos(self.agents)

    def step(self, actions):
        acted, self.steps = list(self.agents), self.steps + 1
        for agent, action in actions.items():
            self.at[agent] += action - 1 + 0.1 * self.random.random()
        terminated, truncated = self.ends(acted)
        self.agents = [agent for agent in acted if not (terminated[agent] or truncated[agent])]
        return self.views(acted), self.rewards(acted), terminated, truncated, self.infos(acted)

    def ends(self, acted):
        terminated = {agent: agent == "ann" and self.at[agent] >= self.end for agent in acted}
        return terminated, {
            agent: self.steps >= self.length and not terminated[agent] for agent in acted
        }

    def views(self, agents):
        return {agent: np.array([self.at[agent], self.steps], np.float32) for agent in agents}

    def rewards(self, acted):
        return {agent: -abs(self.at[agent]) for agent in acted}

    def infos(self, agents):
        return {agent: {} for agent in agents}

    def state(self):
        return np.array([*self.at.values()])

    def close(self):
        pass


class Carriers(Walkers):
    """Walkers who say at the same time whether to carry what they have."""

    def action_space(self, agent):
        return spaces.MultiDiscrete([3, 2])

    def step(self, actions):
        return super().step({agent: move for agent, (move, _) in actions.items()})

    def infos(self, agents):
        return {agent: {"action_mask": ([1, 1, 1], [1, int(self.steps % 2)])} for agent in agents}


# With one mistake each ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Bug:
    """A planted bug and the finding it must lead to."""

    make: type
    check: str
    field: str
    agent: int | None
    got: str


BUGS = {}


def planted(check, field, agent, got):
    def add(cls):
        BUGS[cls.__name__] = Bug(cls, check, field, agent, got)
        return cls

    return add


@planted("space", "observation", 0, "outside of -20 to 20")
class FarAway(Walkers):
    """Out of bounds, later on and for one agent only."""

    def views(self, agents):
        views = super().views(agents)
        if self.steps > 3 and "ann" in views:
            views["ann"][0] = 21
        return views


@planted("space", "observation", 0, "fractions such as 0.25 for uint8")
class ScaledPicture(Walkers):
    """An image from 0 to 1, of whole numbers by its space."""

    observed = spaces.Box(0, 255, (2, 2, 3), np.uint8)

    def views(self, agents):
        return {agent: np.full((2, 2, 3), 0.25) for agent in agents}


@planted("space", "state", None, "30 outside of -20 to 20")
class FarState(Walkers):
    """The global state is out of bounds."""

    def state(self):
        return super().state() * 0 + 30


@planted("dead_reward", "reward", 0, "5.0, which is lost")
class Pension(Walkers):
    """Ann is paid after her end."""

    def rewards(self, acted):
        return super().rewards(acted) | ({} if "ann" in acted else {"ann": 5.0})


@planted("limit_of_one", "terminated", 1, "termination in ")
class LimitOfSome(Walkers):
    """The time limit truncates ann and terminates bob."""

    end = 99

    def ends(self, acted):
        terminated, truncated = super().ends(acted)
        terminated["bob"], truncated["bob"] = self.steps >= self.length, False
        return terminated, truncated


@planted("mask_name", "action_mask", 0, "what may be one under another, 'avail_actions'")
class OtherName(Walkers):
    """A mask as other libraries call it."""

    def infos(self, agents):
        return {agent: {"avail_actions": np.array([0, 1, 1])} for agent in agents}


@planted("mask_name", "action_mask", 1, "what may be one under another, 'legal_moves'")
class OtherEntry(Walkers):
    """The same among what is observed."""

    observed = spaces.Dict({"x": Walkers.observed, "legal_moves": spaces.MultiBinary(3)})

    def views(self, agents):
        return {
            agent: {"x": x, "legal_moves": [1, 0, 1]} for agent, x in super().views(agents).items()
        }


@planted("action_mask", "action_mask", 1, "none, which is read as all of them")
class NothingAllowed(Walkers):
    """Bob has nothing to choose from for a while."""

    def infos(self, agents):
        return {
            agent: {"action_mask": [1, 1, int(agent == "ann" or self.steps != 2)]}
            for agent in agents
        } | ({"bob": {"action_mask": [0, 0, 0]}} if self.steps == 2 else {})


@planted("action_mask", "action_mask", 0, "none at some, where all actions are allowed")
class Forgotten(Walkers):
    """Ann's masks stop coming."""

    def infos(self, agents):
        return {
            agent: {"action_mask": [1, 1, 0]} if agent == "bob" or self.steps < 3 else {}
            for agent in agents
        }


@planted("action_mask", "action_mask", 1, "none at some, where all actions are allowed")
class LateMasks(Walkers):
    """Bob's mask is missing at the start."""

    def infos(self, agents):
        return {
            agent: {"action_mask": [1, 1, 0]} if agent == "ann" or self.steps else {}
            for agent in agents
        }


@planted("action_mask", "action_mask", 1, "none, which is read as all of them")
class HalfAllowed(Carriers):
    """Bob has nothing to choose from in one component."""

    def infos(self, agents):
        return super().infos(agents) | {"bob": {"action_mask": [1, 1, 1, 0, 0]}}


@planted("mask_name", "action_mask", 0, "what may be one under another, 'legal'")
class OtherNameOfComponents(Carriers):
    """Masks of components under another name."""

    def infos(self, agents):
        return {
            agent: {"legal": mask["action_mask"]} for agent, mask in super().infos(agents).items()
        }


@planted("exception", "step", None, "KeyError: 'road_17' (planted_parallel_bugs.py, line ")
class NoRoad(Walkers):
    """Raises something in the middle of an episode."""

    def rewards(self, acted):
        if self.steps == 5:
            raise KeyError("road_17")
        return super().rewards(acted)


def far_away(index):
    """A factory that is told which environment it makes."""
    assert index in range(4)
    return FarAway()
