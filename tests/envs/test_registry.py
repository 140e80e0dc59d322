"""Names to environments, and what a misspelt name says."""

import subprocess
import sys
import tomllib
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import host_environments
import numpy as np
import pytest

from mam.cli import main as cli
from mam.envs import registry, tasks
from mam.envs.probes import PROBES, Identity
from mam.envs.wrappers import AgentId, AutoReset, EpisodeStatistics
from mam.errors import UserError
from mam.runs.loop import versions

ROOT = Path(__file__).parents[2]
FIRST = [f"{name}/{next(iter(suite.tasks))}" for name, suite in tasks.SUITES.items()]
FIRST += [f"{name}/{task}" for name, row in tasks.SUITES.items() for task in row.made_to_measure]


def test_names_and_what_they_stand_for_agree():
    for name, suite in tasks.SUITES.items():
        module = import_module(suite.module)
        assert hasattr(module, f"make_{name}")
        made = {maker for maker in vars(module) if maker.startswith(f"make_{name}_")}
        assert made == {f"make_{name}_{task}" for task in suite.made_to_measure}
    assert tasks.SUITES["probe"].tasks == tuple(PROBES)


def test_what_rows_say_of_packages_is_what_is_installed_and_documented():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    rows = ["| suite | extra | what it is | tasks |", "|---|---|---|---|"]
    for name, suite in tasks.SUITES.items():
        sizes = f"{len(suite.tasks)}{', and any size' if suite.made_to_measure else ''}"
        rows.append(
            f"| `{name}` | {f'`{suite.extra}`' if suite.extra else 'none'} | "
            f"{suite.description} | {sizes} |"
        )
        installed = " ".join(extras[suite.extra] if suite.extra else [])
        assert bool(suite.extra) == bool(suite.packages)
        assert all(package in installed for package in suite.packages), name
    assert "\n".join(rows) in (ROOT / "docs/environments.md").read_text()


MISSING = [
    (task, package) for task in FIRST for package in tasks.SUITES[task.partition("/")[0]].packages
]


@pytest.mark.parametrize(("task", "package"), MISSING)
def test_a_missing_package_is_one_line_that_installs_it(task, package, monkeypatch):
    suite = tasks.SUITES[task.partition("/")[0]]
    imported = [name for name in sys.modules if name.startswith(f"{package}.")]  # by another test
    for name in (package, *imported):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, suite.module, raising=False)
    with pytest.raises(UserError) as error:
        registry.make(task)
    needs = " and ".join(suite.packages)
    assert (
        str(error.value)
        == f'this task needs {needs}: pip install "multi-agent-mamba[{suite.extra}]"'
    )


def test_task_names():
    names = tasks.task_names()
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == set(tasks.SUITES)
    count = {suite: sum(name.startswith(f"{suite}/") for name in names) for suite in tasks.SUITES}
    jumanji = {"lbf": 7, "rware": 15, "connector": 4, "cleaner": 4}
    jaxmarl = {"smax": 11, "mpe": 8, "mabrax": 5, "overcooked": 10, "hanabi": 4}
    assert count == jumanji | jaxmarl | {"camar": 12, "probe": 16}


@pytest.mark.parametrize(
    "name", ["probe/identity", "probe/memory", "lbf/2s-8x8-2p-2f-coop", "rware/tiny-2ag-hard"]
)
def test_make(name):
    env = registry.make(name)
    assert isinstance(env, AgentId)
    assert env.spec.name == name
    assert env.spec.obs_dim == env.env.spec.obs_dim + env.spec.num_agents


def test_an_environment_that_was_only_looked_at_is_closed():
    before = len(host_environments.closed)
    assert registry.is_external("host_environments:Closing")
    assert registry.is_external("host_environments:Closing")
    assert len(host_environments.closed) == before + 1


@pytest.mark.parametrize(
    ("factory", "found"),
    [
        ("alone", "a CartPoleEnv of Gymnasium, which has one agent"),
        ("nothing", "a NoneType"),
        ("a_class", "the class Lives itself"),
    ],
)
@pytest.mark.parametrize("use", [registry.is_external, registry.make, registry.make_plain])
def test_what_is_no_environment_of_ours_is_said_by_name(factory, found, use):
    name = f"host_environments:{factory}"
    with pytest.raises(UserError) as error:
        use(name)
    assert str(error.value) == (
        f"{name} returns {found}: expected a subclass of mam.types.Environment "
        "with spec, reset and step, or a PettingZoo ParallelEnv"
    )


def test_make_batched():
    batch = registry.make_batched("probe/matrix", num_envs=3)
    assert batch == AutoReset(EpisodeStatistics(registry.make("probe/matrix")), 3)
    assert batch.spec.name == "probe/matrix"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lbf/2s-8x8-2p-2f", "unknown task 'lbf/2s-8x8-2p-2f': did you mean lbf/2s-8x8-2p-2f-coop"),
        ("rware/tiny-2agg", "unknown task 'rware/tiny-2agg': did you mean rware/tiny-2ag"),
        ("?", "unknown task '?' (see `mam list`)"),
    ],
)
def test_unknown_names_get_one_line_with_suggestions(name, message):
    with pytest.raises(UserError) as error:
        registry.make(name)
    assert str(error.value).startswith(message)
    assert str(error.value).endswith("(see `mam list`)")
    assert "\n" not in str(error.value)


def test_listing_tasks_is_silent_and_imports_no_suite():
    code = (
        "import sys, mam.envs.registry; assert 'jumanji' not in sys.modules;"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@dataclass(frozen=True)
class Sized(Identity):
    """A task with an option of every type."""

    wide: bool = False
    density: float = 0.5


def make_sized(task: str) -> Sized:
    return make_sized_auto({"small": 2}[task])


def make_sized_auto(agents: int = 3, wide: bool = False, density: float = 0.5) -> Sized:
    return Sized(num_agents=agents, wide=wide, density=density)


def make_plain_auto() -> Sized:
    return Sized(num_agents=4)


@pytest.fixture
def sized(monkeypatch):
    """A suite with one task and custom sizes, and one without options: a module and row each."""
    row = tasks.Suite(
        "of any size",
        __name__,
        ("small",),
        made_to_measure=("auto",),
        extra="x",
        packages=("numpy",),
    )
    monkeypatch.setitem(tasks.SUITES, "sized", row)
    monkeypatch.setitem(
        tasks.SUITES, "plain", replace(row, tasks=(), packages=("no-such-package",))
    )


def test_a_suite_is_a_module_and_a_row(sized, capsys):
    """Names, lists and versions recorded derive from it."""
    assert "sized/small" in tasks.task_names()
    assert cli.main(["list"]) == 0
    listed = (
        "  sized/       of any size (extra x)\n    sized/small\n"
        "    sized/auto:agents=3,wide=false,density=0.5\n"
    )
    assert listed in capsys.readouterr().out
    packages = versions()["packages"]
    assert (packages["numpy"], packages["no-such-package"]) == (np.__version__, None)
    assert {"jumanji", "jaxmarl", "brax"} <= packages.keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sized/small", Sized(num_agents=2)),
        ("sized/auto", Sized()),
        ("sized/auto:", Sized()),
        ("sized/auto:agents=64", Sized(num_agents=64)),
        (
            "sized/auto:wide=true,agents=5,density=0.25",
            Sized(num_agents=5, wide=True, density=0.25),
        ),
        ("sized/auto:wide=false,density=1", Sized(wide=False, density=1.0)),
        ("plain/auto", Sized(num_agents=4)),
    ],
)
def test_options_of_tasks_of_ones_own_making(sized, name, expected):
    env = registry.make(name)
    assert env.env == expected
    assert not registry.is_external(name)
    assert type(env.env.density) is float


def test_options_are_listed_with_their_defaults(sized):
    listed = registry.auto_options()
    assert listed["sized/auto"] == {"agents": 3, "wide": False, "density": 0.5}
    assert listed["plain/auto"] == {}
    assert not any(name.endswith("/auto") for name in tasks.task_names())
    for name, options in listed.items():
        assert {type(value) for value in options.values()} <= {int, float, bool, str}, (
            name
        )  # what can be read


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sized/auto:agent=64", "unknown option 'agent': did you mean agents? (see `mam list`)"),
        ("sized/auto:64", "unknown option '64' (see `mam list`)"),
        (
            "sized/auto:agents=many",
            "sized/auto:agents=many: agents must be a whole number, got 'many'",
        ),
        (
            "sized/auto:agents=2.5",
            "sized/auto:agents=2.5: agents must be a whole number, got '2.5'",
        ),
        ("sized/auto:agents", "sized/auto:agents: agents must be a whole number, got ''"),
        (
            "sized/auto:density=thick",
            "sized/auto:density=thick: density must be a number, got 'thick'",
        ),
        ("sized/auto:wide=yes", "sized/auto:wide=yes: wide must be true or false, got 'yes'"),
        ("plain/auto:agents=3", "plain/auto:agents=3: no options"),
        ("probe/auto", "unknown task 'probe/auto'"),
        ("sized/small:agents=3", "unknown task 'sized/small:agents=3'"),
    ],
)
def test_mistakes_in_options_say_what_would_be_right(sized, name, message):
    with pytest.raises(UserError) as error:
        registry.make(name)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
