"""Who listens to whom: shares by agent, and the picture that the command makes of them."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mam.cli import main as cli
from mam.config import NetworkConfig
from mam.learning.train import init_policy
from mam.runs import loop
from mam.runs.listening import _by_agent, frames_at, shares
from mam.runs.play import Episode, Trace
from mam.types import EnvSpec, Observation
from small_run import CONFIG

SPEC = EnvSpec("own/task", num_agents=3, obs_dim=4, num_actions=5, time_limit=None)


def test_rows_and_columns_are_by_agent():
    """Agents 2, 0, 1 decide in this order; agent 1 is dead, and takes nothing."""
    matrix = np.array([[[1.0, 0, 0], [-1, 3, 0], [5, 6, 7]]])[None]
    order, alive = np.array([[2, 0, 1]]), np.array([[True, True, False]])
    inputs = (jnp.asarray(matrix), jnp.asarray(order), jnp.asarray(alive))
    of_agents = _by_agent(*inputs, of_actions=False)[0]
    np.testing.assert_allclose(of_agents, [[0.75, 0, 0.25], [0, 0, 0], [0, 0, 1]])
    # The second that decides reads the action of the first: the start token, then agent 2's.
    of_actions = _by_agent(*inputs, of_actions=True)[0]
    np.testing.assert_allclose(of_actions, [[0.25, 0, 0, 0.75], [0, 0, 0, 0], [1, 0, 0, 0]])


@pytest.mark.parametrize("name", ["mam", "mat"])
def test_the_living_share_out_what_they_take(name):
    config = replace(CONFIG, policy=name, network=NetworkConfig(d_model=8, d_state=2))
    policy = init_policy(config, SPEC, key=jax.random.key(0))
    rng, length = np.random.default_rng(0), 4
    alive = np.ones((length, 3), bool)
    alive[2:, 1] = False
    view = rng.normal(size=(length, 3, 4)).astype(np.float32)
    zeros, order = np.zeros((length, 3), np.float32), np.argsort(~alive, axis=-1, kind="stable")
    trace = Trace(
        zeros, zeros, np.zeros_like(alive, np.int32), zeros, order.astype(np.int32), alive
    )
    seen = Observation(view, np.ones((length, 3, 5), bool), alive)
    found = shares(policy, Episode(0.0, True, trace, 0, "undrawn", observation=seen))
    assert {name: x.shape for name, x in found.items()} == {
        "encoder 1": (length, 3, 3),
        "decoder 1": (length, 3, 4),
        "cross 1": (length, 3, 4),
    }
    assert list(found) == ["encoder 1", "decoder 1", "cross 1"]
    for share in found.values():
        np.testing.assert_allclose(share.sum(axis=-1), alive, rtol=1e-5)
    assert (found["encoder 1"][2:, :, 1] == 0).all()
    first = order[:, 0]  # decides first, and reads nobody's action
    np.testing.assert_allclose(found["decoder 1"][np.arange(length), first, 0], 1)


def test_frames_are_found_where_equal_ones_were_put_together(tmp_path):
    shades = (0, 0, 0, 100, 200)
    frames = [Image.new("L", (2, 2), shade) for shade in shades]
    frames[0].save(
        tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100, loop=0
    )
    found = frames_at(tmp_path / "a.gif", np.arange(5), 5)
    assert [int(frame[0, 0, 0]) for frame in found] == list(shades)


def test_the_command_draws_an_episode(tmp_path, capsys):
    config = replace(CONFIG, num_seeds=1, total_timesteps=16)
    folder, trainer = loop.start(config, tmp_path / "run")
    assert loop.run(config, folder, trainer) == "finished"
    assert cli.main(["inspect", str(folder.path), "--steps", "2"]) == 0
    assert "encoder 1, decoder 1, cross 1" in capsys.readouterr().out
    with Image.open(folder.path / "mixing.png") as picture:
        assert min(picture.size) > 200
    trace = json.loads((folder.path / "mixing.json").read_text())
    assert trace["policy_seed"] == 0
    for name, columns in (("encoder 1", 2), ("decoder 1", 3), ("cross 1", 3)):
        share = np.array(trace["mixing"][name])
        assert share.shape == (len(trace["reward"]), 2, columns)
        np.testing.assert_allclose(share.sum(axis=-1), 1, atol=2e-3)
    assert cli.main(["inspect", str(folder.path), "--out", "a.jpg"]) == 2
    assert "--out is a PNG, such as a.png: got a.jpg" in capsys.readouterr().err
    assert cli.main(["inspect", str(folder.path), "--steps", "0"]) == 2
    assert "--steps must be positive, got 0" in capsys.readouterr().err
