"""A folder that names code: nothing is imported before the user agrees, then environments only."""

import asyncio
import json
import sys
from dataclasses import replace

import pytest

from mam.cli import main as cli
from mam.config import CloningConfig, Config, NetworkConfig, to_json
from mam.envs.external.factories import find_factory, names_code
from mam.errors import UserError
from mam.study.dashboard.replay import Players
from mam.study.dashboard.runs import LiveRun
from report_runs import CONFIG, write_run

MODULE = """
import functools, os, pathlib, subprocess
from subprocess import getoutput

pathlib.Path("imported").touch()
shell, touch, Popen = os.system, functools.partial(os.system, "touch called"), subprocess.Popen

def make():
    pathlib.Path("called").touch()
    return "no environment"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run on an environment in a module beside it, whose import and whose call leave a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "stranger.py").write_text(MODULE)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_json(Config(env="stranger:make"))))
    yield tmp_path
    sys.modules.pop("stranger", None)


COMMANDS = (["evaluate", "run"], ["play", "run"], ["train", "--resume", "run"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_command_imports_nothing_that_only_a_folder_names(folder, capsys, command):
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'stranger:make', which is code" in line
    assert "--env stranger:make or --trust" in line
    assert not (folder / "imported").exists()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("setting", "what", "group"),
    [
        ("network.order", "order", {"network": NetworkConfig(order="stranger:make")}),
        ("cloning.augment", "augmentation", {"cloning": CloningConfig(augment="stranger:make")}),
    ],
)
def test_nor_other_code(folder, capsys, command, setting, what, group):
    config = to_json(Config(env="probe/matrix", **group))
    (folder / "run" / "config.json").write_text(json.dumps(config))
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    own = f"--{setting} stranger:make or " * (command[0] == "train")
    assert line.endswith(
        f"the {what} 'stranger:make', which is code to import and run: "
        f"if you trust it, add {own}--trust"
    )
    assert not (folder / "imported").exists()


@pytest.mark.parametrize("command", [["plan"], ["train"], ["sweep"]], ids=" ".join)
def test_settings_of_a_folder_are_no_users_word(folder, capsys, command):
    assert cli.main([*command, "--config", "run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    agree = "--env stranger:make or --trust" if command == ["train"] else "--env stranger:make"
    assert line.endswith(
        f"'stranger:make', which is code to import and run: if you trust it, add {agree}"
    )
    assert not (folder / "imported").exists()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    "word", [["--trust"], ["--env", "stranger:make"], ["--env=stranger:make"]], ids=" ".join
)
def test_the_users_word_imports_it_and_what_it_returns_has_to_be_an_environment(
    folder, capsys, command, word
):
    assert cli.main([*command, *word]) == 2
    assert (
        "stranger:make returns a str: expected a subclass of mam.types.Environment"
        in capsys.readouterr().err
    )
    assert (folder / "called").exists()


@pytest.mark.parametrize(
    "name",
    [
        "subprocess:getoutput:cmd=touch called",
        "pettingzoo/subprocess:getoutput:cmd=touch called",
        "os:system:command=touch called",
        "builtins:eval:source=1",
        "antigravity:fly",
        "stranger:getoutput:cmd=touch called",
        "stranger:shell:command=touch called",
        "stranger:touch",
        "stranger:Popen:args=ls",
        "stranger:os",
    ],
)
def test_nothing_of_pythons_own_is_called_whoever_asks(folder, capsys, name):
    config = json.loads((folder / "run" / "config.json").read_text())
    (folder / "run" / "config.json").write_text(json.dumps(config | {"env": name}))
    assert cli.main(["evaluate", "run", "--trust"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line
    with pytest.raises(UserError, match=r"is part of Python|nothing that makes an environment"):
        find_factory(name)
    assert not (folder / "called").exists()


def test_which_names_are_code():
    assert not any(
        map(names_code, ("lbf/small", "lbf/auto:agents=4", "smax/auto:", "camar/caves:"))
    )
    assert all(
        map(
            names_code,
            ("a:b", "a.b:c:d=1", "pettingzoo/auto:x", "pettingzoo/a:b", "./a.py:b", "a/auto.py:b"),
        )
    )


def test_the_page_says_what_it_would_import_and_plays_nothing_of_it(tmp_path):
    run = LiveRun(write_run(tmp_path / "run", replace(CONFIG, env="stranger:make")), "run")
    run.poll()
    players = Players()
    assert "would import 'stranger:make'" in players.refusal(run)
    with pytest.raises(UserError, match="would import"):
        asyncio.run(players.play(run, policy_seed=0, greedy=False, seed=0, say=print))
    assert not (run.path / "replays").exists()
    assert Players(trust=True).refusal(run) == ""
