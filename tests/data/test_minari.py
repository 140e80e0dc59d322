"""Minari's datasets of several agents are read as they were written; see make_minari.py."""

import json
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from make_minari import AGENTS, CHOICES, LENGTHS, REALS, episodes

from mam.data.steps import to_rows
from mam.data.summary import open_dataset, summarise
from mam.errors import UserError


@pytest.fixture
def root(tmp_path):
    with tarfile.open(Path(__file__).parent / "minari.tar.gz") as file:
        file.extractall(tmp_path, filter="data")
    return tmp_path / "own"


@pytest.mark.parametrize(("name", "spaces"), [("choices", CHOICES), ("reals", REALS)])
def test_its_steps_are_those_that_were_written(name, spaces, root):
    data, written = open_dataset(root / f"{name}-v0"), episodes(*spaces)
    spec, steps = data.spec, data.read()
    assert (spec.name, spec.agent_names) == (f"minari/own/{name}-v0", AGENTS)
    assert (spec.obs_dim, spec.num_actions, spec.continuous) == (
        (4, 2, True) if name == "reals" else (4, 3, False)
    )
    assert data.lengths.tolist() == [*LENGTHS]
    np.testing.assert_allclose(data.returns, [one["rewards"].sum() for one in written])
    to_rows(steps, spec, data.optional)  # whole episodes of the task that it says it is of
    assert np.flatnonzero(steps.terminated).tolist() == [2]
    assert np.flatnonzero(steps.truncated).tolist() == [4, 8]  # the third was cut off
    summary = summarise(data)
    assert (summary.illegal, summary.missing) == (
        0,
        ("log_prob", "value", "order", "state", "grid"),
    )
    third, steps = written[2], data.read([2])
    for n, agent in enumerate(AGENTS):
        seen, action = third["observations"][agent], third["actions"][agent]
        if name == "choices":
            np.testing.assert_array_equal(
                steps.observation.action_mask[:, n], seen["action_mask"][:-1] > 0
            )
            np.testing.assert_array_equal(steps.action[:, n], action - 1)
            seen = seen["observation"]
        else:  # within [-1, 3] and [0, 2]
            np.testing.assert_allclose(steps.action[:, n], (action - 1) / [2, 1], atol=1e-6)
        np.testing.assert_array_equal(steps.observation.agents_view[:, n], seen[:-1])
        np.testing.assert_array_equal(steps.final_observation.agents_view[:, n], seen[1:])
    np.testing.assert_array_equal(steps.reward, np.repeat(third["rewards"][:, None], 2, axis=1))


def test_several_choices_may_be_one(root):
    """Then they are read as that one, as everywhere else."""
    single = {"type": "MultiDiscrete", "nvec": [3], "start": [1]}
    path = root / "choices-v0" / "data"
    facts = json.loads((path / "metadata.json").read_text())
    plain = open_dataset(root / "choices-v0").read().action
    facts["action_space"] = json.dumps({"type": "Dict", "subspaces": dict.fromkeys(AGENTS, single)})
    (path / "metadata.json").write_text(json.dumps(facts))
    with h5py.File(path / "main_data.hdf5", "r+") as file:
        for group in file.values():
            for agent in AGENTS:
                action = group["actions"][agent][()]
                del group["actions"][agent]
                group["actions"][agent] = action[:, None]
    data = open_dataset(root / "choices-v0")
    assert data.spec.action_components is None
    np.testing.assert_array_equal(data.read().action, plain)


BOX = {"type": "Box", "shape": [4], "low": [-1.0] * 4, "high": [1.0] * 4}
CHOICE = {"type": "Discrete", "n": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_space": CHOICE}, "holds no joint trajectories: its action_space is a Discrete"),
        ({"action_space": {"left": CHOICE}}, r"\['left', 'right'\] observe and \['left'\] act"),
        (
            {"action_space": {"left": CHOICE, "right": {"type": "Discrete", "n": 2}}},
            "its agents have different spaces",
        ),
        (
            {"observation_space": {"left": {**BOX, "shape": [2, 2]}, "right": BOX}},
            r"only vectors are read, not the observation Box\[2, 2\] of left",
        ),
        (
            {"action_space": {"left": {"type": "Text"}, "right": CHOICE}},
            "only choices and vectors are read, not the action Text of left",
        ),
        (
            {"action_space": dict.fromkeys(AGENTS, BOX | {"high": [float("inf")] * 4})},
            "only actions within bounds are read",
        ),
        ({"action_space": None}, "is damaged: there is no action_space in its metadata"),
        ({"data_format": "arrow"}, "is stored as arrow: only hdf5 is read"),
    ],
)
def test_what_is_no_joint_trajectory_is_one_line(changes, message, root):
    path = root / "choices-v0" / "data" / "metadata.json"
    facts = json.loads(path.read_text())
    for name, value in changes.items():
        if isinstance(value, dict) and "type" not in value:
            value = {"type": "Dict", "subspaces": value}
        facts[name] = json.dumps(value) if isinstance(value, dict) else value
    path.write_text(json.dumps({name: x for name, x in facts.items() if x is not None}))
    with pytest.raises(UserError, match=message):
        open_dataset(root / "choices-v0")


def test_one_agent_and_damage_are_one_line(root):
    with pytest.raises(UserError, match="its observation_space is a Box, not a Dict of agents"):
        open_dataset(root / "alone-v0")
    (root / "reals-v0" / "data" / "main_data.hdf5").write_bytes(b"nothing")
    with pytest.raises(UserError, match="reals-v0 is damaged: "):
        open_dataset(root / "reals-v0")
