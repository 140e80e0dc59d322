"""OG-MARL's Vaults are read as they were written; the sample is that of make_vault.py."""

import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from make_vault import LENGTHS, experience

from mam.data.steps import to_rows
from mam.data.summary import open_dataset, summarise
from mam.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vault")
    with tarfile.open(Path(__file__).parent / "vault.tar.gz") as file:
        file.extractall(path, filter="data")
    return path / "sample.vlt" / "Good"


def test_its_statistics_agree(folder):
    data, leaves = open_dataset(folder), experience()
    spec, rewards = data.spec, leaves["rewards"][0, : sum(LENGTHS), 0]
    assert (spec.name, spec.num_agents, spec.obs_dim, spec.num_actions) == ("vault/sample", 2, 4, 3)
    assert (spec.state_dim, spec.continuous, spec.team_reward) == (5, False, True)
    assert data.lengths.tolist() == [*LENGTHS]
    bounds = np.cumsum((0, *LENGTHS))
    expected = [rewards[a:b].sum() for a, b in pairwise(bounds)]
    np.testing.assert_allclose(data.returns, expected)
    summary = summarise(data)
    assert (summary.terminated, summary.truncated) == (2, 1)
    assert summary.alive.tolist() == [8 / 9, 1]  # one agent ends a step before the other
    assert summary.illegal == 0


def test_its_steps_are_those_that_were_written(folder):
    data, leaves = open_dataset(folder), experience()
    steps, stop = data.read(), sum(LENGTHS)
    np.testing.assert_array_equal(steps.observation.agents_view, leaves["observations"][0, :stop])
    np.testing.assert_array_equal(steps.action, leaves["actions"][0, :stop])
    np.testing.assert_array_equal(steps.observation.action_mask, leaves["infos.legals"][0, :stop])
    assert np.flatnonzero(steps.reset).tolist() == [0, 3, 5]
    np.testing.assert_array_equal(steps.final_observation.state[0], leaves["infos.state"][0, 1])
    to_rows(steps, data.spec, data.optional)  # whole episodes of the task that it says it is of
    np.testing.assert_array_equal(data.read([1]).reward, leaves["rewards"][0, 3:5])


def test_what_is_no_vault_of_joint_trajectories_is_one_line(folder, tmp_path):
    (tmp_path / "metadata.json").write_text('{"structure_shape": {"observations": "(1, 2)"}}')
    with pytest.raises(UserError, match="is damaged: there is no actions in it"):
        open_dataset(tmp_path)
