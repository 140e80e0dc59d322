"""Kills runs at random moments, resumes them, and compares every byte with undisturbed runs.

    python soak/kill_resume.py          # 120 kills over mam, mat and mappo, half an hour
    python soak/kill_resume.py --policies mappo --kills 3
    python soak/kill_resume.py --policies rec_ippo --env kill_resume:Parallel    # in workers

Every third kill waits until a save is being written; the others strike anywhere, also while the
program starts. Each run is `mam train` as a user starts it, killed by SIGKILL, and resumed until it
ends. Compared are the last checkpoint's arrays (parameters, optimiser, keys, environments, best
weights) and every number in metrics.jsonl except the clock.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from gymnasium import spaces

ROLLOUT = 8  # steps between two updates


@dataclass(frozen=True)
class Args:
    """What to kill."""

    policies: tuple[str, ...] = ("mam", "mat", "mappo")
    env: str = "probe/identity"
    """Task; kill_resume:Parallel is one for PettingZoo."""
    kills: int = 120
    """In all, dealt to the policies in turn."""
    updates: int = 40
    """Length of a run; it saves after each."""
    seed: int = 0
    """Decides when to kill."""
    out: Path | None = None
    """Folder to work in; a temporary one if None."""


@dataclass
class Tally:
    """What happened so far."""

    kills: int = 0
    during_save: int = 0
    starting: int = 0
    runs: int = 0
    mismatches: int = 0


class Parallel:
    """A ParallelEnv whose episodes are as long as a rollout, and which draws nothing at random.

    Simulators cannot be saved, a resumed run begins new episodes: here the lost ones again.
    """

    possible_agents = ("ann", "bob")
    metadata = {"name": "parallel"}  # noqa: RUF012
    render_mode = None

    def observation_space(self, agent: str) -> spaces.Box:
        return spaces.Box(0, 1, (2,))

    def action_space(self, agent: str) -> spaces.Discrete:
        return spaces.Discrete(4)

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.agents, self.steps, self.before = (
            list(self.possible_agents),
            0,
            dict.fromkeys(self.possible_agents, 0),
        )
        return self.observe(), {agent: {} for agent in self.agents}

    def step(self, actions: dict) -> tuple[dict, dict, dict, dict, dict]:
        rewards = {
            agent: float(actions[agent] == (self.before[agent] + 1) % 4) for agent in self.agents
        }
        self.steps, self.before = self.steps + 1, actions
        ends, never, infos = (
            dict.fromkeys(self.agents, x) for x in (self.steps == ROLLOUT, False, {})
        )
        observations = self.observe()
        self.agents = [] if self.steps == ROLLOUT else self.agents
        return observations, rewards, never, ends, infos

    def observe(self) -> dict[str, np.ndarray]:
        return {
            agent: np.float32([self.steps / ROLLOUT, self.before[agent] / 3])
            for agent in self.agents
        }


def command(policy: str, env: str, updates: int) -> list[str]:
    """A run that does everything a run does, in little time."""
    sizes = (
        f"--network.d-model 8 --network.d-state 2 --ppo.num-envs 4 --ppo.rollout-length {ROLLOUT}"
    )
    ending = (
        "--eval.num-evaluations 8 --eval.num-episodes 4 --eval.num-absolute-episodes 8 "
        "--checkpoint.seconds 0"
    )
    length = (
        "--num-seeds 2 --num-workers 1 --ppo.num-epochs 1 "
        f"--total-timesteps {4 * ROLLOUT * updates}"
    )
    line = f"train --env {env} --policy {policy} {length} {sizes} {ending}"
    return [sys.executable, "-m", "mam", *line.split()]


def train(args: list[str], log: Path) -> subprocess.Popen:
    """Starts a run."""
    with log.open("a") as file:
        here = Path(__file__).parent  # where kill_resume:Parallel is looked for
        return subprocess.Popen(args, stdout=file, stderr=subprocess.STDOUT, cwd=here)


def finish(process: subprocess.Popen, log: Path) -> None:
    if process.wait() != 0:
        raise SystemExit(f"a run failed, see {log}:\n{log.read_text()[-2000:]}")


def kill(process: subprocess.Popen, run: Path, rng: random.Random, *, in_save: bool) -> str | None:
    """Waits for a moment and kills the process there; returns what it was doing, None if done."""
    deadline = time.monotonic() + (rng.uniform(0, 4) if rng.random() < 0.1 and not in_save else 600)
    rows = _size(run / "metrics.jsonl")
    while (
        process.poll() is None
        and time.monotonic() < deadline
        and _size(run / "metrics.jsonl") <= rows
    ):
        time.sleep(0.002)
    starting = _size(run / "metrics.jsonl") <= rows
    if not starting:
        time.sleep(rng.uniform(0, 0.4))
        while (
            in_save and process.poll() is None and not list((run / "checkpoint").glob("*.partial"))
        ):
            time.sleep(0.0002)
        if in_save:
            time.sleep(rng.uniform(0, 0.03))
    if process.poll() is not None:
        return None
    process.kill()
    process.wait()
    if starting:
        return "starting"
    return "saving" if list((run / "checkpoint").glob("*.partial")) else "training"


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def numbers(run: Path) -> tuple[list[dict], dict[str, bytes]]:
    """Every number of a finished run: its rows without the clock, the bytes of its last state."""
    import jax

    from mam.learning.train import make_train
    from mam.runs.folder import RunFolder

    folder = RunFolder(run)
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    config = folder.load_config()
    state = folder.load_state(config, make_train(config))
    leaves = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        leaves[jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    return [
        {name: value for name, value in row.items() if name != "elapsed"} for row in rows
    ], leaves


def compare(whole: Path, resumed: Path) -> int:
    """How many bytes and rows differ; says which."""
    (rows, leaves), (other_rows, other_leaves) = numbers(whole), numbers(resumed)
    different = sum(a != b for a, b in zip(rows, other_rows, strict=False)) + abs(
        len(rows) - len(other_rows)
    )
    if different:
        print(f"    {different} rows of metrics.jsonl differ")
    for name, data in leaves.items():
        wrong = sum(a != b for a, b in zip(data, other_leaves[name], strict=True))
        if wrong:
            print(f"    {wrong} bytes of {name} differ")
        different += wrong
    return different


def soak(args: Args, folder: Path) -> Tally:
    """Runs, kills, resumes and compares, until there were enough kills."""
    rng, tally = random.Random(args.seed), Tally()
    for policy in args.policies:
        whole, log = folder / policy / "whole", folder / policy / "log.txt"
        whole.parent.mkdir(parents=True, exist_ok=True)
        finish(train([*command(policy, args.env, args.updates), "--out", str(whole)], log), log)
        wanted = tally.kills + -(-args.kills // len(args.policies))
        while tally.kills < wanted:
            run = folder / policy / f"run_{tally.runs}"
            kill_until_done(command(policy, args.env, args.updates), run, log, rng, tally, wanted)
            tally.runs += 1
            different = compare(whole, run)
            tally.mismatches += different
            print(
                f"{policy}: run {tally.runs}, {tally.kills} kills so far, {different} bytes differ",
                flush=True,
            )
    return tally


def kill_until_done(
    command: list[str], run: Path, log: Path, rng: random.Random, tally: Tally, wanted: int
) -> None:
    """One run to its end, killed and resumed until there were as many kills as wanted."""
    while True:
        start = [*command, "--out", str(run)]
        if (run / "config.json").exists():
            start = [sys.executable, "-m", "mam", "train", "--resume", str(run), "--trust"]
        process = train(start, log)
        doing = None
        if tally.kills < wanted:
            doing = kill(process, run, rng, in_save=tally.kills % 3 == 0)
        if doing is None:
            finish(process, log)
            return
        tally.kills += 1
        tally.during_save += doing == "saving"
        tally.starting += doing == "starting"
        print(f"  kill {tally.kills} while {doing}", flush=True)


def main(args: Args) -> int:
    """Prints what was done; returns 1 if anything differed."""
    with tempfile.TemporaryDirectory() as temporary:
        tally = soak(args, (args.out or Path(temporary)).absolute())
    print(
        f"{tally.kills} kills ({tally.during_save} during a save, {tally.starting} while starting) "
        f"in {tally.runs} runs: {tally.mismatches} mismatching bytes"
    )
    return int(tally.mismatches > 0)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
