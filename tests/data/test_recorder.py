"""A loop of one's own, recorded: what the environment gave is what the dataset has."""

import numpy as np
import pytest
from gymnasium import spaces

import mam
from mam.data.store import Dataset
from mam.errors import UserError


class Relay:
    """Two agents of different sizes; bob ends a step before ann."""

    possible_agents = ("ann", "bob")
    metadata = {"name": "relay"}  # noqa: RUF012

    def __init__(self, actions):
        self.actions = actions

    def observation_space(self, agent):
        return spaces.Box(-9, 9, (1 if agent == "ann" else 2,))

    def action_space(self, agent):
        return self.actions

    def reset(self, seed=None, options=None):
        self.agents, self.steps = [*self.possible_agents], 0
        return self.seen(), {agent: {} for agent in self.agents}

    def step(self, actions):
        self.steps += 1
        before, seen = self.agents, self.seen()
        self.agents = [a for a in before if self.steps < (3 if a == "ann" else 2)]
        ends = {agent: agent not in self.agents for agent in before}
        never, infos = dict.fromkeys(before, False), {agent: {} for agent in before}
        return seen, dict.fromkeys(before, 1.5), never, ends, infos

    def seen(self):
        return {a: np.full(1 if a == "ann" else 2, self.steps, np.float32) for a in self.agents}


DISCRETE = spaces.Discrete(3, start=5)
BOX = spaces.Box(np.float32([0, -4]), np.float32([1, 4]))
SEVERAL = spaces.MultiDiscrete([2, 3])


@pytest.mark.parametrize(
    ("space", "action", "row"),
    [(DISCRETE, 7, 2), (BOX, np.float32([0.5, 2]), [0, 0.5]), (SEVERAL, np.array([1, 2]), [1, 2])],
)
def test_a_loop_of_ones_own_is_recorded(space, action, row, tmp_path):
    with mam.Recorder(tmp_path / "d", Relay(space), name="own/relay") as recorded:
        for seed in range(2):
            observations, _ = recorded.reset(seed=seed)
            while recorded.agents:
                actions = dict.fromkeys(recorded.agents, action)
                observations, *_ = recorded.step(actions)
        recorded.reset(seed=9)
        recorded.step(dict.fromkeys(recorded.agents, action))  # never played to its end
    assert [*observations] == ["ann"]  # as the environment gave it
    data = Dataset.open(tmp_path / "d")
    steps = data.read()
    assert data.lengths.tolist() == [3, 3]
    assert (data.spec.name, data.spec.agent_names) == ("own/relay", ("ann", "bob"))
    np.testing.assert_allclose(steps.action[0], [row, row])
    np.testing.assert_array_equal(steps.observation.agents_view[1], [[1, 0], [1, 1]])
    np.testing.assert_array_equal(steps.observation.alive[:3], [[1, 1], [1, 1], [1, 0]])
    np.testing.assert_array_equal(steps.final_observation.alive[:3], [[1, 1], [1, 1], [1, 0]])
    np.testing.assert_array_equal(steps.reward[2], [1.5, 0])
    assert steps.truncated.tolist() == [False, False, True] * 2


def test_an_episode_may_be_cut_off(tmp_path):
    recorded = mam.Recorder(tmp_path / "d", Relay(DISCRETE))
    recorded.reset(seed=0)
    recorded.step({"ann": 5, "bob": 6})
    recorded.truncate()
    recorded.close()
    assert Dataset.open(tmp_path / "d").read().truncated.tolist() == [True]


def test_what_is_no_action_is_one_line(tmp_path):
    with mam.Recorder(tmp_path / "d", Relay(DISCRETE)) as recorded:
        with pytest.raises(UserError, match=r"step\(\) before reset\(\)"):
            recorded.step({"ann": 5, "bob": 6})
        recorded.reset(seed=0)
        for bob in (9, 5.5, float("nan")):
            with pytest.raises(UserError, match=f"of agent 'bob': {bob} is none of Discrete"):
                recorded.step({"ann": 5, "bob": bob})
        with pytest.raises(UserError, match="agent 'bob' has no action"):
            recorded.step({"ann": 5})
        with pytest.raises(UserError, match="there is no agent 'zoe' to act"):
            recorded.step({"ann": 5, "bob": 6, "zoe": 5})
    with mam.Recorder(tmp_path / "e", Relay(BOX)) as recorded:
        recorded.reset(seed=0)
        with pytest.raises(UserError, match=r"of agent 'ann': .*nan.* is none of Box"):
            recorded.step({"ann": np.float32([0, np.nan]), "bob": np.float32([0, 0])})


class Masked(Relay):
    """Bob may not take the first of his actions; `reset` knows no options."""

    def reset(self, seed=None):
        seen, infos = super().reset(seed)
        infos["bob"]["action_mask"] = np.array([0, 1, 1], np.int8)
        return seen, infos


def test_what_a_mask_forbids_is_not_recorded(tmp_path):
    with mam.Recorder(tmp_path / "d", Masked(DISCRETE)) as recorded:
        recorded.reset(seed=0)
        with pytest.raises(UserError, match="agent 'bob' may not do what it did"):
            recorded.step({"ann": 5, "bob": 5})
        recorded.step({"ann": 5, "bob": 6})
