"""What a person types, and what they read."""

import errno
import io
import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import mam
from mam.cli import evaluate
from mam.cli import main as cli
from mam.cli.arguments import parse
from mam.cli.list import List
from mam.cli.output import display
from mam.cli.plan import Plan
from mam.cli.start import starting_options
from mam.cli.train import Train, advice, curriculum_plan, price
from mam.config import Config
from mam.envs.probes import Identity
from mam.errors import UserError
from mam.presets import PRESETS, origin, preset, preset_for
from mam.runs import loop as run
from mam.study.sweep.command import Sweep
from mam.types import EnvSpec
from report_runs import CONFIG, write_run


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian"], ["trian", "did you mean train"]),
        (["train", "--ppo.lrr", "1"], ["--ppo.lrr", "did you mean --ppo.lr"]),
        (["train", "--ppo.lr", "fast"], ["--ppo.lr", "a number", "'fast'"]),
        (["train", "--ppo.lr=fast"], ["--ppo.lr", "a number", "'fast'"]),
        (["train", "--num-seeds", "1.5"], ["--num-seeds", "a whole number", "'1.5'"]),
        (
            ["train", "--network.dt-rank", "few"],
            ["--network.dt-rank", "a whole number or None", "'few'"],
        ),
        (["train", "--ppo.lr"], ["--ppo.lr", "needs a value"]),
        (["train", "--ppo.lr", "--seed", "1"], ["--ppo.lr", "needs a value"]),
        (["train", "--ppo.lr", "-1"], ["ppo.lr", "positive", "-1"]),
        (["train", "--ppo.num-minibatches", "3"], ["ppo.num_minibatches", "must divide", "3"]),
        (["train", "--network.num-heads", "5"], ["network.num_heads", "must divide", "5"]),
        (["train", "--policy", "mma"], ["unknown policy 'mma'", "mam"]),
        (
            ["train", "--network.memory", "gro"],
            ["unknown network.memory 'gro'", "did you mean gru"],
        ),
        (
            ["train", "--env", "lbf/8x8"],
            ["unknown task 'lbf/8x8'", "lbf/8x8-2p-2f-coop", "mam list"],
        ),
        (["train", "--env", "nowhere/nothing"], ["unknown task 'nowhere/nothing'", "mam list"]),
        (["train", "--preset", "lfb"], ["unknown preset 'lfb'", "did you mean lbf"]),
        (["train", "--resume", "nowhere"], ["nowhere", "no run"]),
        (["train", "--config", "nowhere"], ["no file nowhere"]),
        (["train", "--config", "a", "--preset", "lbf"], ["one place", "--config and --preset"]),
        (["show", "nowhere"], ["nowhere", "no run"]),
        (["show"], ["RUN"]),
        (["train", "extra"], ["extra"]),
        (["evaluate"], ["RUN"]),
        (["evaluate", "nowhere"], ["nowhere", "no run"]),
        (["play", "nowhere", "--gready"], ["--gready", "did you mean --greedy"]),
        (["train", "--agent-id", "name"], ["--agent-id", "one_hot, sinusoid or none", "'name'"]),
        (["train", "--num-workers", "0"], ["num_workers", "positive", "0"]),
        (
            ["train", "--env", "lbf/auto:agnets=4"],
            ["unknown option 'agnets'", "did you mean agents", "mam list"],
        ),
        (["train", "--env", "lbf/auto:agents=few"], ["agents", "a whole number", "'few'"]),
        (
            ["train", "--env", "nowhere.at_all:make_env"],
            ["nowhere.at_all:make_env", "not installed"],
        ),
        (["check-env"], ["check-env needs the name of an environment"]),
        (["check-env", "probe/idnetity"], ["did you mean probe/identity"]),
        (["plan", "x", "y"], ["plan does not take x, y here: see `mam plan --help`"]),
        (["list", "nowhere"], ["nothing has 'nowhere' in its name or description"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_line_and_exit_code_2(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("mam: ")
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("written", "meant"), [("1e6", 1_000_000), ("2.5E5", 250_000), ("1_000", 1000), ("300", 300)]
)
def test_whole_numbers_are_written_as_in_papers(written, meant):
    for args in (["--total-timesteps", written], [f"--total-timesteps={written}"]):
        assert parse("train", Train, args, Train()).config.total_timesteps == meant


@pytest.mark.parametrize("written", ["1.5e0", "1e-3", "1e400", "nan", "1.0"])
def test_other_numbers_are_not_whole(written):
    with pytest.raises(UserError, match="--total-timesteps takes a whole number"):
        parse("train", Train, ["--total-timesteps", written], Train())


@pytest.mark.parametrize(
    "args",
    [
        ["train", "--env", "lbf/8x8"],
        ["check-env", "lbf/8x8"],
        ["evaluate", "run", "--env", "lbf/8x8"],
    ],
)
def test_a_task_that_does_not_exist_is_refused_before_jax_is_imported(args):
    program = (
        "import sys; from mam.cli.main import main; "
        "sys.exit(main(sys.argv[1:]) + ('jax' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("unknown task 'lbf/8x8'")) == (2, 1)


def test_overview_version_and_list(capsys):
    assert (
        cli.main([]) == cli.main(["--help"]) == cli.main(["--version"]) == cli.main(["list"]) == 0
    )
    out = capsys.readouterr().out
    for word in (
        "usage: mam",
        *cli.COMMANDS,
        "lbf/2s-8x8-2p-2f-coop",
        "rware/xlarge-4ag-hard",
        "--network.memory",
        *PRESETS,
    ):
        assert word in out
    assert cli.main(["list", "RWARE"]) == 0
    few = capsys.readouterr().out
    assert "rware/xlarge-4ag-hard" in few
    assert "lbf/" not in few


def test_a_reader_that_goes_away():
    command = [sys.executable, "-m", "mam", "list"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_help_shows_the_defaults_of_the_tasks_preset(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--env", "rware/tiny-2ag", "--help"])
    assert stop.value.code == 0
    lr = re.search(r"--ppo\.lr FLOAT.*?default: ([\d.e-]+)", capsys.readouterr().out, re.DOTALL)
    assert lr is not None
    assert float(lr.group(1)) == preset("rware/tiny-2ag").ppo.lr


def test_every_preset_names_a_task_it_can_train_on_or_a_policy():
    from mam.envs.tasks import check_task

    for name, make in PRESETS.items():
        check_task(make().env)
        assert make().env.startswith(name) or make().policy == name
        assert make.__doc__


def test_the_preset_of_a_task_is_its_own_or_its_suites():
    assert preset_for("lbf/15x15-4p-5f") == (preset("lbf/15x15-4p-5f"), "lbf/15x15-4p-5f")
    config, name = preset_for("lbf/8x8-2p-2f-coop")
    assert (config.env, name, config.ppo) == ("lbf/8x8-2p-2f-coop", "lbf", preset("lbf").ppo)
    config, name = preset_for("lbf/auto:agents=8")
    assert (config.env, name, config.ppo) == ("lbf/auto:agents=8", "lbf/auto", preset(name).ppo)
    assert preset_for("mine/own")[1] == "defaults"


def test_the_task_of_a_dataset_is_learned_from_its_data():
    args = ["--learn", "bc", "--data", "d", "--env", "dataset"]
    config = parse("train", Train, args, starting_options(Train, args)).config
    assert (config.env, config.data, config.learn) == ("dataset", "d", "bc")
    with pytest.raises(UserError, match="the task of a dataset: give --data"):
        parse("train", Train, ["--env", "dataset"], starting_options(Train, ["--env", "dataset"]))


SMALL = (
    *(
        "--env",
        "probe/matrix",
        "--network.d-model",
        "8",
        "--network.d-state",
        "2",
        "--ppo.num-envs",
        "4",
    ),
    *(
        "--ppo.rollout-length",
        "4",
        "--ppo.num-epochs",
        "1",
        "--ppo.num-minibatches",
        "1",
        "--num-seeds",
        "2",
    ),
    *(
        "--eval.num-evaluations",
        "2",
        "--eval.num-episodes",
        "3",
        "--eval.num-absolute-episodes",
        "5",
    ),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four updates by the command line."""
    path = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(["train", *SMALL, "--total-timesteps", "64", "--out", str(path)]) == 0
    return path


def test_train_says_what_it_does_and_leaves_everything(finished, capsys):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *("config.json", "versions.json", "metrics.jsonl", "marl_eval.json", "times.json"),
        *("learning_curve.png", "tensorboard", "checkpoint", "run.lock"),
    }
    config = json.loads((finished / "config.json").read_text())
    assert (config["env"], config["num_seeds"], config["network"]["d_model"]) == (
        "probe/matrix",
        2,
        8,
    )
    versions = json.loads((finished / "versions.json").read_text())
    assert {"python", "packages", "git", "device", "platform"} <= versions.keys()
    results = json.loads((finished / "marl_eval.json").read_text())["probe"]["matrix"]["mam"]
    assert results.keys() == {"seed_0", "seed_1"}
    assert len(results["seed_0"]["absolute_metrics"]["mean_episode_return"]) == 5


def test_evaluate_reports_every_seed(finished, capsys):
    assert cli.main(["evaluate", str(finished), "--episodes", "4", "--greedy"]) == 0
    out = capsys.readouterr().out
    assert "4 episodes" in out
    assert "greedy" in out
    assert "mean ± std" in out


def test_evaluate_tells_agents_with_rewards_of_their_own_apart(finished, capsys, monkeypatch):
    from mam.envs import probes, tasks

    class Own(probes.Matrix):
        @property
        def spec(self):
            return replace(super().spec, team_reward=False, agent_names=("wolf_0", "[hare]"))

    monkeypatch.setitem(
        tasks.SUITES, "probe", replace(tasks.SUITES["probe"], tasks=("matrix", "own"))
    )
    monkeypatch.setitem(probes.PROBES, "own", Own)
    command = ["evaluate", str(finished), "--env", "probe/own", "--episodes", "4"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert re.search(r"│ wolf_0 +│ \d.\d+ ± \d.\d+ +│\n│ \[hare\] +│ \d", out)
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agents"] == ["wolf_0", "[hare]"]
    assert np.shape(found["metrics"]["agent_return"]) == (2, 4, 2)
    assert {"return_wolf", "return_[hare]"} < found["metrics"].keys()
    monkeypatch.setattr(evaluate, "_MOST_AGENTS", 1)
    display(evaluate._agent_table(np.zeros((2, 4, 2)), Own().spec))
    assert "and 1 more agents, all in --json" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_evaluate_prints_json_and_nothing_else(finished, capsys):
    assert cli.main(["evaluate", str(finished), "--episodes", "4", "--greedy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["env"], found["seeds"], found["greedy"]) == ("probe/matrix", [0, 1], True)
    assert [len(episodes) for episodes in found["metrics"]["episode_return"]] == [4, 4]


def test_a_run_is_played_in_the_mode_that_counts_in_it(tmp_path, capsys):
    run, brief = tmp_path / "run", ["--policy", "ippo", "--total-timesteps", "16", "--eval.greedy"]
    assert cli.main(["train", *SMALL, *brief, "--out", str(run)]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--episodes", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["greedy"] is True
    gif = tmp_path / "episode.gif"
    assert cli.main(["play", str(run), "--out", str(gif), "--picture", "False"]) == 0
    assert json.loads(gif.with_suffix(".json").read_text())["greedy"] is True
    data = tmp_path / "data"
    assert cli.main(["record", str(run), "--episodes", "2", "--out", str(data)]) == 0
    assert json.loads((data / "dataset.json").read_text())["provenance"]["greedy"] is True


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """A run whose mean return is a tenth of the number of agents, a seed's number more."""
    from mam.runs import api

    def play(run, *, env, episodes, **_):
        num_agents = int(env.partition("agents=")[2])
        returns = np.arange(2)[:, None] + np.full((2, episodes), num_agents / 10)
        spec = EnvSpec(env, num_agents, 1, 2, time_limit=None)
        return spec, {"episode_return": returns}

    monkeypatch.setattr(api, "play_episodes", play)
    config = replace(CONFIG, env="lbf/auto:agents=4,coop=true", num_seeds=2)
    return ["evaluate", str(write_run(tmp_path / "run", config)), "--episodes", "3"]


def test_evaluate_sweeps_an_option_of_the_task(swept, tmp_path, capsys):
    command = [*swept, "--sweep", "agents=8,32,128"]
    assert cli.main([*command, "--out", str(tmp_path / "sweep.png")]) == 0
    out = capsys.readouterr().out
    for row in (r"8 +│ +1.300 ± 0.707", r"32 +│ +3.700 ± 0.707", r"128 +│ +13.300 ± 0.707"):
        assert re.search(row, out)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sweep"] == "agents"
    assert [(row["env"], row["agents"]) for row in found["results"]] == [
        (f"lbf/auto:coop=true,agents={n}", n) for n in (8, 32, 128)
    ]
    assert np.shape(found["results"][0]["metrics"]["episode_return"]) == (2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep", "agents"], "such as agents=8,32, got agents"),
        (["--sweep", "agents=8,,9"], "got agents=8,,9"),
        (["--sweep", "agents=8,8"], "got agents=8,8"),
        (["--sweep", "map=a,b", "--out", "a.png"], "against positive numbers, got --sweep map=a,b"),
        (["--out", "a.png"], "--out draws a sweep: give --sweep"),
        (["--sweep", "agents=8", "--out", "no/a.png"], "--out: there is no folder no"),
        (["--sweep", "agents=8,0"], "agents must be"),
    ],
)
def test_sweeps_that_are_none(swept, capsys, options, message):
    assert cli.main([*swept, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_show_prints_command_settings_provenance_and_scores(finished, capsys):
    assert cli.main(["show", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "mam train --env probe/matrix --num-seeds 2 --total-timesteps 64" in out
    for line in (r"ppo.num_envs +4", r"jax +\d", r"git +", r"mean ± std", r"time: compile \d+ %"):
        assert re.search(line, out)


@pytest.mark.parametrize(("command", "unwritten"), [("play", "x.json"), ("report", "x.gif")])
def test_a_full_disk_is_one_line(finished, tmp_path, capsys, monkeypatch, command, unwritten):
    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mam.runs.sinks.os", SimpleNamespace(fsync=full_disk))
    assert cli.main([command, str(finished), "--out", str(tmp_path / "x.gif")]) == 1
    assert (
        capsys.readouterr().err
        == f"mam: cannot write {tmp_path / unwritten}: No space left on device\n"
    )


def test_settings_start_from_a_run_or_a_file(tmp_path):
    write_run(tmp_path / "run")
    for start in (tmp_path / "run", tmp_path / "run" / "config.json"):
        for kind in (Train, Plan, Sweep):
            assert starting_options(kind, ["--config", str(start)]).config == CONFIG
    args = ["--config", str(tmp_path / "run"), "--seed", "7"]
    assert parse("train", Train, args, starting_options(Train, args)).config == replace(
        CONFIG, seed=7
    )


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (("agents=2@9000", "agents=4"), "agents=2 to 16,384 steps, agents=4 to 32,768 steps"),
        (("agents=2@9000",), "agents=2 to 16,384 steps, mine:own to 32,768 steps"),
    ],
)
def test_what_is_trained_on_is_said(stages, said):
    config = replace(preset_for("mine:own")[0], curriculum=stages, total_timesteps=32_768)
    assert config.steps_per_update == 8192
    assert curriculum_plan(config) == f"trains on {said}; evaluations play mine:own"


def test_large_teams_are_advised_to_learn_in_small_ones():
    config, _ = preset_for("lbf/auto:agents=128,grid=64")
    assert "each of the 128 agents" in advice(config, 128)
    assert not advice(config, 32)
    battle = replace(config, env="smax/2s3z")
    assert "--network.critic pooled" in advice(battle, 5)
    assert not advice(replace(battle, policy="mappo"), 5)
    assert not advice(replace(battle, policy="mine:make"), 5)
    shared = replace(battle.network, critic="shared")
    assert not advice(replace(battle, network=shared), 5)
    assert not advice(replace(config, env="mine:own"), 128)
    assert not advice(replace(config, curriculum=("agents=8",)), 128)


def test_the_price_of_evaluations_is_said():
    config = replace(preset_for("mine:own")[0], total_timesteps=65_536)
    assert (config.agent_id, config.evaluation_modes) == ("sinusoid", (False,))
    assert price(config, 100) == (
        "evaluations: 1 + 8 and the absolute metric, 140 episodes per seed, "
        "up to 14,000 steps: 21% of those in training"
    )
    often = replace(config, eval=replace(config.eval, num_evaluations=100, both_modes=True))
    often = replace(often, total_timesteps=8 * often.total_timesteps)
    assert price(often, 1000).endswith(
        "of those in training; --eval.num-evaluations asks for fewer"
    )
    both = replace(config, eval=replace(config.eval, both_modes=True, greedy=True))
    assert both.evaluation_modes == (True, False)
    assert price(both, None).endswith("280 episodes per seed in both modes")


def test_the_preset_is_named_beside_its_sisters():
    said = origin("rware/tiny-2ag")
    assert said.startswith("settings start from preset rware/tiny-2ag: d_model 32, 1 block; ")
    assert "other tasks of the suite: d_model 128, 1 block" in said
    assert "rware/tiny-4ag of the suite: d_model 128, 3 blocks" in said
    assert origin("hanabi") == "settings start from preset hanabi: d_model 128, 1 block"
    assert origin("defaults") == "settings start from defaults: d_model 64, 1 block"


def test_a_run_plays_another_task_if_its_sizes_fit(finished, capsys, monkeypatch):
    from mam.envs import probes, tasks

    monkeypatch.setitem(
        tasks.SUITES,
        "probe",
        replace(
            tasks.SUITES["probe"],
            tasks=("matrix", "identity", "matrix-again", "matrix-large", "parts"),
        ),
    )
    monkeypatch.setitem(probes.PROBES, "matrix-again", probes.Matrix)
    monkeypatch.setitem(probes.PROBES, "matrix-large", lambda: probes.Matrix(num_agents=3))
    assert (
        cli.main(["evaluate", str(finished), "--env", "probe/matrix-again", "--episodes", "4"]) == 0
    )
    assert "mam on probe/matrix-again" in capsys.readouterr().out
    assert cli.main(["evaluate", str(finished), "--env", "probe/matrix-large"]) == 2
    assert "obs_dim is 4 instead of 3; trained with --agent-id sinusoid" in capsys.readouterr().err
    assert cli.main(["evaluate", str(finished), "--env", "probe/identity"]) == 2
    assert "num_actions is 4 instead of 3" in capsys.readouterr().err
    # As many choices in all, and other ones: the weights would fit.
    monkeypatch.setitem(
        probes.PROBES, "parts", lambda: probes.Components(num_agents=2, sizes=(2, 1))
    )
    assert cli.main(["evaluate", str(finished), "--env", "probe/parts"]) == 2
    assert "action_components is (2, 1) instead of None" in capsys.readouterr().err


def test_check_env(capsys, monkeypatch):
    from mam.envs import probes, tasks

    assert cli.main(["check-env", "probe/identity"]) == 0
    assert "probe/identity: nothing found" in capsys.readouterr().out
    monkeypatch.setitem(tasks.SUITES, "probe", replace(tasks.SUITES["probe"], tasks=("broken",)))
    monkeypatch.setitem(probes.PROBES, "broken", Broken)
    assert cli.main(["check-env", "probe/broken"]) == 1
    assert re.search(
        r"error · shape · agents_view.*: expected \[3, 5\], got \[3, 4\]", capsys.readouterr().out
    )


class Broken(Identity):
    """Promises more than it shows."""

    @property
    def spec(self):
        return replace(super().spec, obs_dim=5)


def test_list_envs_shows_sizes(capsys, monkeypatch):
    from mam.envs import tasks

    longest = max(tasks.task_names(), key=len).partition("/")[2]
    suites = {"probe": tasks.SUITES["probe"], "gone": tasks.Suite("nowhere", __name__, (longest,))}
    monkeypatch.setattr(tasks, "SUITES", suites)
    monkeypatch.setattr("mam.envs.registry.SUITES", suites)
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["list", "--envs"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"probe/target +3 +2 +- +2 real +8", out)
    assert re.search(r"probe/components +3 +5 +- +3 \+ 2 +8", out)
    assert re.search(rf"gone/{longest} +- ", out)
    assert "…" not in out
    assert "gone: it needs a package" in out


def make_gone(task):
    raise UserError("it needs a package")


def test_a_killed_worker_does_not_end_a_run(tmp_path, capfd, caplog, monkeypatch):
    """A PettingZoo environment from training to evaluation, with a worker killed on the way."""
    from mam.envs.external.pool import ExternalPool

    pytest.importorskip("mpe2")
    step, steps = ExternalPool.step, []

    def killing(pool, action):
        steps.append(pool)
        if len(steps) == 6:
            pool._workers[0].process.kill()
        return step(pool, action)

    monkeypatch.setattr(ExternalPool, "step", killing)
    env, path = "pettingzoo/mpe2:simple_spread_v3:max_cycles=5", str(tmp_path / "run")
    host = (
        "--env",
        env,
        "--policy",
        "ippo",
        "--num-workers",
        "2",
        "--num-seeds",
        "2",
        "--out",
        path,
    )
    assert cli.main(["train", *SMALL, *host, "--total-timesteps", "64"]) == 0
    assert "worker 0 (environments 0 to 3) was killed by SIGKILL; starting it again" in caplog.text
    assert "steps/s" in capfd.readouterr().out
    assert cli.main(["evaluate", path, "--episodes", "4", "--trust"]) == 0
    assert re.search(r"episode_length.*5\.000", capfd.readouterr().out, re.DOTALL)
    monkeypatch.setattr(
        ExternalPool, "__init__", None
    )  # no environment is made, and no process started
    policy = mam.load(path)
    assert policy.act(np.zeros((policy.spec.num_agents, policy.spec.obs_dim))).shape == (
        policy.spec.num_agents,
    )


def test_what_cannot_be_drawn_is_said(finished, capsys):
    assert cli.main(["play", str(finished)]) == 0
    assert "probe/matrix cannot be drawn: no picture, only" in capsys.readouterr().out
    assert (finished / "episode.json").exists()
    assert cli.main(["play", str(finished), "--policy-seed", "7"]) == 2
    assert "--policy-seed" in capsys.readouterr().err


def test_a_picture_goes_where_it_is_asked_for(finished, capsys, tmp_path):
    picture = tmp_path / "new" / "folder" / "x.gif"
    assert cli.main(["play", str(finished), "--out", str(picture)]) == 0
    assert picture.with_suffix(".json").exists()
    capsys.readouterr()
    for out, message in (
        ("x.mp4", "--out is a GIF, such as x.gif: got x.mp4"),
        ("x.json", "--out is a GIF, such as x.gif: got x.json"),
        (f"{picture.with_suffix('.json')}/x.gif", "cannot be made: "),
    ):
        assert cli.main(["play", str(finished), "--out", out]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_folder_with_a_run_is_not_overwritten(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert cli.main(["train", *SMALL, "--out", str(finished)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_resume_refuses_other_settings_and_names_them(finished, capsys):
    assert cli.main(["train", "--resume", str(finished), "--ppo.lr", "1", "--seed", "3"]) == 2
    err = capsys.readouterr().err
    assert "ppo.lr was 0.003, is 1.0" in err
    assert "seed was 0, is 3" in err
    assert cli.main(["train", "--resume", str(finished), "--total-timesteps", "16"]) == 2
    assert "cannot shrink" in capsys.readouterr().err


def test_output_in_any_encoding(monkeypatch):
    """What it cannot express becomes a question mark."""
    written = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
        assert cli.main([]) == 0
        print("→ ≥ × \udcff")
        sys.stdout.flush()
        assert written.getvalue().decode("cp1252").endswith("? ? × ?\n")


class Deaf(io.StringIO):
    """A stream whose reader is gone."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


class Full(io.StringIO):
    """A stream to a full disk, noticed when it is flushed."""

    def flush(self):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("stream", "code", "said"), [(Deaf, 141, ""), (Full, 1, "mam: No space left on device\n")]
)
def test_short_commands_end_with_their_reader(stream, code, said, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream())
        assert cli.main([]) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("stream", [Deaf, Full])
def test_long_commands_go_on_without_theirs(stream, monkeypatch, capsys):
    reached = []

    def work(args):
        for _ in range(2):
            print("line", flush=True)
        reached.append(1)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream())
        patch.setitem(cli.COMMANDS, "dashboard", (List, work))
        assert cli.main(["dashboard"]) == 0
    assert reached
    assert capsys.readouterr().err.startswith("mam: nobody reads the output any more")


def test_default_folders_suit_every_file_system():
    config = Config(env="pettingzoo/mpe2:spread:N=3", policy="ippo")
    assert str(run._default_folder(config)) == "runs/pettingzoo/mpe2_spread_N=3/ippo"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seed 99999999999999999999", "--seed must lie in 0"),
        ("--seed 4294967296", "--seed must lie in 0 … 4,294,967,295"),
        ("--seed -1", "--seed must lie in 0"),
        ("--seed 4294967295 --num-seeds 2", "seed must lie in 0 … 4,294,967,294 with 2 seeds"),
        ("--total-timesteps 99999999999999999999", "--total-timesteps must lie within"),
        ("--ppo.lr inf", "ppo.lr must be finite, got inf"),
        ("--ppo.ent-coef inf", "ppo.ent_coef must be finite, got inf"),
        ("--checkpoint.seconds nan", "checkpoint.seconds must not be negative, got nan"),
        ("--checkpoint.seconds inf", "checkpoint.seconds must be finite, got inf"),
        ("--worker.step-timeout 0", "worker.step_timeout must be positive, got 0"),
    ],
)
def test_numbers_that_no_run_can_have(options, message, capsys):
    assert cli.main(["train", *options.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"mam: {message}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["evaluate RUN", "play RUN", "check-env probe/matrix"])
def test_seeds_of_32_bits_everywhere(command, capsys):
    assert cli.main([*command.split(), "--seed", "4294967296"]) == 2
    assert "--seed must lie in 0 … 4,294,967,295" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("Unable to initialize backend 'tpu':\nno TPU"),
            "Unable to initialize backend 'tpu': no TPU",
        ),
        (AssertionError(), "JAX finds no such device here"),
    ],
)
def test_a_device_that_is_not_there(error, reason, monkeypatch, capsys):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert cli.main(["train", "--env", "probe/matrix"]) == 2
    assert (
        capsys.readouterr().err
        == f"mam: JAX_PLATFORMS=tpu: {reason}; leave it out, or set it to cpu\n"
    )
