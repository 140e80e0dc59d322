"""What is noted of PettingZoo environments while they are played, and what it comes to."""

import numpy as np
import pytest
from host_environments import Lives
from planted_parallel_bugs import BUGS, Carriers, FarAway, NoRoad, Walkers, far_away

from mam.envs.check.parallel import check_parallel, limit_of_one, read_findings
from mam.envs.external.audit import Audited
from mam.envs.external.pettingzoo import PettingZooEnv
from mam.errors import UserError


def findings(make, folder, num_episodes=12):
    """What is found while episodes of random actions are played, in this process."""
    env = PettingZooEnv(Audited("test", lambda index: make(), str(folder))(0), "test")
    random = np.random.default_rng(0)
    for episode in range(num_episodes):
        try:
            env.reset(episode)
        except UserError:  # what no policy can be shown is noted all the same
            break
        over = False
        while not over:
            try:
                outcome = env.step(
                    random.integers(0, env.layout.action_components or 3, env.layout.action[0])
                )
            except KeyError:
                break
            over = outcome.terminated or outcome.truncated
    return read_findings(str(folder))


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_noted(name, tmp_path):
    bug = BUGS[name]
    found = findings(bug.make, tmp_path)
    fits = [
        f
        for f in found
        if (f.check, f.field, f.agent) == (bug.check, bug.field, bug.agent) and bug.got in f.got
    ]
    assert fits, found
    assert {finding.check for finding in found} == {bug.check}


@pytest.mark.parametrize("make", [Walkers, Carriers])
def test_nothing_is_noted_of_good_ones(make, tmp_path):
    assert findings(make, tmp_path) == []


def test_each_place_is_noted_once(tmp_path):
    assert len(findings(FarAway, tmp_path)) == 1


@pytest.mark.parametrize(
    ("at_limit", "elsewhere", "found"),
    [(1, 0, False), (12, 0, True), (6, 0, True), (6, 90, False)],
)
def test_an_end_at_the_limit_may_be_a_coincidence(at_limit, elsewhere, found):
    ends = (
        [(10, [0], [1], True)] * at_limit
        + [(10, [], [0, 1], True)] * 4
        + [(3, [0], [], False)] * elsewhere
    )
    assert bool(list(limit_of_one(ends))) is found


@pytest.mark.parametrize("make", [Lives, far_away, Carriers])
def test_check_in_workers(make):
    report = check_parallel("test", make, num_episodes=4, time_budget=4.0)
    assert {finding.check for finding in report.errors} == (
        {"space"} if make is far_away else set()
    )
    padded = "agents observe 2 to 4 numbers: the shorter observations are padded with zeros"
    assert (padded in report.notes) == (make is Lives)
    assert report.episodes >= 4


def test_user_line_is_cited_once():
    report = check_parallel("test", NoRoad, num_episodes=4, time_budget=4.0)
    (error,) = report.errors
    assert error.got.startswith("KeyError: 'road_17' (planted_parallel_bugs.py, line ")
    assert error.got.endswith(': raise KeyError("road_17"))')
