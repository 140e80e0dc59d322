"""Searching for settings: what is searched, what trials do, and what an interruption leaves."""

import errno
import importlib.util
import json
import os
import signal
import sys
from dataclasses import replace

import pytest
from test_experiment import FakePool, row

from mam.cli import main as cli
from mam.config import Config, from_json, to_json
from mam.errors import RunError, UserError
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
        ("rec_mam", {"num_heads", "retention_decay"}),
        ("rec_mam2", {"num_heads", "retention_decay", "dt_rank"}),
        ("rec_mat", {"retention_decay", "d_state", "dt_rank"}),
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

    def __init__(self, *, interrupt_after=None, killed=(), lacking=None):
        super().__init__({})
        self.lacking = lacking  # the trial for which there is no space
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
            elif job.name == self.lacking:
                job.log.write_text(f"mam: cannot write it: {os.strerror(errno.ENOSPC)}\n")
                ends.append(End(job, 1))
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
def test_combinations_that_no_run_could_have_fail_and_the_sweep_goes_on(sweep, capsys):
    """Each value is one that its setting can have."""
    config = replace(CONFIG, policy="mat", network=replace(CONFIG.network, d_model=6))
    search = ("network.d_model=4,6", "network.num_heads=1,3")
    _, trials = sweep(TrialPool(), config=config, search=search, trials=4)
    states = {tuple(trial.params.values()): trial.state.name for trial in trials.values()}
    assert states.pop((4, 3)) == "FAIL"
    assert set(states.values()) <= {"COMPLETE", "PRUNED"}
    assert len(states) == 3
    assert "failed, network.num_heads must divide network.d_model = 4" in capsys.readouterr().out


class Slow(TrialPool):
    """A trial that is stopped takes some looks to save itself."""

    def stop(self, job):
        self.saving = {**getattr(self, "saving", {}), job: 3}

    def ended(self):
        saving = getattr(self, "saving", {})
        self.saving = {job: left - 1 for job, left in saving.items() if left}
        self.told += [job for job, left in saving.items() if not left]
        held = [job for job in self.running if job in self.saving]
        self.running = [job for job in self.running if job not in held]
        ends = super().ended()
        self.running += held
        return ends


@needs_optuna
def test_a_pruned_trial_is_waited_for_until_it_has_saved_itself(sweep):
    pool = Slow()
    _, trials = sweep(pool)
    assert not pool.running
    assert all(trial.state.is_finished() for trial in trials.values())
    assert any(trial.state.name == "PRUNED" for trial in trials.values())


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
    said = capsys.readouterr().out
    assert said.startswith("searching settings of mam on probe/matrix: 12 trials of 2 × 96 steps")
    assert "at most, 0 begun before" in said
    assert f"    ppo.lr: {' '.join(map(str, RANGES['ppo.lr']))}\n" in said
    again = TrialPool()
    _, after = sweep(again)
    assert len(after) == 12
    assert all(t.state.is_finished() for t in after.values())
    resumed = [name for name, command in again.commands if command[1] == "--resume"]
    assert resumed == [f"trial_{t.number:04d}" for t in under_way]
    assert all(after[t.number].params == t.params for t in under_way)
    assert f"at most, {len(trials)} begun before" in capsys.readouterr().out

    nothing = TrialPool()
    sweep(nothing)
    assert nothing.commands == []
    with pytest.raises(UserError, match=r"holds a sweep of something else: .* was .*, is "):
        sweep(nothing, config=replace(CONFIG, policy="mat"))


@needs_optuna
def test_a_sweep_that_lacks_space_ends_and_goes_on(sweep):
    with pytest.raises(RunError, match=r"trial_0002: cannot write it: No space .* goes on"):
        sweep(TrialPool(lacking="trial_0002"))
    again = TrialPool()
    _, after = sweep(again)
    assert len(after) == 12
    assert all(t.state.is_finished() for t in after.values())
    assert ["train", "--resume"] in [c[:2] for name, c in again.commands if name == "trial_0002"]


@needs_optuna
@pytest.mark.parametrize("left", [0, 1, 40])
def test_what_a_killed_sweep_wrote_last_may_be_torn(sweep, tmp_path, monkeypatch, left):
    """It may have died at any byte, with Optuna's own lock, named by a relative path."""
    sweep(TrialPool(), trials=3)
    journal = tmp_path / "study.log"
    whole = journal.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    journal.write_bytes(whole[: last + left])
    (tmp_path / "study.log.lock").symlink_to("sweeps/study.log")
    _, after = sweep(TrialPool(), trials=6)
    assert len(after) == 6
    assert all(t.state.is_finished() for t in after.values())
    assert len({tuple(t.params.items()) for t in after.values()}) == 6
    assert all(json.loads(line) for line in journal.read_text().splitlines())


@needs_optuna
def test_a_damaged_journal_is_one_line(sweep, tmp_path):
    sweep(TrialPool(), trials=2)
    journal = tmp_path / "study.log"
    journal.write_bytes(journal.read_bytes().replace(b"}\n", b"\n", 1))
    with pytest.raises(UserError, match=r"study\.log is damaged: .*; choose another --out"):
        sweep(TrialPool())


@needs_optuna
@pytest.mark.parametrize("writes", [0, 1, 2, 4, 7])
def test_the_disk_may_be_full_at_any_write_of_the_journal(
    sweep, writes, tmp_path, monkeypatch, capsys
):
    """Half of what is written then fits. One line, exit code 1, and with space it goes on."""
    from optuna.storages.journal import JournalFileBackend

    from mam.study.experiment import pools

    left = [writes]

    def append(self, logs):
        left[0] -= 1
        data = "".join(f"{json.dumps(log)}\n" for log in logs).encode()
        with open(self._file_path, "ab") as file:
            file.write(data if left[0] >= 0 else data[: len(data) // 2])
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out, start = tmp_path / "sweep", tmp_path / "config.json"
    start.write_text(json.dumps(to_json(CONFIG)))
    searched = ["--search", "ppo.lr=0.001,0.002", "network.d_model=8,16", "--trials", "3"]
    command = ["sweep", "--config", str(start), "--out", str(out), *searched]
    monkeypatch.setattr(pools, "LocalPool", lambda jobs: TrialPool())
    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", append)
        assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert said == f"mam: cannot write {out}: {os.strerror(errno.ENOSPC)}\n"
    assert cli.main(command) == 0
    assert "trials: 3 complete" in capsys.readouterr().out


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
