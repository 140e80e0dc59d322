"""Names to environments, and what a misspelt name says."""

import subprocess
import sys

import pytest

from mam.envs import registry
from mam.envs.wrappers import AgentId, AutoReset, EpisodeStatistics
from mam.errors import UserError


def test_task_names():
    names = registry.task_names()
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == set(registry.suites())
    count = {suite: sum(name.startswith(f"{suite}/") for name in names) for suite in registry.suites()}
    jumanji = {"lbf": 7, "rware": 15, "connector": 4, "cleaner": 4}
    jaxmarl = {"smax": 11, "mpe": 8, "mabrax": 5, "overcooked": 10, "hanabi": 4}
    assert count == jumanji | jaxmarl | {"probe": 5}


@pytest.mark.parametrize("name", ["probe/identity", "probe/memory", "lbf/2s-8x8-2p-2f-coop", "rware/tiny-2ag-hard"])
def test_make(name):
    env = registry.make(name)
    assert isinstance(env, AgentId)
    assert env.spec.name == name
    assert env.spec.obs_dim == env.env.spec.obs_dim + env.spec.num_agents


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
        "import sys, mam.envs.registry as registry; registry.task_names(); assert 'jumanji' not in sys.modules;"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
