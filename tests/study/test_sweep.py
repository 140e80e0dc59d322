"""Searching for settings: what is searched, what trials do, and what an interruption leaves."""

import importlib.util
import json
import signal
import sys
from dataclasses import replace

import pytest
from test_experiment import FakePool, row

from mam.cli import main as cli
from mam.config import Config, from_json
from mam.errors import UserError
from mam.networks.mixers.registry import MIXERS
from mam.study.experiment.pools import End
from mam.study.experiment.screen import Screen
from mam.study.sweep.command import Sweep
from mam.study.sweep.space import RANGES, space_of
from small_run import CONFIG

needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None,
    reason="needs optuna: pip install 'multi-agent-mamba[sweep]'",
)
SEARCH = ("ppo.lr", "network.d_model")


@pytest.mark.parametrize(
    ("policy", "absent"),
    [
        ("mam", {"num_heads", "retention_decay"}),
        ("mam2", {"num_heads", "retention_decay", "dt_rank"}),
        ("mat", {"retention_decay", "d_state", "dt_rank"}),
        ("ff_sable", {"retention_decay", "d_state", "dt_rank"}),
        ("sable", {"d_state", "dt_rank"}),
        ("ippo", {"num_heads", "retention_decay", "d_state", "dt_rank"}),
    ],
)
def test_only_what_the_policy_reads_is_searched(policy, absent):
    options = {
        name for family in MIXERS.values() for name, values in family.options.items() if values
    }
    assert options == {"num_heads", "retention_decay", "d_state", "dt_rank"}
    read = {f"network.{name}" for name in options - absent}
    assert space_of(replace(CONFIG, policy=policy)).keys() == RANGES.keys() | read


def test_a_layout_decides_what_is_read():
    network = replace(CONFIG.network, encoder=replace(CONFIG.network.encoder, layout="A"))
    found = space_of(replace(CONFIG, network=network))
    assert {"network.num_heads", "network.d_state"} <= found.keys()
    assert "network.num_blocks" not in found


def test_settings_without_a_range_are_refused():
    with pytest.raises(UserError, match=r"unknown setting of mat to search 'network.d_stat'"):
        space_of(replace(CONFIG, policy="mat"), ["network.d_stat"])
    assert list(space_of(CONFIG, SEARCH)) == list(SEARCH)


def test_every_value_of_the_ranges_is_valid_on_its_own():
    from mam.study.experiment.grid import changed

    for policy in ("mam", "mam2", "mat"):
        for name, values in space_of(Config(policy=policy)).items():
            for value in values:
                assert changed(Config(policy=policy), {name: value})


def test_values_of_ones_own():
    found = space_of(
        CONFIG, ["ppo.lr", "ppo.gamma=0.9,0.99,0.9", "network.head_dim=None,4", "policy=mam,mat"]
    )
    own = {"ppo.gamma": (0.9, 0.99), "network.head_dim": (None, 4), "policy": ("mam", "mat")}
    assert found == {"ppo.lr": RANGES["ppo.lr"]} | own


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("ppo.gamma=2", r"ppo.gamma must lie in \[0, 1\]"),
        ("ppo.lr=", "ppo.lr must be float"),
        ("ppo.gama=0.9", "unknown key 'ppo.gama'.*ppo.gamma"),
        ("network.d_model=many", "network.d_model must be int"),
    ],
)
def test_values_that_a_setting_cannot_have_are_refused(asked, words):
    with pytest.raises(UserError, match=words):
        space_of(CONFIG, [asked])


class TrialPool(FakePool):
    """Trials whose return is their learning rate, reported per evaluation; two at a time."""

    def __init__(self, *, interrupt_after=None, killed=()):
        super().__init__({})
        self.interrupt_after, self.killed, self.told = interrupt_after, set(killed), []

    def start(self, job, command):
        super().start(job, command)
        with (job.path / "metrics.jsonl").open("a") as file:
            file.write("")
        if len(self.commands) == self.interrupt_after:
            signal.raise_signal(signal.SIGINT)

    def ended(self):
        ends = []
        for job in list(self.running):
            metrics = job.path / "metrics.jsonl"
            done = len(metrics.read_text().splitlines())
            if job in self.told:
                ends.append(End(job, 0))
            elif job.name in self.killed:
                self.killed.remove(job.name)
                ends.append(End(job, -9))
            elif job.config.ppo.lr == 2.5e-4:
                ends.append(End(job, 1))
            else:
                kind = "evaluation" if done < 3 else "absolute"
                value = 1000 * job.config.ppo.lr
                line = json.loads(row(kind, 2 * min(done + 1, 3), value))
                line["episode_return"] = [[value], [value]]
                metrics.write_text(metrics.read_text() + json.dumps(line) + "\n")
                if kind == "absolute":
                    ends.append(End(job, 0))
        self.running = [job for job in self.running if job not in [end.job for end in ends]]
        return ends

    def stop(self, job):
        self.told.append(job)


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    from mam.study.sweep import search

    monkeypatch.setattr(search, "POLL_SECONDS", 0.0)

    def run(pool, **options):
        found = search.Search(
            Sweep(
                **(
                    {"config": CONFIG, "search": SEARCH, "trials": 12, "startup_trials": 4}
                    | options
                )
            ),
            tmp_path,
            pool,
            Screen(),
        )
        found.run()
        return found.conclude(), {t.number: t for t in found._study.trials}

    return run


@needs_optuna
def test_the_best_trial_is_found_and_left_as_a_configuration(sweep, tmp_path, capsys):
    pool = TrialPool(killed=["trial_0000"])
    code, trials = sweep(pool)
    out = capsys.readouterr().out
    assert code == 0
    states = {
        name: [t for t in trials.values() if t.state.name == name]
        for name in ("COMPLETE", "PRUNED", "FAIL")
    }
    assert sum(map(len, states.values())) == len(trials) == 12
    assert all(t.params["ppo.lr"] == 2.5e-4 for t in states["FAIL"])
    assert states["PRUNED"]
    assert all(t.value == pytest.approx(1000 * t.params["ppo.lr"]) for t in states["COMPLETE"])
    best = from_json(Config, json.loads((tmp_path / "best.json").read_text()))
    assert best.ppo.lr == 1e-3
    assert best == replace(CONFIG, ppo=replace(CONFIG.ppo, lr=1e-3), network=best.network)
    assert "best: trial_" in out
    assert (
        "mam train --env probe/matrix --num-seeds 2 --total-timesteps 96 "
        f"--network.d-model {best.network.d_model}" in out
    )
    assert [c[:2] for name, c in pool.commands if name == "trial_0000"] == [
        ["train", "--env"],
        ["train", "--resume"],
    ]
    assert "failed, mam: the reason · ppo.lr=0.00025" in out


@needs_optuna
def test_no_combination_is_tried_twice_and_then_the_sweep_is_over(sweep, capsys):
    _, trials = sweep(TrialPool(), trials=50)
    combinations = {tuple(trial.params.values()) for trial in trials.values()}
    assert len(trials) == len(combinations) == 12
    assert "each of the 12 combinations once" in capsys.readouterr().out


@needs_optuna
def test_an_interrupted_sweep_goes_on_with_its_trials(sweep, capsys):
    pool = TrialPool(interrupt_after=3)
    _, trials = sweep(pool)
    under_way = [t for t in trials.values() if t.state.name == "RUNNING"]
    assert under_way
    again = TrialPool()
    _, after = sweep(again)
    assert len(after) == 12
    assert all(t.state.is_finished() for t in after.values())
    resumed = [name for name, command in again.commands if command[1] == "--resume"]
    assert resumed == [f"trial_{t.number:04d}" for t in under_way]
    assert all(after[t.number].params == t.params for t in under_way)

    nothing = TrialPool()
    sweep(nothing)
    assert nothing.commands == []
    with pytest.raises(UserError, match="holds a sweep of something else"):
        sweep(nothing, config=replace(CONFIG, policy="mat"))


@needs_optuna
def test_a_real_sweep_of_one_trial(tmp_path, capfd):
    """A process that trains."""
    small = (
        "--ppo.num-envs",
        "4",
        "--ppo.rollout-length",
        "4",
        "--ppo.num-epochs",
        "1",
        "--network.d-state",
        "2",
    )
    counts = (
        "--total-timesteps",
        "96",
        "--eval.num-evaluations",
        "2",
        "--eval.num-absolute-episodes",
        "5",
    )
    command = [
        "sweep",
        "--env",
        "probe/matrix",
        "--policy",
        "ippo",
        *small,
        *counts,
        "--out",
        str(tmp_path),
    ]
    assert cli.main([*command, "--trials", "1", "--search", "ppo.lr"]) == 0
    out = capfd.readouterr().out
    assert "trials: 1 complete" in out
    best, trial = (
        from_json(Config, json.loads((tmp_path / file).read_text()))
        for file in ("best.json", "trial_0000/config.json")
    )
    assert best == trial


def test_without_optuna_there_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert cli.main(["sweep", "--env", "probe/matrix", "--out", str(tmp_path / "out")]) == 2
    assert 'pip install "multi-agent-mamba[sweep]"' in capsys.readouterr().err
    assert cli.main(["sweep", "--trials", "0"]) == 2
    assert "--trials must be positive" in capsys.readouterr().err
