"""A matrix of runs: what it is, how it is run to its end, and what is left of it."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from mam.cli import main as cli
from mam.cli.arguments import parse
from mam.config import to_json
from mam.errors import RunError, UserError
from mam.presets import preset, preset_for
from mam.runs.zoo import PREFIX, zoo_names
from mam.study.experiment.follow import Follower
from mam.study.experiment.grid import changed, flags, grid
from mam.study.experiment.jobs import Job, jobs_of, load_runs
from mam.study.experiment.matrix import Row, run_matrix
from mam.study.experiment.pools import UNKNOWN, Elsewhere, End, LocalPool, launch
from mam.study.experiment.screen import Screen
from small_run import CONFIG


def test_a_grid_has_every_combination_with_a_stable_name():
    runs = grid(
        CONFIG,
        env=["probe/copy", "probe/matrix"],
        policy=["mam", "mat"],
        num_seeds=3,
        **{"ppo.lr": [1e-4]},
    )
    assert [name for name, _ in runs] == [
        f"probe/{task}/{policy},ppo.lr=0.0001"
        for task in ("copy", "matrix")
        for policy in ("mam", "mat")
    ]
    expected = replace(
        CONFIG, env="probe/matrix", policy="mat", num_seeds=3, ppo=replace(CONFIG.ppo, lr=1e-4)
    )
    assert runs[-1][1] == expected


def test_without_a_base_every_task_has_its_preset():
    runs = dict(grid(env=["lbf/8x8-2p-2f-coop", "rware/tiny-2ag"], policy="mat"))
    assert runs["rware/tiny-2ag/mat"] == replace(preset("rware/tiny-2ag"), policy="mat")
    assert runs["lbf/8x8-2p-2f-coop/mat"].ppo == preset("lbf").ppo


@pytest.mark.parametrize(
    ("printed", "free", "words"),
    [
        ("", 1, "it printed nothing"),
        ("", 0, "it printed nothing (the disk is full)"),
        ("a\nb\n", 0, "b (the disk is full)"),
        ("a\nb\n", 1, "b"),
    ],
)
def test_last_words_may_be_lost_on_a_full_disk(tmp_path, monkeypatch, printed, free, words):
    job = Job("a", CONFIG, tmp_path)
    assert job.last_words() == "it printed nothing"
    job.log.write_text(printed)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert job.last_words() == words


@pytest.mark.parametrize("key", ["polcy", "ppo.lrr", "pp.lr", "ppo.lr.x"])
def test_a_grid_refuses_settings_that_do_not_exist(key):
    with pytest.raises(UserError, match=r"unknown key|must be"):
        grid(CONFIG, **{key: [1, 2]})


def test_settings_are_checked_together():
    config = changed(
        CONFIG, {"ppo.num_envs": 7, "ppo.rollout_length": 3, "ppo.num_minibatches": 21}
    )
    assert config.steps_per_update == 21
    with pytest.raises(UserError, match="must divide"):
        changed(CONFIG, {"ppo.num_minibatches": 7})


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(
            CONFIG,
            network=replace(CONFIG.network, dt_rank=3, remat=True, dtype="bfloat16"),
            log=("jsonl", "a b"),
        ),
        replace(
            preset("rware/tiny-4ag"), ppo=replace(CONFIG.ppo, lr=1e-7, recompute_log_prob=True)
        ),
    ],
)
def test_a_command_line_says_all_of_a_configuration(config):
    base, _ = preset_for(config.env)
    args = ["--env", config.env, *flags(config, base)]
    assert parse("train", cli.Train, args, cli.Train(config=base)).config == config
    assert flags(config, config) == []


def test_jobs_have_names_of_their_own_and_safe_folders(tmp_path):
    other = replace(CONFIG, env="my.module:make/../x")
    jobs = jobs_of([CONFIG, ("a/b c:d", CONFIG), other], tmp_path)
    folders = [str(job.path.relative_to(tmp_path)) for job in jobs]
    assert folders == ["probe/matrix/mam", "a/b_c_d", "my.module_make/x/mam"]
    with pytest.raises(UserError, match="two runs are called probe/matrix/mam"):
        jobs_of([CONFIG, replace(CONFIG, seed=5)], tmp_path)
    with pytest.raises(UserError, match="the run a/b would lie in the folder of a: call one"):
        jobs_of([("a/b", CONFIG), ("a", CONFIG)], tmp_path)
    with pytest.raises(UserError, match="must be Config"):
        jobs_of([3], tmp_path)
    for name in ("", "/", "..", "./."):
        with pytest.raises(UserError, match="needs a name with letters or digits"):
            jobs_of([(name, CONFIG)], tmp_path)


def test_long_names_made_of_settings_stay_apart_and_short(tmp_path):
    names = [
        ",".join(f"network.some_setting_{i}=ü[{i * last}]" for i in range(30)) for last in (1, 2)
    ]
    folders = [job.path for job in jobs_of([(f"task/{name}", CONFIG) for name in names], tmp_path)]
    assert len(set(folders)) == 2
    for folder in folders:
        assert len(folder.name.encode()) <= 200
        folder.mkdir(parents=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("runs = []", "defines no `runs`"),
        ("x = 1 / 0", "division by zero"),
        ("from mam import grid\nruns = grid(polcy='mam')", "unknown key 'polcy'"),
    ],
)
def test_a_file_that_is_none_is_said(text, words, tmp_path, capsys):
    (tmp_path / "file.py").write_text(text)
    assert cli.main(["experiment", str(tmp_path / "file.py")]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "count"),
    {
        "smoke": 6,
        "lbf": 18,
        "imitate": 6,
        "finetune": 7,
        "distill": 26,
        "memory": 4,
        "rware": 5,
        "many_agents": 18,
        "orders": 5,
        "contention": 10,
        "paper": 4 * 33,
        "scaling": 44,
        "images": 4,
        "camar": 5,
    }.items(),
)
def test_the_experiments_that_come_along_are_valid(name, count, monkeypatch):
    from mam.envs.tasks import check_task

    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(root))
    jobs = jobs_of(load_runs(root / "experiments" / f"{name}.py"), Path("runs") / name)
    zoo = {PREFIX + policy for policy in zoo_names()}
    for index, job in enumerate(jobs):
        earlier = {str(one.path) for one in jobs[:index]}
        assert {job.config.init, job.config.teacher} <= {None, *earlier, *zoo}
        check_task(job.config.env)
    assert len(jobs) == count


def row(kind, update, value=0.5, **more):
    returns = value if kind == "train" else [[value, value + 1], [value + 2, None]]
    head = {"kind": kind, "update": update, "step_count": 16 * update, "elapsed": 2.0 * update}
    return json.dumps(head | ({} if kind == "train" else {"episode_return": returns}) | more) + "\n"


def test_metrics_are_followed_while_they_are_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.poll() == []
    path.write_text(row("train", 1) + row("train", 2) + row("evaluation", 2)[:10])
    assert [r["update"] for r in follower.poll()] == [1, 2]
    assert (follower.step_count, follower.speed) == (32, 8.0)
    path.write_text(row("train", 1) + row("train", 2) + row("evaluation", 2))
    assert [r["kind"] for r in follower.poll()] == ["evaluation"]
    assert follower.returns[0] == 1.0
    assert follower.returns[1] != follower.returns[1]
    path.write_text(row("train", 1))  # a resume from an earlier checkpoint
    follower.poll()
    assert follower.step_count == 16
    path.write_text(row("train", 1) + row("train", 2) + row("absolute", 2))
    follower.poll()
    assert follower.finished(32)
    assert not follower.finished(33)
    # Cut by a resume and written on past the old end, between two looks.
    path.write_text(row("train", 1, more="longer") + row("train", 2) + row("train", 3))
    assert [r["update"] for r in follower.poll()] == [1, 2, 3]
    path.write_text(path.read_text() + "damaged\n[1]\n" + row("train", 4))
    assert [r["update"] for r in follower.poll()] == [4]
    assert follower.step_count == 64


def test_a_log_file_shows_every_tenth_of_a_run(tmp_path, capsys):
    shown = Screen()
    one = Row(Job("a run", CONFIG, tmp_path), status="running")
    for steps in (0, 4, 10, 11, 20, 96):
        one.progress.step_count = steps
        shown.show([one])
    assert capsys.readouterr().out.splitlines() == [
        f"a run: {done} %, return –" for done in (10, 20, 100)
    ]


def test_names_made_of_settings_are_shown_as_they_are(tmp_path, capsys):
    name = "lr=[0.1],env=my:two:"
    Screen().conclude([Row(Job(name, CONFIG, tmp_path), status="finished")])
    assert name in capsys.readouterr().out


class FakePool:
    """Does to a run what a script says, attempt by attempt."""

    def __init__(self, script):
        self.script, self.running, self.commands, self.stopped = script, [], [], False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def has_capacity(self):
        return len(self.running) < 2

    def start(self, job, command):
        self.commands.append((job.name, command))
        job.path.mkdir(parents=True, exist_ok=True)
        (job.path / "config.json").write_text(json.dumps(to_json(job.config)))
        job.log.write_text("a line\nmam: the reason\n")
        self.running.append(job)

    def ended(self):
        ends = []
        for job in self.running:
            code = 0 if self.stopped else self.script[job.name].pop(0)
            if code == "finish":
                (job.path / "metrics.jsonl").write_text(row("absolute", job.config.num_updates))
            if code != "run":
                ends.append(End(job, 0 if code == "finish" else code))
        self.running = [job for job in self.running if job not in [end.job for end in ends]]
        return ends

    def stop(self, job):
        self.stopped = True


def matrix_of(tmp_path, script, **options):
    jobs = [Job(name, CONFIG, tmp_path / name) for name in script]
    pool = FakePool({name: list(codes) for name, codes in script.items()})
    return run_matrix(jobs, pool, Screen(), **({"retries": 1} | options)), pool


@pytest.fixture
def _fast(monkeypatch):
    from mam.study.experiment import matrix

    monkeypatch.setattr(matrix, "POLL_SECONDS", 0.0)


@pytest.mark.usefixtures("_fast")
def test_failures_do_not_stop_the_others_and_the_killed_are_resumed(tmp_path, capsys):
    elsewhere = [UNKNOWN, UNKNOWN, UNKNOWN, "finish"]
    script = {
        "good": ["run", "finish"],
        "elsewhere": elsewhere,
        "bad": [1],
        "killed": [-9, "finish"],
        "doomed": [-9, 75],
        "quit": [0],
    }
    code, pool = matrix_of(tmp_path, script)
    out = capsys.readouterr().out
    assert code == 1
    assert "good: finished, return" in out
    assert "failed: bad: mam: the reason (see" in out
    assert "killed: killed by SIGKILL: resuming it" in out
    assert "failed: doomed: preempted before its end" in out
    assert "failed: quit: stopped before its end" in out
    assert "6 runs: 3 failed, 3 finished" in out
    again = [command for name, command in pool.commands if name == "killed"]
    assert [command[:2] for command in again] == [["train", "--env"], ["train", "--resume"]]

    code, pool = matrix_of(tmp_path, {"good": [], "bad": ["finish"], "killed": []})
    assert code == 0
    assert [name for name, _ in pool.commands] == ["bad"]


@pytest.mark.usefixtures("_fast")
def test_a_signal_stops_all_runs_and_starts_none(tmp_path, capsys):
    class Interrupting(FakePool):
        def start(self, job, command):
            super().start(job, command)
            signal.raise_signal(signal.SIGINT)

        def has_capacity(self):
            return not self.running

    jobs = [Job(name, CONFIG, tmp_path / name) for name in ("one", "two")]
    pool = Interrupting({"one": ["run"] * 3})
    assert run_matrix(jobs, pool, Screen(), retries=1) == 0
    assert pool.stopped
    assert [name for name, _ in pool.commands] == ["one"]
    out = capsys.readouterr().out
    assert "2 runs: 2 stopped" in out
    assert "the same command goes on" in out


def test_a_folder_with_other_settings_fails_and_a_longer_budget_resumes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_json(CONFIG)))
    other = Job("other", replace(CONFIG, policy="mat"), tmp_path)
    with pytest.raises(UserError, match="policy was mam, is mat"):
        other.command()
    longer = Job("longer", replace(CONFIG, total_timesteps=960), tmp_path)
    assert longer.command() == ["train", "--resume", str(tmp_path), "--total-timesteps", "960"]


@pytest.mark.usefixtures("_fast")
def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(tmp_path, capsys):
    code, _ = matrix_of(tmp_path, {"one": ["finish"]})
    assert code == 0
    other = Job("one", replace(CONFIG, ppo=replace(CONFIG.ppo, lr=0.5)), tmp_path / "one")
    pool = FakePool({})
    assert run_matrix([other], pool, Screen(), retries=1) == 1
    assert not pool.commands
    assert "holds a run with other settings: ppo.lr was 0.0005, is 0.5" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"ppo\.lr was 0\.0005, is 0\.5"):
        other.finished()


FILE = """
from mam.config import Config, EvalConfig, NetworkConfig, PPOConfig
from mam import grid

base = Config(
    env="probe/matrix",
    total_timesteps=96,
    num_seeds=2,
    network=NetworkConfig(d_model=8, d_state=2),
    ppo=PPOConfig(num_envs=4, rollout_length=4, num_epochs=1, num_minibatches=1),
    eval=EvalConfig(num_evaluations=3, num_episodes=3, num_absolute_episodes=5),
)
runs = [*grid(base, policy=["ippo", "nonsense"])]
"""


def kill_when_it_runs(log):
    """SIGKILL for the process that writes the log, as soon as it compiles; in a thread."""
    from mam.study.experiment import pools

    launched = []
    launch = pools.subprocess.Popen

    def remember(*args, **kwargs):
        launched.append(launch(*args, **kwargs))
        return launched[-1]

    def kill():
        while "compiling" not in (log.read_text() if log.exists() else ""):
            time.sleep(0.05)
        launched[0].kill()

    threading.Thread(target=kill, daemon=True).start()
    return remember


def test_an_experiment_with_a_killed_and_a_failing_run_and_its_report(
    tmp_path, capsys, monkeypatch
):
    """Two processes that train, one of them killed on the way."""
    from mam.study.experiment import pools

    (tmp_path / "file.py").write_text(FILE)
    out = tmp_path / "out"
    monkeypatch.setattr(
        pools.subprocess, "Popen", kill_when_it_runs(out / "probe/matrix/ippo/output.log")
    )
    command = ["experiment", str(tmp_path / "file.py"), "--out", str(out)]
    assert cli.main([*command, "--dry-run"]) == 0
    assert "--policy ippo" in capsys.readouterr().out
    assert not out.exists()
    assert cli.main(command) == 1
    text = capsys.readouterr().out
    assert "probe/matrix/ippo: killed by SIGKILL: resuming it" in text
    assert "probe/matrix/ippo: finished, return" in text
    assert "failed: probe/matrix/nonsense: mam: unknown policy 'nonsense'" in text
    metrics = out / "probe/matrix/ippo/metrics.jsonl"
    before = metrics.read_bytes()
    assert json.loads(before.splitlines()[-1])["step_count"] == 96

    assert cli.main(command) == 1
    assert "ippo: started" not in capsys.readouterr().out
    assert metrics.read_bytes() == before
    assert cli.main(["report", str(out), "--out", str(tmp_path / "report")]) == 0


def test_a_run_is_never_started_twice(tmp_path):
    log = tmp_path / "output.log"
    process = launch(["list"], log)
    twin = launch(["list"], log)
    assert isinstance(process, subprocess.Popen)
    assert isinstance(twin, Elsewhere)
    assert twin.poll() is None
    process.wait()
    assert twin.poll() == UNKNOWN
    assert "policies" in log.read_text()
    again = launch(["--version"], log)
    assert isinstance(again, subprocess.Popen)
    again.wait()


def test_a_run_that_lives_is_waited_for_and_told_to_stop(tmp_path):
    code = "import sys; from pathlib import Path; from mam.runs.lock import acquire\n"
    code += "acquire(Path(sys.argv[1])); print(1); input()"
    command = [sys.executable, "-uc", code, str(tmp_path / "run.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        job = Job("run", CONFIG, tmp_path)
        with LocalPool(1) as pool:
            pool.start(job, ["list"])
            assert job.running()
            assert (pool.ended(), pool.has_capacity()) == ([], False)
        assert process.poll() is None  # whoever leaves the pool ends only processes of the pool
        with LocalPool(1) as pool:
            pool.start(job, ["list"])
            pool.stop(job)
            assert process.wait() == -signal.SIGTERM
            assert pool.ended() == [End(job, UNKNOWN)]
        assert job.log.read_text() == ""


@pytest.mark.parametrize(
    ("code", "starts", "resumed"),
    [
        (UNKNOWN, 9, True),
        (-9, 1, True),
        (-9, 2, False),
        (75, 1, True),
        (75, 2, False),
        (1, 1, False),
        (0, 1, False),
    ],
)
def test_what_is_resumed(tmp_path, code, starts, resumed):
    assert End(Job("run", CONFIG, tmp_path), code).to_be_resumed(starts, 1) == resumed


def test_without_ray_there_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file.py").write_text(FILE)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert (
        cli.main(["experiment", str(tmp_path / "file.py"), "--ray", "--out", str(tmp_path / "out")])
        == 2
    )
    assert 'pip install "multi-agent-mamba[experiment]"' in capsys.readouterr().err
    assert cli.main(["experiment", str(tmp_path / "file.py"), "--ray-address", "auto"]) == 2
    assert "--ray-address needs --ray" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def in_the_background():
    """SIGINT is ignored, as in whatever a shell starts with an ampersand."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        (
            "auto",
            ConnectionError("Could not find\nany instance"),
            "no Ray cluster at auto: Could not find any instance",
        ),
        (
            None,
            Exception("The node timed out\n during startup."),
            "cannot start Ray here: The node timed out during",
        ),
    ],
)
def test_ray_that_does_not_start_is_one_line(monkeypatch, address, error, said):
    from mam.study.experiment.cluster import RayPool

    shutdowns = []
    ray = SimpleNamespace(init=Mock(side_effect=error), shutdown=lambda: shutdowns.append(1))
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(UserError, match=said) as told:
        RayPool(address, cpus=1.0, gpus=None)
    assert "\n" not in str(told.value)
    assert shutdowns == [1]


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="needs ray: pip install 'multi-agent-mamba[experiment]'",
)
@pytest.mark.filterwarnings(
    "ignore:os.fork:RuntimeWarning"
)  # Ray starts its processes by forking this one
def test_ray_runs_resumes_and_stops(tmp_path, monkeypatch, in_the_background):
    """One cluster of two cores: a run told to stop, and the same run to its end."""
    from mam.study.experiment.cluster import RayPool

    monkeypatch.chdir(tmp_path)
    config = replace(CONFIG, policy="ippo", total_timesteps=16_000_000, num_seeds=1)
    job, ends = Job("run", config, tmp_path / "run"), []

    def wait_for(condition):
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, job.log.read_text()
            time.sleep(0.1)

    with RayPool(None, cpus=1.0, gpus=0.0) as pool:
        pool.start(job, job.command())
        wait_for(lambda: (job.path / "metrics.jsonl").exists())
        pool.stop(job)
        wait_for(lambda: ends.extend(pool.ended()) or ends)
        assert ends[0].job == job
        assert "saved; go on with" in job.log.read_text()
        assert job.started()
    with pytest.raises(UserError, match="more than the cluster has"):
        RayPool(None, cpus=1000.0, gpus=0.0)


def test_an_experiment_ends_where_the_raylet_is_gone(tmp_path):
    """As `ray` does, whose tasks then neither end nor fail."""
    from mam.study.experiment.cluster import RayPool

    nodes = [{"NodeID": "here", "Alive": True}, {"NodeID": "there", "Alive": True}]
    pool = object.__new__(RayPool)
    pool._running = {"task": Job("run", CONFIG, tmp_path / "run")}
    pool._ray = SimpleNamespace(
        wait=lambda tasks, **_: ([], tasks),
        nodes=lambda: nodes,
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "here"),
    )
    assert pool.ended() == []
    nodes[0]["Alive"] = False
    with pytest.raises(RunError, match="raylet"):
        pool.ended()
