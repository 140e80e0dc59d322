"""Policies that come with the library: found by name, whole, and as good as is said of them."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

import mam
from mam.cli.main import main, read_options
from mam.deploy.export import export
from mam.errors import UserError
from mam.learning.train import init_policy, make_train
from mam.runs import zoo
from mam.runs.files import read_object
from mam.runs.initial import started_from
from mam.runs.load import CARD, load_weights, teacher_of
from small_run import INDEPENDENT

NAME = "zoo:probe/matrix/ippo"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A zoo of one policy, of random weights."""
    root = tmp_path_factory.mktemp("zoo")
    config = replace(INDEPENDENT, num_seeds=1)
    spec = mam.make_env(config.env).spec
    policy = init_policy(config, spec, key=jax.random.key(1))
    loaded = mam.LoadedPolicy(config, spec, policy, policy_seed=0, greedy=False)
    export(loaded, root / "probe/matrix/ippo", "safetensors")
    sums = zoo.checksums(root / "probe/matrix/ippo")
    (root / zoo.INDEX).write_text(json.dumps({"probe/matrix/ippo": sums}))
    return root


@pytest.fixture
def root(made, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "ROOT", made)
    monkeypatch.chdir(tmp_path)
    return made


def test_it_plays_wherever_a_run_does(root, tmp_path, capsys):
    views = np.zeros((2, 1), np.float32)
    assert mam.load(NAME).act(views).shape == (2,)
    assert mam.evaluate(NAME, episodes=2)["episode_return"].shape == (1, 2)
    assert main(["play", NAME]) == 0
    assert "return " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["episode.json"]  # not into the library
    weights, folder = load_weights(NAME), load_weights(root / "probe/matrix/ippo")
    jax.tree.map(np.testing.assert_array_equal, weights.policies, folder.policies)


def test_a_run_starts_from_it(root):
    config = replace(INDEPENDENT, init=NAME)
    state = started_from(config, make_train(config)).init(np.arange(2))
    for seed in range(2):
        policy = jax.tree.map(lambda x, seed=seed: x[seed], state.policy)
        jax.tree.map(np.testing.assert_array_equal, policy, mam.load(NAME).policy)


def test_a_run_is_taught_by_it_and_takes_its_settings(root):
    config = read_options("distill", [NAME, "--num-seeds", "1"]).config
    assert config == replace(INDEPENDENT, num_seeds=1, learn="distill", teacher=NAME)
    assert read_options("train", ["--config", NAME]).config == replace(INDEPENDENT, num_seeds=1)
    trainer = make_train(config, teacher=teacher_of(config))
    state = started_from(config, trainer).init(np.arange(1))
    teacher = jax.tree.map(lambda x: x[0], state.teacher)
    jax.tree.map(np.testing.assert_array_equal, teacher, mam.load(NAME).policy)


def test_it_is_listed(root, capsys):
    assert main(["zoo"]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    assert NAME in listed
    assert "mam train --env probe/matrix --policy ippo" in listed


def test_names_that_are_none_and_files_that_are_others(root, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="unknown policy of the zoo 'probe/matrix/ipo': did you me"):
        mam.load("zoo:probe/matrix/ipo")
    copy = shutil.copytree(root, tmp_path / "zoo")
    monkeypatch.setattr(zoo, "ROOT", copy)
    (copy / "probe/matrix/ippo/card.json").write_text("{}")
    with pytest.raises(UserError, match=f"^the files of {NAME} are not those that were published"):
        mam.load(NAME)
    with pytest.raises(UserError, match=r"unknown policy of the zoo '\.\./\.\./outside'"):
        mam.load("zoo:../../outside")


PUBLISHED = zoo.zoo_names()


def test_the_zoo_is_small():
    size = sum(path.stat().st_size for path in zoo.ROOT.rglob("*") if path.is_file())
    assert size < 10 * 2**20
    there = {str(path.parent.relative_to(zoo.ROOT)) for path in zoo.ROOT.rglob(CARD)}
    assert there == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_score_is_what_it_earns(name):
    """Up to four standard errors of the episodes that are played here."""
    card = read_object(zoo.policy_folder(f"zoo:{name}") / CARD)
    assert name == f"{card['task']}/{card['algorithm']}"
    episodes = 16 if (card["spec"]["time_limit"] or 0) > 200 else 64
    returns = mam.evaluate(f"zoo:{name}", episodes=episodes)["episode_return"]
    error = max(returns.std(), 0.05) / np.sqrt(returns.size)
    assert abs(returns.mean() - card["scores"]["absolute_metric"]) < 4 * error
