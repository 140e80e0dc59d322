"""The tutorials do what they say: every block, in order, in small."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from mam import presets
from mam.cli import main as cli
from small_run import INDEPENDENT

TUTORIALS = sorted((Path(__file__).parent.parent / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
STEPS = re.compile(r"--total-timesteps \d+ ")
# One seed, and steps as few as an update of every kind takes
SMALL = replace(INDEPENDENT, num_seeds=1, total_timesteps=32)


@pytest.fixture
def small(monkeypatch, symbolic_sizes):
    """Presets are a small run; what a page says of it, such as the policy, comes on top."""
    for name in presets.PRESETS:
        env = name if "/" in name else presets.PRESETS[name]().env
        monkeypatch.setitem(presets.PRESETS, name, lambda env=env: replace(SMALL, env=env))
    monkeypatch.setattr(presets, "own", lambda: replace(SMALL, agent_id="sinusoid"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_every_block_of_a_tutorial_runs(path, small, tmp_path, monkeypatch):
    """To the letter but for numbers of steps; one that begins with a file's name is that file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    blocks, names = BLOCK.findall(path.read_text(encoding="utf-8")), {"__name__": "tutorial"}
    assert blocks
    for language, code in blocks:
        if language == "sh":
            for line in code.splitlines():
                name, *args = shlex.split(STEPS.sub("", line))
                assert (name, cli.main(args)) == ("mam", 0), line
        elif file := re.match(r"# (\w+\.py)\n", code):
            (tmp_path / file[1]).write_text(code)
        else:
            exec(compile(code, path.name, "exec"), names)
