"""One PettingZoo environment as arrays."""

import types

import numpy as np
import pytest
from gymnasium import spaces
from host_environments import LIMIT, LIVES, Lives

from mam.envs.external.factories import find_factory
from mam.envs.external.pettingzoo import PettingZooEnv
from mam.envs.external.spaces import out_of_bounds
from mam.errors import UserError

NUMBERS = spaces.Box(-10, 10, (2,))
ZEROS = np.zeros(2, np.float32)


class Scripted:
    """Agents observe, and everybody gets, what the script says; keeps what they did.

    Each line of the script is what one step returns after the observations, and who goes on.
    """

    metadata = {}  # noqa: RUF012

    def __init__(self, observed, seen=NUMBERS, done=None, script=()):
        self.observed = dict(observed)
        self.possible_agents = list(observed)
        self.seen = seen if isinstance(seen, dict) else dict.fromkeys(observed, seen)
        done = done or spaces.Discrete(3)
        self.done = done if isinstance(done, dict) else dict.fromkeys(observed, done)
        self.script = list(script)
        self.infos = {}
        self.actions = []

    def observation_space(self, agent):
        return self.seen[agent]

    def action_space(self, agent):
        return self.done[agent]

    def reset(self, seed=None, options=None):
        self.agents = list(self.observed)
        self.actions = []
        return self.observed, self.infos

    def step(self, actions):
        self.actions.append(actions)
        rewards, terminated, truncated, self.agents = self.script[len(self.actions) - 1]
        return self.observed, rewards, terminated, truncated, self.infos


STEP = "observations, rewards, terminations, truncations, infos"


class Odd(Scripted):
    """One agent of an environment that is odd in what it is given."""

    def __init__(self, **odd):
        super().__init__({"a": ZEROS})
        vars(self).update(odd)
        if "step" in odd:
            self.agents = ["a"]


class OldSpace(spaces.Space):
    """A space of the package that was before gymnasium."""

    def __str__(self):
        return "Discrete(3)"


OldSpace.__module__ = "gym.spaces.discrete"


def adapt(*args, **kwargs):
    return PettingZooEnv(Scripted(*args, **kwargs), "test")


def view_of(space, value):
    return adapt({"a": value}, seen=space).reset(0)["agents_view"][0].tolist()


def play(env, seed=0):
    """All outcomes of an episode in which everybody chooses 0."""
    env.reset(seed)
    outcomes = []
    while not (outcomes and (outcomes[-1].terminated or outcomes[-1].truncated)):
        outcomes.append(env.step(np.zeros(env.layout.num_agents, np.int32)))
    return outcomes


# Who lives, who earns, and how episodes end.


def test_agents_die_one_after_the_other():
    env = PettingZooEnv(Lives(limit=99), "test")
    outcomes = play(env)
    assert len(outcomes) == max(LIVES.values())
    for t, outcome in enumerate(outcomes, 1):
        alive = [t < life for life in LIVES.values()]
        acted = [t <= life for life in LIVES.values()]
        np.testing.assert_array_equal(outcome.observation["alive"], alive)
        np.testing.assert_array_equal(
            outcome.reward > 0, acted
        )  # the reward of its last step is an agent's own
        np.testing.assert_array_equal(outcome.observation["agents_view"].any(axis=1), alive)
        assert outcome.observation["action_mask"].all()
    assert [outcome.terminated for outcome in outcomes] == [False] * 8 + [True]
    assert not any(outcome.truncated for outcome in outcomes)


def test_who_is_truncated_would_have_gone_on():
    outcomes = play(PettingZooEnv(Lives(), "test"))
    assert len(outcomes) == LIMIT
    assert outcomes[-1].truncated
    assert not outcomes[-1].terminated
    np.testing.assert_array_equal(outcomes[-1].observation["alive"], [False, False, True])
    assert outcomes[-1].observation["agents_view"][2].tolist()[0] == LIMIT
    np.testing.assert_allclose(outcomes[-1].observation["state"][0], LIMIT)


@pytest.mark.parametrize(
    ("terminated", "truncated", "expected", "alive"),
    [
        ("ab", "", (True, False), []),
        ("", "ab", (False, True), ["a", "b"]),
        ("a", "b", (False, True), ["b"]),
        ("ab", "ab", (True, False), []),  # over is over
        ("", "", (True, False), []),  # nobody is left, and nobody says why
    ],
)
def test_last_step(terminated, truncated, expected, alive):
    line = ({}, dict.fromkeys(terminated, True), dict.fromkeys(truncated, True), [])
    env = adapt({"a": ZEROS, "b": ZEROS}, script=[line])
    env.reset(0)
    outcome = env.step(np.zeros(2, np.int32))
    assert (outcome.terminated, outcome.truncated) == expected
    assert [
        agent for agent, lives in zip("ab", outcome.observation["alive"], strict=True) if lives
    ] == alive


def test_agents_that_end_but_stay_listed_are_dead_and_still_act():
    """Not as PettingZoo asks for, but seen."""
    script = [
        ({"a": 1, "b": 1}, {"a": True, "b": False}, {}, ["a", "b"]),
        ({"a": 1, "b": 1}, {"a": False, "b": False}, {}, ["a", "b"]),
        ({"a": 1, "b": 1}, {"a": True, "b": True}, {}, ["a", "b"]),
    ]
    env = adapt({"a": ZEROS, "b": ZEROS}, script=script)
    outcomes = play(env)
    assert [outcome.reward.tolist() for outcome in outcomes] == [[1, 1], [0, 1], [0, 1]]
    assert [outcome.observation["alive"].tolist() for outcome in outcomes] == [
        [False, True]
    ] * 2 + [[False, False]]
    assert [outcome.terminated for outcome in outcomes] == [False, False, True]
    assert all(set(actions) == {"a", "b"} for actions in env._env.actions)
    assert env.reset(0)["alive"].all()


def test_agents_may_come_and_go():
    script = [({}, {}, {}, ["a"]), ({}, {}, {}, ["a", "b"]), ({}, {}, {}, [])]
    env = adapt({"a": ZEROS, "b": ZEROS}, script=script)
    assert [outcome.observation["alive"].tolist() for outcome in play(env)] == [
        [True, False],
        [True, True],
        [False] * 2,
    ]
    assert [set(actions) for actions in env._env.actions] == [{"a", "b"}, {"a"}, {"a", "b"}]


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_agents_that_ended_may_come_back(end):
    leaves = {"terminated": {}, "truncated": {}} | {end: {"b": True}}
    script = [
        ({"b": 1}, leaves["terminated"], leaves["truncated"], ["a"]),
        ({"b": 1}, {}, {}, ["a", "b"]),
        ({"b": 1}, {}, {}, []),
    ]
    outcomes = play(adapt({"a": ZEROS, "b": ZEROS}, script=script))
    assert [outcome.observation["alive"].tolist() for outcome in outcomes] == [
        [True, False],
        [True, True],
        [False] * 2,
    ]
    assert [outcome.reward.tolist() for outcome in outcomes] == [[0, 1], [0, 0], [0, 1]]


def test_who_is_truncated_alone_has_a_last_view():
    script = [({}, {}, {"b": True}, ["a"]), ({}, {"a": True}, {}, [])]
    first, last = play(adapt({"a": ZEROS + 1, "b": ZEROS + 2}, script=script))
    assert first.observation["alive"].tolist() == [True, False]
    assert first.observation["agents_view"].tolist() == [[1, 1], [0, 0]]
    assert first.final_observation is not None
    assert first.final_observation["alive"].tolist() == [True, True]
    assert first.final_observation["agents_view"].tolist() == [[1, 1], [2, 2]]
    assert (last.terminated, last.final_observation) == (True, None)


def test_no_observation_no_life():
    env = adapt({"a": ZEROS, "b": ZEROS})
    env._env.observed.pop("b")
    env._env.reset = lambda seed: (env._env.observed, {})
    env._env.agents = ["a", "b"]
    assert env.reset(0)["alive"].tolist() == [True, False]


def test_state_that_needs_the_living_is_kept_at_the_end():
    class Dying(Lives):
        def state(self):
            return np.array([self.steps, self.observe()[self.agents[0]][1]])

    outcomes = play(PettingZooEnv(Dying(), "test"))
    assert [outcome.observation["state"][0] for outcome in outcomes] == [1, 2, 3, 4, 5, 6, 6]


# What agents see.


def test_flattened_observations():
    box = spaces.Box(0, 9, (2, 2))
    assert view_of(box, np.array([[1, 2], [3, 4]])) == [1, 2, 3, 4]
    assert view_of(spaces.Box(0, 9, ()), np.array(7.0)) == [7]
    assert view_of(spaces.Discrete(3, start=5), 6) == [0, 1, 0]
    assert view_of(spaces.MultiBinary(3), np.array([1, 0, 1])) == [1, 0, 1]
    assert view_of(spaces.MultiDiscrete([2, 3]), np.array([1, 2])) == [0, 1, 0, 0, 1]
    assert view_of(spaces.MultiDiscrete([2, 3], start=[1, 10]), np.array([1, 11])) == [
        1,
        0,
        0,
        1,
        0,
    ]
    pair = spaces.Tuple((spaces.Discrete(2), spaces.Box(0, 9, (1,))))
    assert view_of(pair, (1, np.array([5.0]))) == [0, 1, 5]
    both = spaces.Dict({"z": spaces.Box(0, 9, (1,)), "a": pair})
    assert view_of(both, {"z": np.array([8.0]), "a": (0, np.array([5.0]))}) == [
        1,
        0,
        5,
        8,
    ]  # in the space's own order


def test_shorter_observations_are_padded_and_it_is_said_once():
    env = PettingZooEnv(Lives(), "test")
    view = env.reset(0)["agents_view"]
    assert view.shape == (3, 4)
    np.testing.assert_array_equal(view[:, 2:], [[0, 0], [1, 0], [1, 2]])
    assert env.notes == [
        "agents observe 2 to 4 numbers: the shorter observations are padded with zeros"
    ]
    assert env.layout.time_limit == LIMIT
    assert env.layout.state_dim == 2


@pytest.mark.parametrize(
    ("dtype", "kept"), [(np.uint8, np.uint8), (np.float64, np.float32), (bool, bool)]
)
def test_images(dtype, kept):
    space = (
        spaces.Box(0, 1, (4, 5, 3), dtype)
        if dtype is bool
        else spaces.Box(0, 200, (4, 5, 3), dtype)
    )
    image = np.arange(60).reshape(4, 5, 3).astype(dtype)
    env = adapt({"a": image, "b": image[::-1]}, seen=space)
    observation = env.reset(0)
    assert env.layout.grid_shape == (4, 5, 3)
    assert observation["agents_view"].shape == (2, 0)
    assert observation["grid"].dtype == kept
    np.testing.assert_array_equal(observation["grid"], [image, image[::-1]])
    assert not env.notes


def test_an_image_among_other_things():
    """One entry of a dictionary: it is seen as an image, the rest as numbers."""
    parts = {"own": spaces.Box(-1, 1, (2,)), "camera": spaces.Box(0, 255, (4, 5, 3), np.uint8)}
    space = spaces.Dict(parts | {"load": spaces.Discrete(2)})
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    env = adapt({"a": {"own": np.array([0.5, -0.5]), "camera": image, "load": 1}}, seen=space)
    observation = env.reset(0)
    assert (env.layout.grid_shape, env.layout.grid_dtype) == ((4, 5, 3), "uint8")
    assert sorted(observation["agents_view"][0].tolist()) == [-0.5, 0, 0.5, 1]
    np.testing.assert_array_equal(observation["grid"], [image])
    assert not env.notes


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (spaces.Box(0, 1, (2, 2, 1)), spaces.Box(0, 1, (2, 3, 1))),
        (spaces.Dict(left=spaces.Box(0, 1, (2, 2, 1)), right=spaces.Box(0, 1, (2, 1, 1))),) * 2,
        (spaces.Dict(eye=spaces.Dict(rgb=spaces.Box(0, 1, (2, 2, 1))), x=spaces.Discrete(2)),) * 2,
        (spaces.Tuple([spaces.Box(0, 1, (2, 2, 1)), spaces.Discrete(2)]),) * 2,
    ],
    ids=["different sizes", "two", "deeper", "tuple"],
)
def test_other_images_are_flattened_and_it_is_said(a, b):
    env = adapt({"a": a.sample(), "b": b.sample()}, seen={"a": a, "b": b})
    assert env.reset(0)["agents_view"].shape[1] == max(spaces.flatdim(a), spaces.flatdim(b))
    assert env.notes[0].startswith("images are flattened: to be seen as such, every agent")
    assert env.layout.grid_shape is None


def test_state_that_is_an_image_is_left_out():
    env = Scripted({"a": ZEROS})
    env.state_space, env.state = spaces.Box(0, 1, (4, 4, 3)), lambda: np.zeros((4, 4, 3))
    env = PettingZooEnv(env, "test")
    assert "state" not in env.reset(0)
    assert env.notes == ["the global state is an image: it is left out"]


# What agents may do.


@pytest.mark.parametrize(
    ("shape", "grid_shape"),
    [((3, 12, 10), (12, 10, 3)), ((3, 9, 12), (3, 9, 12)), ((12, 12, 12), (12, 12, 12))],
)
def test_channels_of_an_image_may_come_first(shape, grid_shape):
    image = np.arange(np.prod(shape)).reshape(shape)
    env = adapt({"a": image}, seen=spaces.Box(0, 9999, shape))
    (grid,) = env.reset(0)["grid"]
    assert grid.shape == env.layout.grid_shape == grid_shape
    moved = shape != grid_shape
    np.testing.assert_array_equal(grid, np.moveaxis(image, 0, -1) if moved else image)
    note = f"images are read channels first: rows, columns and channels are {grid_shape}"
    assert env.notes == [note] * moved


@pytest.mark.parametrize("key", ["observation", "observations"])  # the second is RLlib's
def test_action_mask_beside_the_observation(key):
    seen = spaces.Dict({key: spaces.Box(0, 9, (2, 2, 1)), "action_mask": spaces.MultiBinary(3)})
    observed = {key: np.ones((2, 2, 1)), "action_mask": np.array([0, 1, 1], np.int8)}
    env = adapt({"a": observed}, seen=seen)
    assert env.layout.grid_shape == (2, 2, 1)
    assert env.reset(0)["action_mask"].tolist() == [[False, True, True]]


def test_the_mask_of_one_component_may_be_a_tuple_of_one_row():
    mask = (np.array([1, 0, 1], np.int8),)
    env = adapt({"a": ZEROS}, done=spaces.MultiDiscrete([3]))
    env._env.infos = {"a": {"action_mask": mask}}
    assert env.reset(0)["action_mask"].tolist() == [[True, False, True]]


def test_action_mask_among_other_things():
    seen = spaces.Dict({"x": NUMBERS, "y": NUMBERS, "action_mask": spaces.MultiBinary(3)})
    env = adapt({"a": {"x": ZEROS + 1, "y": ZEROS + 2, "action_mask": [1, 1, 0]}}, seen=seen)
    observation = env.reset(0)
    assert observation["agents_view"].tolist() == [[1, 1, 2, 2]]
    assert observation["action_mask"].tolist() == [[True, True, False]]


def test_action_mask_in_the_infos():
    env = adapt({"a": ZEROS, "b": ZEROS}, done={"a": spaces.Discrete(3), "b": spaces.Discrete(2)})
    env._env.infos = {
        "a": {"action_mask": np.array([0, 0, 1])},
        "b": {"action_mask": np.array([0, 0])},
    }
    # b may do nothing, so what it does cannot matter; something has to be legal.
    assert env.reset(0)["action_mask"].tolist() == [[False, False, True], [True, True, False]]


class Placed(Scripted):
    """Two agents whose view is their place, which their infos say as well, the other way round."""

    def __init__(self, positions=None, observed=((3.0, 4.0), (5.0, 6.0))):
        super().__init__(dict(zip("ab", map(np.array, observed), strict=True)))
        self.infos = {a: {"position": seen[::-1]} for a, seen in self.observed.items()}
        if positions is not None:
            self.metadata = {"positions": positions}


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("0:2", [[3, 4], [5, 6]]),
        ("1:2", [[4], [6]]),
        ("info", [[4, 3], [6, 5]]),
    ],
)
def test_metadata_say_where_agents_are(positions, expected):
    env = PettingZooEnv(Placed(positions), "placed")
    assert env.layout.position_dim == len(expected[0])
    np.testing.assert_array_equal(env.reset(0)["positions"], expected)


def test_so_does_an_option_of_the_name():
    env = find_factory("host_environments:Lives:limit=3,positions=0:1")()
    assert (env.limit, PettingZooEnv(env, "lives").layout.position_dim) == (3, 1)
    assert "positions" not in Lives.metadata


@pytest.mark.parametrize("positions", ["0:3", "2:2", "1", "left:right", (0, 1)])
def test_positions_that_are_none(positions):
    message = r"placed: positions must be info, or such as 0:2 within the 2 numbers"
    with pytest.raises(UserError, match=message):
        PettingZooEnv(Placed(positions), "placed")


def test_infos_without_a_position():
    env = Placed("info")
    env.infos = {}
    with pytest.raises(UserError, match=r'info\["position"\] has 0 numbers, expected 2'):
        PettingZooEnv(env, "placed").reset(0)


def test_indices_count_from_the_start_of_the_space():
    done = {"a": spaces.Discrete(3), "b": spaces.Discrete(2, start=-1)}
    env = adapt({"a": ZEROS, "b": ZEROS}, done=done, script=[({}, {}, {}, [])])
    assert env.reset(0)["action_mask"].tolist() == [[True] * 3, [True, True, False]]
    assert env.notes == ["agents have 2 to 3 actions: those that an agent does not have are masked"]
    env.step(np.array([2, 1], np.int32))
    assert env._env.actions == [{"a": 2, "b": 0}]


def test_components_of_all_agents_stand_side_by_side():
    """Padded to the largest of each; what an agent lacks repeats the first of the others."""
    done = {
        "a": spaces.MultiDiscrete([2, 3], start=[1, 0]),
        "b": spaces.Discrete(4, start=-1),
        "c": spaces.MultiDiscrete([[1], [2], [2]]),
    }
    env = adapt(dict.fromkeys("abc", ZEROS), done=done, script=[({}, {}, {}, [])])
    layout = env.layout
    assert (layout.action_components, layout.num_actions, layout.action[0]) == (
        (4, 3, 2),
        9,
        (3, 3),
    )
    expected = [
        [1, 1, 0, 0, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 0, 0, 1, 0],
        [1, 0, 0, 0, 1, 1, 0, 1, 1],
    ]
    np.testing.assert_array_equal(env.reset(0)["action_mask"], expected)
    assert env.notes == [
        "agents have up to 4 + 3 + 2 actions: those that an agent does not have are masked"
    ]
    env.step(np.array([[1, 2, 0], [3, 0, 0], [0, 1, 1]], np.int32))
    (actions,) = env._env.actions
    assert all(done[agent].contains(action) for agent, action in actions.items())
    assert [np.ravel(action).tolist() for action in actions.values()] == [[2, 2], [2], [0, 1, 1]]


@pytest.mark.parametrize(
    ("given", "legal"),
    [
        (([1, 0], [0, 1, 1]), [1, 0, 0, 1, 1]),
        ([np.array([1, 0], np.int8), np.array([0, 0, 1], np.int8)], [1, 0, 0, 0, 1]),
        (np.array([0, 1, 1, 0, 1]), [0, 1, 1, 0, 1]),
        ([False, True, False, False, False], [0, 1, 1, 1, 1]),  # the second choice cannot matter
    ],
)
@pytest.mark.parametrize("where", ["info", "observation"])
def test_masks_of_components(given, legal, where):
    done, seen = spaces.MultiDiscrete([2, 3]), NUMBERS
    masks = spaces.Tuple((spaces.MultiBinary(2), spaces.MultiBinary(3)))
    if where == "observation":
        seen = spaces.Dict({"x": NUMBERS, "action_mask": masks})
    env = adapt(
        {"a": ZEROS if where == "info" else {"x": ZEROS, "action_mask": given}},
        seen=seen,
        done=done,
    )
    env._env.infos = {"a": {"action_mask": given}} if where == "info" else {}
    np.testing.assert_array_equal(env.reset(0)["action_mask"], [legal])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 1, 1, 1], "action_mask has shape (4,), there are 2 + 3 actions"),
        (([1, 1, 1], [1, 1]), "action_mask has shape [(3,), (2,)], there are 2 + 3 actions"),
        (([1, 1],), "action_mask has shape [(2,)], there are 2 + 3 actions"),
        (([1, 1], [0, 2, 1]), "action_mask holds 2: expected 1 for legal"),
        (3, "action_mask has shape (), there are 2 + 3 actions"),
    ],
)
def test_masks_of_components_that_do_not_fit(given, message):
    env = adapt({"a": ZEROS}, done=spaces.MultiDiscrete([2, 3]))
    env._env.infos = {"a": {"action_mask": given}}
    with pytest.raises(UserError, match=r"^test: what agent 'a' observes does not fit ") as error:
        env.reset(0)
    assert message in str(error.value)


def test_continuous_actions_fill_their_limits():
    done = {
        "a": spaces.Box(
            np.array([0, -2, -np.inf, 0], np.float32), np.array([1, 2, np.inf, np.inf], np.float32)
        ),
        "b": spaces.Box(-1, 1, (1,), np.float64),
    }
    env = adapt({"a": ZEROS, "b": ZEROS}, done=done, script=[({}, {}, {}, ["a", "b"])] * 2)
    assert env.reset(0)["action_mask"].tolist() == [[True] * 4, [True] + [False] * 3]
    assert env.layout.continuous
    assert (
        env.notes[-1]
        == "actions without limits reach from -1 to 1, or 2 beyond their only limit: give them both"
    )
    env.step(np.array([[-1, 0.5, 0.5, -0.5], [0.25, 9, 9, 9]], np.float32))
    env.step(np.array([[1, 1, -1, 1], [1, 9, 9, 9]], np.float32))
    (first, second) = env._env.actions
    np.testing.assert_array_equal(first["a"], np.array([0, 1, 0.5, 0.5], np.float32))
    np.testing.assert_array_equal(first["b"], [0.25])
    np.testing.assert_array_equal(second["a"], [1, 2, -1, 2])
    assert all(
        done[agent].contains(action) for step in env._env.actions for agent, action in step.items()
    )


# What cannot be had.


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            lambda: Scripted({}),
            "test: the environment has no agents (its possible_agents is empty)",
        ),
        (
            lambda: object(),
            "test: object is not a PettingZoo ParallelEnv: it has no possible_agents",
        ),
        (
            lambda: Scripted({"a": ZEROS}, done=spaces.MultiBinary(2)),
            "test: agent 'a' acts in MultiBinary(2); "
            "supported: Discrete or MultiDiscrete for all agents, or for",
        ),
        (
            lambda: Scripted({"a": ZEROS}, done=spaces.MultiDiscrete([10**5, 2])),
            "test: agent 'a' acts in MultiDiscrete([100000      2]); "
            "at most 100,000 choices are supported",
        ),
        (
            lambda: Scripted({"a": 5}, seen=spaces.Discrete(10**9)),
            "test: agent 'a' observes Discrete(1000000000), "
            "whose 1,000,000,000 values would be as many numbers",
        ),
        (
            lambda: Scripted({"a": ZEROS}, done=spaces.Discrete(10**9)),
            "test: agent 'a' acts in Discrete(1000000000); at most 100,000 choices are supported",
        ),
        (
            lambda: Scripted({"a": ZEROS}, seen=OldSpace()),
            "test: agent 'a' observes Discrete(3) of gym, not of gymnasium; "
            "supported: Box, Discrete",
        ),
        (
            lambda: Scripted({"a": ZEROS}, done=OldSpace()),
            "test: agent 'a' acts in Discrete(3) of gym, not of gymnasium; "
            "supported: Discrete or Mu",
        ),
        (
            lambda: Odd(observation_space=spaces.Dict()),
            "test: observation_space is a Dict: expected a method, obs",
        ),
        (
            lambda: Odd(reset=lambda: ({}, {})),
            "test: reset() takes no seed: expected reset(seed=None, options=None)",
        ),
        (
            lambda: Scripted({"a": ZEROS}, done=spaces.Box(0, 1, (2, 2))),
            "test: agent 'a' acts in Box(0.0, 1.0, (2, 2)",
        ),
        (
            lambda: Scripted({"a": ZEROS}, done=spaces.Box(0, 9, (2,), int)),
            "test: agent 'a' acts in Box(0, 9, (2,), int",
        ),
        (
            lambda: Scripted(
                {"a": ZEROS, "b": ZEROS},
                done={"a": spaces.Discrete(2), "b": spaces.Box(0, 1, (2,))},
            ),
            "test: agent 'a' acts in Discrete(2) and agent 'b' acts "
            "in Box(0.0, 1.0, (2,), float32); supported",
        ),
        (
            lambda: Scripted({"a": ZEROS, "b": "?"}, seen={"a": NUMBERS, "b": spaces.Text(3)}),
            "test: agent 'b' observes Text(1, 3, ",
        ),
    ],
)
def test_unsupported(env, message):
    with pytest.raises(UserError) as error:
        PettingZooEnv(env(), "test")
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("observed", "seen", "infos", "message"),
    [
        (np.zeros(3), NUMBERS, {}, "(2,), float32): shape (3,) instead of (2,)"),
        (4, spaces.Discrete(3), {}, "Discrete(3): 4 is none of its values"),
        (-1, spaces.Discrete(3), {}, "Discrete(3): -1 is none of its values"),
        (
            [3, 1],
            spaces.MultiDiscrete([3, 4]),
            {},
            "MultiDiscrete([3 4]): [3, 1] is none of its values",
        ),
        (
            [0, -1],
            spaces.MultiDiscrete([3, 4]),
            {},
            "MultiDiscrete([3 4]): [0, -1] is none of its values",
        ),
        ([1], spaces.MultiDiscrete([3, 4]), {}, "MultiDiscrete([3 4]): shape (1,) instead of (2,)"),
        (
            np.zeros((3, 2)),
            spaces.Box(0, 1, (2, 3)),
            {},
            "float32): shape (3, 2) instead of (2, 3)",
        ),
        (
            np.zeros((4, 1, 3)),
            spaces.Box(0, 1, (4, 4, 3)),
            {},
            "float32): shape (4, 1, 3) instead of (4, 4, 3)",
        ),
        *[
            (
                np.full((4, 4, 3), number),
                spaces.Box(0, 255, (4, 4, 3), np.uint8),
                {},
                f"uint8): the image holds {number:g}, which is no uint8",
            )
            for number in (0.5, 300, -1, np.nan)
        ],
        ({"x": ZEROS}, spaces.Dict({"y": NUMBERS}), {}, "'y'"),
        (
            ZEROS,
            NUMBERS,
            {"a": {"action_mask": [1, 1]}},
            "action_mask has shape (2,), there are 3 actions",
        ),
        (
            ZEROS,
            NUMBERS,
            {"a": {"action_mask": [0, -np.inf, -np.inf]}},
            "action_mask holds -inf: expected 1 for legal",
        ),
        (
            ZEROS,
            NUMBERS,
            {"a": {"action_mask": [1, 2, 0]}},
            "action_mask holds 2: expected 1 for legal",
        ),
    ],
)
def test_observation_outside_its_space(observed, seen, infos, message):
    env = adapt({"a": observed}, seen=seen)
    env._env.infos = infos
    with pytest.raises(UserError, match=r"^test: what agent 'a' observes does not fit ") as error:
        env.reset(0)
    assert message in str(error.value)


ALL = {"a": ZEROS}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (ALL, "reset() returns a dict, not (observations, infos)"),
        (
            (ZEROS, {}),
            "reset() returns a ndarray for observations: expected a dictionary, agent by agent",
        ),
        (
            ({"z": ZEROS}, {}),
            "observations of reset() has an entry 'z', which is no possible agent",
        ),
        ((ALL, [{}]), "reset() returns a list for infos: expected a dictionary, agent by agent"),
    ],
)
def test_reset_that_returns_something_else(result, message):
    with pytest.raises(UserError) as error:
        PettingZooEnv(Odd(reset=lambda seed: result), "test").reset(0)
    assert str(error.value) == f"test: {message}"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ((ALL, {}, {}, {}), f"step() returns 4 values, not ({STEP})"),
        (None, f"step() returns a NoneType, not ({STEP})"),
        (
            (ALL, {}, False, {}, {}),
            "step() returns a bool for terminations: expected a dictionary, agent by agent",
        ),
        (
            (ALL, {}, {"__all__": True}, {}, {}),
            "terminations of step() has an entry '__all__', which is no possible",
        ),
        (
            (ALL, {"a": np.ones(1)}, {}, {}, {}),
            "the reward of agent 'a' is array([1.]): expected a number",
        ),
        ((ALL, {"a": None}, {}, {}, {}), "the reward of agent 'a' is None: expected a number"),
    ],
)
def test_step_that_returns_something_else(result, message):
    env = PettingZooEnv(Odd(step=lambda actions: result), "test")
    env.reset(0)
    with pytest.raises(UserError) as error:
        env.step(np.zeros(1, np.int32))
    assert str(error.value).startswith(f"test: {message}")


def test_what_is_missing_and_not_needed():
    env = PettingZooEnv(Odd(reset=lambda seed: (ALL, None)), "test")
    with pytest.raises(
        UserError, match=r"^test: there is no attribute agents: expected a list of those who go on$"
    ):
        env.reset(0)
    env._env.agents = ["a"]
    assert env.reset(0)["alive"].all()  # without infos


def test_axes_of_length_one_may_be_missing():
    assert view_of(spaces.Box(0, 9, (1, 2)), np.array([1, 2])) == [1, 2]
    assert view_of(spaces.Box(0, 9, (1,)), 3.0) == [3]


@pytest.mark.parametrize(
    ("space", "value", "found"),
    [
        (NUMBERS, [0, 10], None),
        (NUMBERS, [0, 10 + 1e-6], None),
        (NUMBERS, [np.nan, -np.inf], "-inf outside of -10 to 10"),
        (NUMBERS, [0, 499.5], "499.5 outside of -10 to 10"),
        (spaces.Box(-np.inf, np.inf, (2,)), [-1e30, 1e30], None),
        (spaces.Box(0, 255, (2,), np.uint8), [0.0, 255.0], None),
        (spaces.Box(0, 255, (2,), np.uint8), [0.25, 1.0], "fractions such as 0.25 for uint8"),
        (spaces.MultiBinary(2), [0, 2], "2 outside of 0 to 1"),
        (spaces.Discrete(3), 1, None),
        (
            spaces.Dict({"x": spaces.Tuple((spaces.Discrete(2), NUMBERS))}),
            {"x": (1, [0, 11])},
            "11 outside of -10 to",
        ),
    ],
)
def test_values_outside_their_bounds(space, value, found):
    said = out_of_bounds(space, value)
    assert said is None if found is None else str(said).startswith(found)


def test_agent_out_of_nowhere():
    env = adapt({"a": ZEROS}, script=[({}, {}, {}, ["a", "zoe"])])
    env.reset(0)
    with pytest.raises(
        UserError, match=r"^test: agent 'zoe' is in agents but not in possible_agents$"
    ):
        env.step(np.zeros(1, np.int32))


def test_frames():
    env = PettingZooEnv(Lives(render_mode="rgb_array"), "test")
    env.reset(0)
    env.step(np.zeros(3, np.int32))
    np.testing.assert_array_equal(env.frame(), np.full((2, 3, 3), 1))
    assert PettingZooEnv(Lives(), "test").frame() is None


PICTURE = np.zeros((2, 3, 3))
PICTURE[0] = 0.9


@pytest.mark.parametrize(
    ("drawn", "brightest"),
    [
        (PICTURE, 229),  # floats from 0 to 1
        (PICTURE * 200, 180),
        ((PICTURE * 200).astype(np.uint8), 180),
        (
            [np.zeros((2, 3, 3), np.uint8), np.full((2, 3, 3), 7, np.uint8)],
            7,
        ),  # frames since the last time
        (PICTURE[..., 0], 229),
    ],
)
def test_pictures_of_any_kind_are_drawn(drawn, brightest, monkeypatch):
    env = Lives(render_mode="rgb_array")
    monkeypatch.setattr(env, "render", lambda: drawn)
    frame = PettingZooEnv(env, "test").frame()
    assert (frame.dtype, frame.max()) == (np.uint8, brightest)


@pytest.mark.parametrize("drawn", ["text", np.zeros((2, 3, 5)), np.zeros(4), [], object()])
def test_what_is_no_picture_is_said(drawn, monkeypatch):
    env = Lives(render_mode="rgb_array")
    monkeypatch.setattr(env, "render", lambda: drawn)
    with pytest.raises(UserError, match=r"^test cannot be drawn: render\(\) returns "):
        PettingZooEnv(env, "test").frame()


# The real thing.


def test_mpe2():
    pytest.importorskip("mpe2")
    env = find_factory(
        "pettingzoo/mpe2:simple_spread_v3:N=5,max_cycles=4,continuous_actions=true"
    )()
    env = PettingZooEnv(env, "test")
    assert env.layout.num_agents == 5
    assert env.layout.time_limit == 4
    assert env.layout.continuous
    assert env.layout.state_dim == 5 * env.layout.obs_dim
    observation = env.reset(3)
    np.testing.assert_array_equal(observation["state"], observation["agents_view"].reshape(-1))
    for t in range(4):
        outcome = env.step(np.full((5, 5), 0.1 * t, np.float32))
    assert outcome.truncated
    assert outcome.observation["alive"].all()
    env.close()


def test_turn_based_environments_are_converted_where_that_is_safe():
    mpe2 = pytest.importorskip("mpe2.simple_spread_v3")
    assert PettingZooEnv(mpe2.env(max_cycles=4), "test").layout.num_agents == 3
    chess = types.SimpleNamespace(agent_iter=None, metadata={"is_parallelizable": False})
    with pytest.raises(UserError, match=r"^test: the agents of this AECEnv act in turn"):
        PettingZooEnv(chess, "test")
