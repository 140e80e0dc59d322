"""Playing one episode for looking at it."""

import json
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mam.config import NetworkConfig
from mam.envs.probes import Memory
from mam.envs.wrappers import AgentId, EpisodeStatistics
from mam.networks.policy import make_policy
from mam.runs.play import Episode, ExternalTask, Trace, play, write_trace
from mam.study.dashboard.replay import load
from mam.types import EnvSpec

ARRAYS = ("reward", "value", "action", "log_prob", "order", "alive")
LENGTH = 4


@dataclass(frozen=True)
class Drawn(EpisodeStatistics):
    """Writes the number of states in place of their picture."""

    def animate(self, states, path: Path) -> None:
        path.write_text(str(len(states)))


class Placed(Drawn):
    """Says where agents are: at their number, and at the number of the step."""

    def reset(self, key):
        return self._place(*super().reset(key))

    def step(self, state, action, key):
        return self._place(*super().step(state, action, key))

    def _place(self, state, timestep):
        agents = jnp.arange(self.spec.num_agents, dtype=jnp.float32)
        places = jnp.stack([agents, jnp.full_like(agents, state.episode_length)], axis=-1)
        return state, eqx.tree_at(
            lambda t: t.observation.positions, timestep, places, is_leaf=lambda x: x is None
        )


class Unlucky(EpisodeStatistics):
    """Cannot be drawn, for a reason of its own."""

    def animate(self, states, path: Path) -> None:
        raise KeyError("viewer")


@pytest.fixture(scope="module")
def player():
    """Plays an episode of a probe."""
    plain = AgentId(Memory(length=LENGTH))
    policy = make_policy("mat", plain.spec, NetworkConfig(d_model=8), key=jax.random.key(0))
    return lambda kind, seed, path, **how: play(kind(plain), policy, seed, path, **how)


@pytest.mark.parametrize("greedy", [False, True])
def test_every_state_of_the_episode_is_drawn_and_every_decision_written(player, greedy, tmp_path):
    path = tmp_path / "episode.gif"
    episode = player(Drawn, 1, path, greedy=greedy, policy_seed=3)
    assert int(path.read_text()) == LENGTH + 1
    assert 0 <= episode.episode_return <= 1
    row = json.loads((tmp_path / "episode.json").read_text())
    assert (row["seed"], row["policy_seed"], row["greedy"]) == (1, 3, greedy)
    assert row["agents"] is None
    assert (row["picture"], row["num_frames"], row["terminated"]) == (
        "episode.gif",
        LENGTH + 1,
        True,
    )
    assert row["episode_return"] == pytest.approx(np.mean(row["reward"], axis=1).sum())
    assert {np.shape(row[name]) for name in ARRAYS} == {(LENGTH, 2)}
    assert (np.array(row["log_prob"]) <= 0).all()
    assert all(sorted(order) == [0, 1] for order in row["order"])


@pytest.mark.parametrize("kind", [Placed, EpisodeStatistics])
def test_where_agents_were_is_written_where_it_is_known(player, kind, tmp_path):
    player(kind, 0, tmp_path / "episode.gif", picture=False)
    row = json.loads((tmp_path / "episode.json").read_text())
    places = load(tmp_path / "episode.json").trace.get("positions")
    if kind is EpisodeStatistics:
        assert "positions" not in row
        assert places is None
    else:
        step, agent = np.indices((LENGTH, 2))
        assert row["positions"] == np.stack([agent, step], axis=-1).tolist()
        np.testing.assert_array_equal(places, row["positions"])


@pytest.mark.parametrize(
    ("kind", "picture", "most", "why"),
    [
        (Placed, None, 1, "2 agents are drawn only with --picture True"),
        (Placed, None, 2, ""),
        (Placed, True, 1, ""),
        (Drawn, None, 1, ""),  # there is nothing else to look at
        (Drawn, False, 2, "was not asked for"),
    ],
)
def test_many_agents_are_drawn_if_asked_for(
    player, monkeypatch, tmp_path, kind, picture, most, why
):
    monkeypatch.setattr("mam.runs.play.MOST_DRAWN", most)
    episode = player(kind, 0, tmp_path / "episode.gif", picture=picture)
    assert why in episode.undrawn
    assert (tmp_path / "episode.gif").exists() == (not episode.undrawn) == (not why)


@pytest.mark.parametrize(
    ("kind", "why"),
    [(EpisodeStatistics, "cannot be drawn"), (Unlucky, "cannot be drawn: KeyError: 'viewer' (")],
)
def test_a_trace_needs_no_picture(player, kind, why, tmp_path):
    episode = player(kind, 0, tmp_path / "episode.gif")
    assert why in episode.undrawn
    assert [path.name for path in tmp_path.iterdir()] == ["episode.json"]
    row = json.loads((tmp_path / "episode.json").read_text())
    assert (row["picture"], row["num_frames"], len(row["reward"])) == (None, 0, LENGTH)
    assert load(tmp_path / "episode.json").last == LENGTH


@pytest.fixture
def lives(monkeypatch):
    """Plays an episode of a PettingZoo environment, made by the class of that name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "envs"))
    size = 3 + 4  # a one-hot id, and what cleo sees
    spec = EnvSpec(
        name="lives", num_agents=3, obs_dim=size, num_actions=5, time_limit=None, state_dim=2
    )
    policy = make_policy("ippo", spec, NetworkConfig(d_model=8), key=jax.random.key(0))
    return lambda kind, path: play(
        ExternalTask(f"host_environments:{kind}", "one_hot"), policy, 5, path
    )


def test_an_episode_on_the_host_leaves_the_same_files(lives, tmp_path):
    path = tmp_path / "episode.gif"
    episode = lives("Lives", path)
    assert not episode.terminated  # cleo would have gone on
    replay = load(tmp_path / "episode.json")
    assert replay.length == 7
    assert replay.trace["alive"].sum(axis=0).tolist() == [2, 5, 7]
    assert replay.agents == ["ann", "bob", "cleo"]
    assert replay.reward_so_far(7) == pytest.approx(episode.episode_return)
    with Image.open(path) as image:
        assert len(replay.frames) == image.n_frames
    assert [replay.frame(state) for state in range(7)] == sorted(
        replay.frame(state) for state in range(7)
    )


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("Blind", "cannot be drawn: AttributeError"),
        ("Unfinished", "cannot be drawn: NotImplementedError"),
    ],
)
def test_what_cannot_be_drawn_or_closed_is_traced(lives, kind, why, tmp_path):
    episode = lives(kind, tmp_path / "episode.gif")
    assert why in episode.undrawn
    assert "\n" not in episode.undrawn
    assert [path.name for path in tmp_path.iterdir()] == ["episode.json"]
    assert load(tmp_path / "episode.json").length == 7


def test_numbers_that_are_none_are_null(tmp_path):
    numbers, ones = np.full((2, 1), np.nan, np.float32), np.ones((2, 1))
    trace = Trace(
        numbers, numbers, ones.astype(int), numbers, np.zeros((2, 1), int), ones.astype(bool)
    )
    write_trace(tmp_path / "e.gif", Episode(float("nan"), False, trace, 0, "no"), seed=0)
    row = json.loads((tmp_path / "e.json").read_text())
    assert row["episode_return"] is None
    assert row["value"] == [[None], [None]]
    assert row["alive"] == [[True], [True]]
