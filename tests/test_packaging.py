"""What a new user installs: the wheel or the sdist, from local files, without a checkout."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

from mam.errors import DISTRIBUTION, NATIVE

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WRITTEN = [
    *(
        ROOT / name
        for name in (
            "README.md",
            "CONTRIBUTING.md",
            "Makefile",
            "pyproject.toml",
            "native/README.md",
        )
    ),
    *(
        path
        for folder in ("docs", "examples", "src")
        for path in sorted((ROOT / folder).rglob("*.*"))
        if path.suffix != ".pyc"
    ),
]
TRAIN = (
    *(
        "train",
        "--env",
        "probe/identity",
        "--total-timesteps",
        "32",
        "--out",
        "run",
        "--policy",
        "ippo",
    ),
    *(
        "--ppo.num-envs",
        "4",
        "--ppo.rollout-length",
        "4",
        "--ppo.num-epochs",
        "1",
        "--ppo.num-minibatches",
        "1",
    ),
    *(
        "--eval.num-evaluations",
        "1",
        "--eval.num-episodes",
        "2",
        "--eval.num-absolute-episodes",
        "2",
    ),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a wheel and an sdist of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("suffix", [".whl", ".tar.gz"])
def test_what_is_built_installs_with_extras_and_trains(built, suffix, tmp_path):
    (archive,) = built.glob(f"{DISTRIBUTION.replace('-', '_')}*{suffix}")
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=True)
    binaries = environment / "bin"
    # What is installed beside the tests is pip's index: nothing has to be downloaded.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "installed.pth").write_text(sysconfig.get_path("purelib"))
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    source = f"{DISTRIBUTION}[envs,report] @ {archive.as_uri()}"
    pip = (
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-build-isolation",
        "--disable-pip-version-check",
        source,
    )
    assert "WARNING" not in run(
        str(binaries / "python"), *pip
    )  # such as of an extra that does not exist
    mam = str(binaries / "mam")
    assert run(mam, "--version").startswith(f"mam {PROJECT['version']},")
    (installed,) = environment.glob("lib/python*/site-packages/mam")
    assert files_in(installed) == files_in(ROOT / "src/mam")
    if suffix == ".whl":  # the sdist's files are the same
        assert "lbf/2s-8x8-2p-2f-coop" in run(mam, "list")
        assert "absolute metric" in run(mam, *TRAIN)


def files_in(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(folder)) for path in files}


def test_the_distributions_name_is_one():
    assert PROJECT["name"] == DISTRIBUTION
    assert tomllib.loads((ROOT / "native/pyproject.toml").read_text())["project"]["name"] == NATIVE


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_tells_to_install_another_projects_package(path):
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return  # a picture
    assert not re.search(r"['\"]mam\[|pip install ['\"]?mam\b", text)
    for extras in re.findall(rf"{DISTRIBUTION}\[([\w,]+)\]", text):
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
