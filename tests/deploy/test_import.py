"""Weights by name come back: as a policy that plays, or in one line that says what is wrong."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mam
from mam.cli.main import main
from mam.deploy.export import export
from mam.errors import UserError
from mam.learning.train import init_policy
from mam.runs.load import WEIGHTS, read_weights
from small_run import INDEPENDENT


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a policy of random weights."""
    config = replace(INDEPENDENT, num_seeds=1)
    spec = mam.make_env(config.env).spec
    policy = init_policy(config, spec, key=jax.random.key(1))
    loaded = mam.LoadedPolicy(config, spec, policy, policy_seed=0, greedy=False)
    out = tmp_path_factory.mktemp("exported") / "policy"
    export(loaded, out, "safetensors")
    return out


def test_changed_weights_are_a_policy_that_plays(exported, tmp_path, capsys):
    arrays = {name: np.asarray(-array) for name, array in load_file(exported / WEIGHTS).items()}
    save_file(arrays, tmp_path / "mine.safetensors")
    how = ["--like", str(exported), "--out", str(tmp_path / "mine")]
    assert main(["import", str(tmp_path / "mine.safetensors"), *how]) == 0
    assert "ippo for probe/matrix is in" in capsys.readouterr().out
    policy, before = mam.load(tmp_path / "mine"), mam.load(exported)
    changed, leaves = jax.tree.leaves(policy.policy), jax.tree.leaves(before.policy)
    for one, other in zip(changed, leaves, strict=True):
        np.testing.assert_array_equal(one, -other)
    assert policy.metadata["scores"] == {}
    assert mam.evaluate(tmp_path / "mine", episodes=2)["episode_return"].shape == (1, 2)
    assert main(["import", str(tmp_path / "mine.safetensors"), *how]) == 2
    assert "exists: choose another --out" in capsys.readouterr().err


NAMES = "network.actor.head.out.bias", "network.actor.head.out.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({NAMES[0]: None}, f"{NAMES[0]} is missing"),
        ({"more": np.zeros(1)}, "more is unknown"),
        ({NAMES[0]: np.zeros(7)}, rf"{NAMES[0]} is \[7\] instead of \[3\]"),
        (
            dict.fromkeys([*NAMES, "a", "b"]) | {"a": np.zeros(1), "b": np.zeros(1)},
            "a is unknown, b is unknown, .* is missing and 1 more",
        ),
    ],
)
def test_what_is_not_of_such_a_policy_is_named(change, said, exported, tmp_path):
    arrays = load_file(exported / WEIGHTS) | change
    file = tmp_path / "w.safetensors"
    save_file({name: array for name, array in arrays.items() if array is not None}, file)
    like = mam.load(exported)
    with pytest.raises(UserError, match=f"w.safetensors holds no ippo for probe/matrix: {said}"):
        read_weights(file, like.config, like.spec)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["w"], "import needs --like, the folder whose sizes the weights have, and --out"),
        ([], "import needs a file of weights: mam import WEIGHTS"),
    ],
)
def test_what_is_not_said_is_asked_for(args, said, capsys):
    assert main(["import", *args]) == 2
    assert said in capsys.readouterr().err
