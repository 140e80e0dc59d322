"""The checks find every planted bug by its name, and nothing wrong with what is right."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
from planted_bugs import BUGS, GOOD, LIMIT, Bug, Walk

from mam.config import Config, PPOConfig
from mam.envs import jumanji, probes
from mam.envs.check import check, episode_rules, external_play, recording
from mam.envs.check.check import check_environment
from mam.envs.check.report import Finding, Report, collapse
from mam.envs.memory_probes import MemoryProbe
from mam.envs.registry import make
from mam.envs.wrappers import AutoReset
from mam.errors import UserError
from mam.learning.experience import environments
from mam.types import Observation, TimeStep

SECONDS = 30  # what a check may take
# A task of one step, or without anything to see, is not wrong for it; but warnings are in order.
STRANGE = {
    "copy": {"keys_ignored", "constant_view"},
    "matrix": {"keys_ignored", "constant_view"},
}
STRANGE |= {
    name: {"limit_as_termination"}
    for name, make_probe in probes.PROBES.items()
    if isinstance(make_probe(), MemoryProbe)
}


@pytest.fixture(autouse=True, scope="module")
def _share_compiled_programs():
    """Compile the reset that most toys share once, however little time that takes."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0.0)
    yield
    jax.config.update(name, before)


def found(report: Report, bug: Bug) -> list[Finding]:
    def fits(finding: Finding) -> bool:
        named = finding.check == bug.check and bug.field in (None, finding.field)
        return named and bug.agent in (None, finding.agent)

    return [finding for finding in report.findings if fits(finding)]


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_found(name):
    report = check_environment(BUGS[name].make())
    assert found(report, BUGS[name]), "\n".join(report.lines())
    assert report.seconds < SECONDS


def test_corpus_is_large_enough():
    external = [name for name, bug in BUGS.items() if hasattr(bug.make, "num_envs")]
    assert len(external) >= 6
    assert len(BUGS) - len(external) >= 24
    untried = {*check.CHECKS, *check.JAX_CHECKS, *check.EXTERNAL_CHECKS} - {
        bug.check for bug in BUGS.values()
    }
    assert untried == {"no_end"}  # would take long; see below


@pytest.mark.parametrize("name", GOOD)
def test_nothing_is_found_in_a_good_toy(name):
    report = check_environment(GOOD[name]())
    assert not report.findings, "\n".join(report.lines())
    assert report.episodes >= 24
    assert report.steps > report.episodes
    assert not report.notes


def test_nothing_is_found_with_another_seed():
    report = check_environment(Walk(), seed=1)
    assert not report.findings, "\n".join(report.lines())


@pytest.mark.parametrize("name", probes.PROBES)
def test_probes_have_no_errors(name):
    report = check_environment(probes.PROBES[name]())
    assert report.passed, "\n".join(report.lines())
    assert {finding.check for finding in report.warnings} == STRANGE.get(name, set())


@pytest.mark.parametrize(
    "make_env",
    [
        lambda: make("lbf/2s-8x8-2p-2f-coop"),
        lambda: jumanji.make_rware("tiny-2ag"),
    ],
    ids=["lbf", "rware"],
)
def test_nothing_is_found_in_real_tasks(make_env):
    report = check_environment(make_env(), num_episodes=5)
    assert not report.findings, "\n".join(report.lines())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ForgottenFeature", r"agents_view · step 0: expected \[3, 3\], got \[3, 4\]"),
        ("NoPicture", "grid · step 0: expected .* from spec.grid_shape, got None"),
        ("GymStep", r"step: expected \(state, TimeStep\), got a tuple of 5"),
    ],
)
def test_nothing_is_trained_on_arrays_that_the_spec_does_not_say(name, said):
    config = Config(env=f"planted_bugs:{name}", ppo=PPOConfig(num_envs=2))
    with pytest.raises(UserError, match=f"planted_bugs:{name}: error · .*{said}.*check-env"):
        environments(config)


def test_types_are_checked_without_the_import_hook():
    """Users run without it: a wrong type must be found by the check itself."""
    names = ("IntReward", "OneMask", "HostDoubles")
    code = f"""
import planted_bugs
from mam.envs.check.check import check_environment
for name in {names}:
    print(name, {{finding.check for finding \
in check_environment(planted_bugs.BUGS[name].make()).findings}})
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == [f"{name} {{'{BUGS[name].check}'}}" for name in names]


def test_type_checks_are_on_again_afterwards():
    before = jaxtyping.config.jaxtyping_disable
    check_environment(BUGS["OneMask"].make())
    assert jaxtyping.config.jaxtyping_disable == before


def test_time_is_kept():
    report = check_environment(Walk(), time_budget=0.0)
    assert report.passed
    assert report.episodes
    assert any(note.startswith("time was up") for note in report.notes)


def test_a_batch_is_checked_as_its_environment():
    report = check_environment(AutoReset(BUGS["NoTime"].make(), 4))
    assert [finding.field for finding in report.errors] == ["time_limit"]


@pytest.mark.parametrize("env", [None, object()])
def test_what_is_no_environment_is_said_to_be_none(env):
    (finding,) = check_environment(env).findings
    assert (finding.field, finding.severity) == ("spec", "error")


@pytest.mark.usefixtures("_numpy_time_steps")
def test_a_run_for_which_there_was_no_time_shows_nothing():
    """As there is not, of many agents in a slow simulator, for each of them."""
    env = GOOD["HostWalk"]()
    play = recording.Recording(env.spec, True, recording.Influence.none(3))
    player = external_play._Player(env, env.spec, play)
    main, other = (
        player.run(0, 5, deadline, deviates=lambda alive: alive) for deadline in (np.inf, 0.0)
    )
    assert (main.length, other.length) == (5, 0)
    for who in range(4):
        player._measure(main, other, env=0, who=who)
    assert not play.influence.decisions.any()


# Rules on recordings of our own making ------------------------------------------------------------


def make_recording(num_steps, *, terminated=False, time_limit=LIMIT):
    """One episode in which nothing happens."""

    def observation(length):
        view, yes = np.zeros((length, 3, 4), np.float32), np.ones((length, 3), bool)
        return Observation(view, np.ones((length, 3, 3), bool), yes)

    ends, no = np.zeros(num_steps, bool), np.zeros(num_steps, bool)
    ends[-1] = terminated
    reward = np.zeros((num_steps, 3), np.float32)
    seen = observation(num_steps)
    episode = recording.Episode(
        number=0,
        observation=observation(num_steps + 1),
        action=np.zeros((num_steps, 3), int),
        timestep=TimeStep(seen, reward, ends, no, seen, {}),
        first=None,
        clocks=np.zeros((num_steps + 1, 0)),
    )
    spec = replace(Walk.spec, time_limit=time_limit)
    return recording.Recording(spec, False, recording.Influence.none(3), [episode])


@pytest.fixture
def _numpy_time_steps():
    """Recordings hold NumPy arrays where the types of time steps say JAX's."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.usefixtures("_numpy_time_steps")
@pytest.mark.parametrize(("num_steps", "severity"), [(9, []), (recording.STEP_LIMIT, ["error"])])
def test_an_episode_without_limit_must_end_in_the_end(num_steps, severity):
    play = make_recording(num_steps, time_limit=None)
    assert [finding.severity for finding in episode_rules.no_end(play)] == severity
    assert not list(
        episode_rules.no_end(make_recording(num_steps, terminated=True, time_limit=None))
    )


@pytest.mark.usefixtures("_numpy_time_steps")
@pytest.mark.parametrize(
    ("decisions", "team_effects", "severity"),
    [
        (episode_rules.FEW_DECISIONS - 1, 100, []),
        (episode_rules.FEW_DECISIONS, 100, ["warning"]),
        (episode_rules.MANY_DECISIONS, 100, ["error"]),
        (episode_rules.MANY_DECISIONS, 50, ["warning"]),
        (episode_rules.MANY_DECISIONS, 10, []),
    ],
)
def test_an_agent_is_called_ignored_on_evidence_only(decisions, team_effects, severity):
    play = make_recording(5)
    play.influence.decisions[:] = [decisions, 0, 100, 100]
    play.influence.effects[:] = [0, 0, 1, team_effects]
    assert [finding.severity for finding in episode_rules.actions_ignored(play)] == severity


# Reports ------------------------------------------------------------------------------------------


def test_a_finding_is_one_line():
    finding = Finding(
        "action_mask", "error", "action_mask", "at least one legal action", "none", agent=2, step=17
    )
    assert (
        str(finding)
        == "error · action_mask · agent 2, step 17: expected at least one legal action, got none"
    )
    finding = Finding(
        "time_limit", "error", "truncated", "an end", "none", episode=3, step=9, count=1200
    )
    assert (
        str(finding) == "error · time_limit · truncated · episode 3, step 9: "
        "expected an end, got none (1,200 times)"
    )


def test_places_of_one_mistake_are_one_finding():
    place = Finding(
        "finite", "error", "reward", "finite numbers", "nan", agent=1, step=4, episode=0, count=2
    )
    agent = Finding("constant_view", "warning", "agents_view", "a change", "none", agent=0)
    merged = collapse(
        [agent, place, replace(place, agent=0, step=1, episode=1), replace(agent, agent=1)]
    )
    assert merged == (replace(place, count=4), agent, replace(agent, agent=1))


def test_a_report_ends_with_what_was_looked_at():
    finding = Finding("spec", "error", "num_agents", "a whole number, at least 1", "0")
    report = Report(
        "toy", (finding,), ("spec",) * 12, episodes=3, steps=1234, seconds=1.26, notes=("a note",)
    )
    assert not report.passed
    assert report.lines() == [
        "error · spec · num_agents: expected a whole number, at least 1, got 0",
        "note · a note",
        "toy: 1 error · 12 checks of 3 episodes, 1,234 steps in 1.3 s",
    ]
    assert (
        replace(report, findings=()).lines()[-1]
        == "toy: nothing found · 12 checks of 3 episodes, 1,234 steps in 1.3 s"
    )
