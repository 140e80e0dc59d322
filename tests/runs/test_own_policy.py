"""A policy of one's own, by its name: trained, loaded, exported and refused as any other."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import mam
from mam.cli import main as cli
from mam.config import Config, FinetuneConfig, PPOConfig, to_json
from mam.errors import UserError
from mam.learning.train import init_policy
from mam.networks.policy import make_policy
from mam.runs.loop import _default_folder
from mam.study.dashboard.replay import Players
from mam.study.dashboard.runs import LiveRun
from report_runs import write_run
from small_run import CONFIG

NAME = "examples.linear_policy:make"
OWN = replace(CONFIG, policy=NAME, num_seeds=1, total_timesteps=32)
SPEC = mam.EnvSpec("suite/task", num_agents=2, obs_dim=3, num_actions=4, time_limit=None)


def half(spec, config, *, key):
    """Makes what is no policy."""
    return Half()


def keyless(spec, config):
    """Takes no key."""


class Half:
    def act(self):
        pass

    def init_memory(self):
        pass


def bare(spec, config, *, key):
    """Makes a policy without the parts that some settings read."""
    return Bare(make_policy("ippo", spec, config, key=key))


class Bare:
    def __init__(self, policy):
        for name in ("init_memory", "act", "evaluate", "successor_values"):
            setattr(self, name, getattr(policy, name))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return mam.train(OWN, out=tmp_path_factory.mktemp("own") / "run")


def test_it_learns_from_ratio_one(trained):
    ratios = [r.values["first_ratio_deviation"] for r in trained.records if r.kind == "train"]
    assert np.max(ratios) <= 1e-5
    assert trained.policy().act(np.zeros((2, 1))).shape == (2,)


def test_what_a_folder_names_is_imported_if_it_is_trusted(trained):
    said = (
        f"names the policy '{NAME}', which is code to import and run: if you trust it, add --trust"
    )
    for use in (mam.load, mam.evaluate):
        with pytest.raises(UserError, match=said):
            use(trained.folder)
    assert mam.load(trained.folder, trust=True).config.policy == NAME


@pytest.mark.parametrize("command", [["evaluate"], ["play"], ["train", "--resume"], ["export"]])
def test_a_command_imports_no_policy_that_only_a_folder_names(command, tmp_path, capsys):
    config = Config(env="probe/matrix", policy="stranger:make")
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    assert cli.main([*command, str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "names the policy 'stranger:make', which is code to import and run" in line
    ways = "--policy stranger:make or --trust" if command[0] == "train" else "--trust"
    assert line.endswith(f"if you trust it, add {ways}")


@pytest.mark.parametrize("word", ["--trust", "--policy=stranger:make"])
def test_the_users_word_imports_it(word, tmp_path):
    config = Config(env="probe/matrix", policy="stranger:make")
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    options = cli.read_options("train", ["--resume", str(tmp_path), word])
    with pytest.raises(UserError, match=r"^no policy stranger:make, expected"):
        init_policy(options.config, SPEC, key=jax.random.key(0))


def test_the_page_plays_none_of_it(tmp_path):
    config = replace(CONFIG, policy="stranger:make")
    run = LiveRun(write_run(tmp_path / "run", config), "run")
    run.poll()
    assert "would import 'stranger:make'" in Players().refusal(run)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            f"{__name__}:half",
            "makes a Half, which lacks evaluate, successor_values: expected a pol",
        ),
        (f"{__name__}:nothing", "no policy .*:nothing, expected package.module:function: "),
        (f"{__name__}:NAME", "is a str: expected a function"),
        (f"{__name__}:keyless", "keyless: .*'key'; expected make\\(spec, config, \\*, key\\)$"),
        ("os:getcwd", "os:getcwd: os is part of Python, where there is no policy"),
        ("nobody", r"unknown policy 'nobody' \(see `mam list`\)"),
    ],
)
def test_what_is_none_is_refused(name, said):
    with pytest.raises(UserError, match=said):
        make_policy(name, SPEC, CONFIG.network, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "ppo.normalise_value reads the part value_layer, which .*:bare lacks"),
        (
            {"ppo": PPOConfig(normalise_value=False), "learn": "bc", "data": "here"},
            "data reads the part distribution",
        ),
        (
            {"ppo": PPOConfig(normalise_value=False), "learn": "distill", "teacher": "there"},
            "teacher reads the part distribution",
        ),
        (
            {
                "ppo": PPOConfig(normalise_value=False),
                "finetune": FinetuneConfig(critic_warmup=1),
            },
            "finetune.critic_warmup reads the part critic",
        ),
    ],
)
def test_settings_that_read_parts_it_lacks_are_refused(changes, said):
    config = replace(CONFIG, policy=f"{__name__}:bare", **changes)
    with pytest.raises(UserError, match=said):
        init_policy(config, SPEC, key=jax.random.key(0))


def test_decoding_is_of_sequence_policies():
    with pytest.raises(UserError, match=r"decode is for sequence policies .*, not for examples"):
        init_policy(replace(OWN, decode="fixed_point"), SPEC, key=jax.random.key(0))


def test_its_folder_has_a_name_that_every_file_system_takes():
    folder = _default_folder(OWN)
    assert folder == Path("runs/probe/matrix/examples.linear_policy_make")
