"""Tasks that follow one another: trained as alone, with the weights carried on, and resumed."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import mam
from mam.cli import main as cli
from mam.envs.probes import Identity
from mam.errors import UserError
from mam.learning.train import make_train
from mam.runs.folder import RunFolder
from small_run import CONFIG


def identity(agents: int = 3, actions: int = 4) -> Identity:
    """A task with two options, of which one changes the sizes of weights."""
    return replace(Identity(), num_agents=agents, num_actions=actions)


TASK = f"{__name__}:identity"
# Two updates with two agents, two with five, and two with the three that evaluations play.
RUN = replace(
    CONFIG,
    env=TASK,
    policy="rec_ippo",
    agent_id="none",
    curriculum=("agents=2@32", "agents=5@17"),
)


def rows(folder):
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "elapsed"} for row in read]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return mam.train(RUN, out=tmp_path_factory.mktemp("whole") / "run").folder


def test_the_first_stage_is_a_run_on_its_task(whole):
    alone = make_train(replace(RUN, env=f"{TASK}:agents=2", curriculum=()))
    state = alone.init(np.arange(2))
    trained = [row for row in rows(whole) if row["kind"] == "train"]
    for row in trained[:2]:
        state, values = alone.train_step(state)
        for name in ("policy_loss", "value_loss", "entropy"):
            np.testing.assert_allclose(row[name], values[name], rtol=1e-5, atol=1e-7)


def test_every_evaluation_plays_the_task_itself(whole):
    assert mam.load(whole, trust=True).spec.num_agents == 3
    assert [row["update"] for row in rows(whole) if row["kind"] == "evaluation"] == [0, 2, 4, 6]


def test_the_last_stage_may_be_all_that_is_trained_on(tmp_path):
    run = replace(RUN, curriculum=("agents=2@32", "agents=5"))
    assert run.stages == ((0, "agents=2"), (2, "agents=5"))
    folder = mam.train(run, out=tmp_path / "run").folder
    assert [row["update"] for row in rows(folder) if row["kind"] == "evaluation"] == [0, 2, 4, 6]
    assert mam.load(folder, trust=True).spec.num_agents == 3


@pytest.mark.parametrize("stop_after", [2, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(stop_after, whole, tmp_path, capsys):
    class StopAfter(mam.Callback):
        def on_update(self, event):
            return event.update == stop_after

    stopped = mam.train(RUN, out=tmp_path / "run", callbacks=[StopAfter()])
    assert (stopped.outcome, rows(tmp_path / "run")[-1]["update"]) == ("stopped", stop_after)
    mam.train(resume=tmp_path / "run", trust=True)
    assert rows(tmp_path / "run") == rows(whole)
    states = [RunFolder(x).load_state(RUN, make_train(RUN)) for x in (tmp_path / "run", whole)]
    assert all(map(np.array_equal, *(jax.tree.leaves(state.policy) for state in states)))
    assert "32 steps: going on with agents=5" in capsys.readouterr().out


def test_a_callback_that_fails_at_the_end_of_a_stage_leaves_a_run_that_goes_on(whole, tmp_path):
    class Fails(mam.Callback):
        def on_update(self, event):
            if event.update == 2:
                raise OSError("the callback's own")

    with pytest.raises(OSError, match="the callback's own"):
        mam.train(RUN, out=tmp_path / "run", callbacks=[Fails()])
    mam.train(resume=tmp_path / "run", trust=True)
    assert rows(tmp_path / "run") == rows(whole)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"curriculum": ("agents=2", "agents=5@17")}, "the last with or without its steps, got"),
        ({"curriculum": ("agents=2@0",)}, "written options@steps"),
        ({"curriculum": ("agents=2@50", "agents=5@50")}, "takes 8 of the 6 updates: nothing is"),
        ({"curriculum": ("agents=2@96", "agents=5")}, "is left for agents=5; raise"),
        ({"curriculum": ("agents=2@32", "actions=5@16")}, "num_actions is 5 instead of 4"),
        ({"curriculum": ("actions=5",)}, "num_actions is 4 instead of 5"),
        ({"agent_id": "one_hot"}, "trained with --agent-id sinusoid, ids have one size for any"),
        ({"curriculum": ("size=2@32",)}, "size"),
    ],
)
def test_what_cannot_be_carried_on_is_refused_before_it_begins(changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        mam.train(replace(RUN, **changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_line_gives_stages():
    options = cli.read_options(
        "train", ["--env", "lbf/auto:agents=9", "--curriculum", "agents=2@9000", "agents=4@9000"]
    )
    assert options.config.stages == ((0, "agents=2"), (5, "agents=4"), (10, ""))
    assert options.config.algorithm == "mam-clock-curriculum"
