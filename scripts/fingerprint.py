"""What short training runs compute, as digests: to show that a change of structure changed nothing.

    python scripts/fingerprint.py write FILE            # run and write down
    python scripts/fingerprint.py compare BEFORE AFTER  # exit 1 where digests differ, and how much

Every policy trains on every task below for three updates and is evaluated after each, through the
command line, so that the script runs on any version of the library (PYTHONPATH=…/src). Digests know
no names of arrays.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

POLICIES = ("mam", "mam2", "mat", "mappo", "ippo", "rec_mappo", "rec_ippo")
TASKS = {
    "probe/identity": (),
    "probe/memory": (),
    "probe/target": (),
    "lbf/2s-8x8-2p-2f-coop": (),
    "smax/2s3z": (),
    "fingerprint:Cues": ("--num-workers", "1"),
}
SETTINGS = (
    *(
        "--total-timesteps",
        "96",
        "--ppo.num-envs",
        "4",
        "--ppo.rollout-length",
        "8",
        "--ppo.num-minibatches",
        "2",
    ),
    *(
        "--ppo.num-epochs",
        "2",
        "--network.d-model",
        "16",
        "--network.num-blocks",
        "1",
        "--network.num-heads",
        "2",
    ),
    *("--eval.num-episodes", "4", "--eval.max-episode-steps", "20"),
)
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # less time compiling
)
CLOCK = ("elapsed", "kind")  # fields of a row that are no metrics


class Cues:
    """A PettingZoo environment of ten steps: two agents see cues and earn 1 for naming them."""

    metadata = {"render_modes": []}  # noqa: RUF012
    possible_agents = ("left", "right")

    def __init__(self):
        from gymnasium import spaces

        self.observation_spaces = {agent: spaces.Box(0, 1, (4,)) for agent in self.possible_agents}
        self.action_spaces = {agent: spaces.Discrete(4) for agent in self.possible_agents}

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.agents, self.num_steps = list(self.possible_agents), 0
        return self._look(), {agent: {} for agent in self.agents}

    def step(self, actions):
        reward = {agent: float(actions[agent] == self.cue[agent]) for agent in self.agents}
        self.num_steps += 1
        agents, over = self.agents, self.num_steps == 10
        if over:
            self.agents = []
        false, ended = dict.fromkeys(agents, False), dict.fromkeys(agents, over)
        return self._look(), reward, false, ended, {agent: {} for agent in agents}

    def close(self):
        pass

    def _look(self):
        self.cue = {agent: int(self.random.integers(4)) for agent in self.possible_agents}
        return {agent: np.eye(4, dtype=np.float32)[cue] for agent, cue in self.cue.items()}


def fingerprint(policy: str, task: str) -> dict:
    """Train one policy on one task and digest what it wrote."""
    with tempfile.TemporaryDirectory() as scratch:
        out, here = Path(scratch) / "run", str(Path(__file__).parent)
        path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), here])
        flags = " ".join([os.environ.get("XLA_FLAGS", ""), QUICK])
        command = [
            sys.executable,
            "-m",
            "mam",
            "train",
            "--policy",
            policy,
            "--env",
            task,
            "--out",
            str(out),
        ]
        done = subprocess.run(
            [*command, *SETTINGS, *TASKS[task]],
            env=os.environ | {"PYTHONPATH": path, "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{policy} on {task} ended with {done.returncode}:\n{done.stderr}")
        save = max((out / "checkpoint").iterdir(), key=lambda folder: int(folder.name))
        arrays = load_file(save / "arrays.safetensors")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    parameters = [x for name, x in arrays.items() if name.startswith("state.policy.")]
    digests = sorted(
        hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()).hexdigest() for x in parameters
    )
    metrics = {
        f"{row['update']} {row['kind']} {name}": np.ravel(np.asarray(value, float)).tolist()
        for row in rows
        for name, value in row.items()
        if name not in CLOCK
    }
    return {
        "parameters": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "norm": float(np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in parameters))),
        "metrics": hashlib.sha256(json.dumps(metrics, sort_keys=True).encode()).hexdigest(),
        "means": {name: float(np.mean(value)) for name, value in sorted(metrics.items())},
    }


def write(file: Path, jobs: int, only: list[str]) -> None:
    """Fingerprint every cell, as many at a time as `jobs`."""
    cells = [
        cell
        for cell in product(POLICIES, TASKS)
        if not only or " on ".join(cell) in only or cell[0] in only
    ]
    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda cell: fingerprint(*cell), cells)
        found = {}
        for cell, result in zip(cells, results, strict=True):
            found[" on ".join(cell)] = result
            print(
                f"{' on '.join(cell)}: {result['parameters'][:12]} {result['metrics'][:12]}",
                flush=True,
            )
    file.write_text(json.dumps(found, indent=1) + "\n")


def compare(before: Path, after: Path) -> int:
    """Print the cells that differ, and how far their numbers are apart; return how many do.

    Metrics that only one of them has count for nothing, and are named.
    """
    old, new = (json.loads(file.read_text()) for file in (before, after))
    cells, differing, only_one = sorted(old.keys() & new.keys()), 0, set()
    for cell in cells:
        first, second = (side[cell]["means"] | {"norm": side[cell]["norm"]} for side in (old, new))
        only_one |= {name.split()[-1] for name in first.keys() ^ second.keys()}
        far = {
            name: abs(first[name] - second[name]) / max(1.0, abs(first[name]))
            for name in first.keys() & second.keys()
            if not np.isnan(first[name]) or not np.isnan(second[name])
        }
        worst = max(far, key=far.__getitem__)
        if old[cell]["parameters"] != new[cell]["parameters"] or far[worst]:
            differing += 1
            apart = f"{first[worst]} and {second[worst]}"
            print(f"{cell}: furthest apart, by {far[worst]:.1e}: {worst}, {apart}")
    print(f"{len(cells) - differing} of {len(cells)} the same to the bit")
    if only_one:
        print(f"metrics of one of them only: {', '.join(sorted(only_one))}")
    return differing


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("write")
    one.add_argument("file", type=Path)
    one.add_argument("--jobs", type=int, default=2)
    one.add_argument(
        "--only", nargs="*", default=[], help="policies, or cells such as 'mam on probe/identity'"
    )
    two = commands.add_parser("compare")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "write":
        return write(args.file, args.jobs, args.only) or 0
    return int(compare(args.before, args.after) > 0)


if __name__ == "__main__":
    sys.exit(main())
