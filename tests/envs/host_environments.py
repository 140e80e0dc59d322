"""Small PettingZoo environments for tests; worker processes import this module by its name."""

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass, field

import gymnasium
import numpy as np
from gymnasium import spaces

LIVES = {"ann": 2, "bob": 5, "cleo": 9}  # steps until an agent has terminated
LIMIT = 7  # steps until whoever is left is truncated


@dataclass
class Lives:
    """Agents live for as long as `lives` says; views and rewards are noise of seed and actions.

    They see the step, the noise, and (bob) one number more, (cleo) two more.
    """

    lives: dict = field(default_factory=lambda: dict(LIVES))
    limit: int = LIMIT
    max_cycles: int = LIMIT
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    render_mode: str | None = None

    @property
    def possible_agents(self):
        return list(self.lives)

    @property
    def state_space(self):
        return spaces.Box(-np.inf, np.inf, (2,))

    def state(self):
        return np.array([self.steps, self.noise], np.float32)

    def observation_space(self, agent):
        return spaces.Box(-np.inf, np.inf, (2 + self.possible_agents.index(agent),))

    def action_space(self, agent):
        return spaces.Discrete(5)

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.agents = self.possible_agents
        self.steps, self.noise = 0, self.random.random()
        return self.observe(), {agent: {} for agent in self.agents}

    def step(self, actions):
        assert set(actions) == set(self.agents)
        acted = self.agents
        self.steps, self.noise = self.steps + 1, self.random.random() + sum(actions.values())
        terminated = {agent: self.steps >= self.lives[agent] for agent in acted}
        truncated = {agent: self.steps >= self.limit and not terminated[agent] for agent in acted}
        rewards = {agent: self.random.random() + actions[agent] for agent in acted}
        observations = self.observe()
        self.agents = [agent for agent in acted if not (terminated[agent] or truncated[agent])]
        return observations, rewards, terminated, truncated, {agent: {} for agent in acted}

    def observe(self):
        sizes = {agent: self.observation_space(agent).shape[0] for agent in self.agents}
        return {
            a: np.array([self.steps, self.noise, 1, 2][:size], np.float32)
            for a, size in sizes.items()
        }

    def render(self):
        return np.full((2, 3, 3), self.steps, np.uint8) if self.render_mode == "rgb_array" else None

    def close(self):
        pass


class Unfinished(Lives):
    """As PettingZoo's base class: nothing is drawn, and closing raises."""

    def render(self):
        raise NotImplementedError

    def close(self):
        raise NotImplementedError


class Blind(Lives):
    """Has nothing but what an episode needs."""

    render = close = property()  # without a getter: as if they were not there


class Informed(Lives):
    """Says more about its agents than others do, to those who still act."""

    def step(self, actions):
        *outcome, infos = super().step(actions)
        said = {"won": True, "steps": np.float32(self.steps), "who": "me", "map": np.zeros(3), 7: 7}
        return *outcome, dict.fromkeys(infos, said) | {"all": None}


class Parting(Lives):
    """In the second step bob is truncated, alone."""

    def step(self, actions):
        observations, rewards, terminated, truncated, infos = super().step(actions)
        if self.steps == 2:
            truncated["bob"] = True
            self.agents.remove("bob")
        return observations, rewards, terminated, truncated, infos


# What ann may do to `Faulty`, beside ordinary actions.
KILLED, STUCK, RAISES, EXITS = range(10, 14)


class Faulty(Lives):
    """Does what ann's action says."""

    def step(self, actions):
        fate = actions.get("ann")
        if fate == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == STUCK:
            while True:
                time.sleep(60)
        if fate == RAISES:
            raise ValueError("out of cheese")
        if fate == EXITS:
            sys.exit(3)
        return super().step(actions)


class Camera:
    """Two agents paint images with their actions, forever."""

    possible_agents = ("left", "right")
    metadata = {}  # noqa: RUF012

    def observation_space(self, agent):
        return spaces.Box(0, 255, (2, 3, 1), np.uint8)

    def action_space(self, agent):
        return spaces.Box(0, 200, (2,))

    def reset(self, seed=None, options=None):
        self.agents = list(self.possible_agents)
        return dict.fromkeys(self.agents, np.zeros((2, 3, 1), np.uint8)), {}

    def step(self, actions):
        images = {agent: np.zeros((2, 3, 1), np.uint8) for agent in self.agents}
        for agent, (first, last) in actions.items():
            images[agent][0, 0], images[agent][1, 2] = first, last
        return images, {}, {}, {}, {}

    def close(self):
        pass


class Signals:
    """Two agents see what each of them chose last, forever; the second has one component."""

    possible_agents = ("left", "right")
    metadata = {}  # noqa: RUF012

    def observation_space(self, agent):
        return spaces.Box(0, 9, (2,))

    def action_space(self, agent):
        return spaces.MultiDiscrete([3, 2] if agent == "left" else [4])

    def reset(self, seed=None, options=None):
        self.agents = list(self.possible_agents)
        return dict.fromkeys(self.agents, np.zeros(2)), {
            "left": {"action_mask": ([1, 0, 1], [0, 1])}
        }

    def step(self, actions):
        return {agent: np.resize(choices, 2) for agent, choices in actions.items()}, {}, {}, {}, {}

    def close(self):
        pass


class Parent(Lives):
    """Has a child process of its own."""

    def reset(self, seed=None, options=None):
        child = multiprocessing.get_context("spawn").Process(target=os.getpid)
        child.start()
        child.join()
        assert child.exitcode == 0
        return super().reset(seed, options)


def any_options(**options):
    """A factory that passes on what it is given."""
    return Camera(**options)


def numbered(index):
    """A factory that tells its environments apart, the first of which are the shortest."""
    env = Lives(limit=1 + index)
    env.index = index
    return env


closed = []


class Closing(Lives):
    """Notes in `closed` that it was closed."""

    def close(self):
        closed.append(self)
        raise RuntimeError("closed too early")


def alone():
    """A factory of an environment for one agent."""
    return gymnasium.make("CartPole-v1")


def a_class():
    return Lives


def nothing():
    """A factory that forgets to return what it makes."""


def jaxless():
    """A factory that does not want JAX around."""
    assert not {"jax", "equinox"} & set(sys.modules), "JAX was imported"
    return Faulty()


def stillborn():
    """A factory that ends the worker."""
    os._exit(7)


def broken():
    """A factory with a bug in it."""
    raise ZeroDivisionError("no environment today")


def uneven(made=[]):  # noqa: B006
    """A factory that never makes the same thing twice."""
    made.append(None)
    return Lives(lives={str(n): 3 for n in range(len(made))})
