"""Playing one episode for looking at it."""

from dataclasses import dataclass
from pathlib import Path

import jax
import pytest

from mam.config import NetworkConfig
from mam.envs.probes import Memory
from mam.envs.wrappers import AgentId, EpisodeStatistics
from mam.networks.policy import make_policy
from mam.play import play


@dataclass(frozen=True)
class Drawn(EpisodeStatistics):
    """Writes the number of states in place of their picture."""

    def animate(self, states, path: Path) -> None:
        path.write_text(str(len(states)))


@pytest.mark.parametrize("greedy", [False, True])
def test_every_state_of_the_episode_is_drawn(greedy, tmp_path):
    env = Drawn(AgentId(Memory(length=4)))
    policy = make_policy("mat", env.spec, NetworkConfig(d_model=8), key=jax.random.key(0))
    returns = {play(env, policy, seed, tmp_path / "episode.gif", greedy=greedy) for seed in range(2)}
    assert int((tmp_path / "episode.gif").read_text()) == 4 + 1
    assert all(0 <= value <= 1 for value in returns)
