"""How `mam dashboard` bears a large folder: 100 runs of 100,000 rows, three seeds, some metrics.

    python benchmarks/dashboard_load.py [--runs 100] [--rows 100000] [--keep DIR]

Times the first read, a look at a folder in which nothing changed, one in which every run got a row,
and a curve: of one run, of the runs of one algorithm, and of a part of it. Prints memory.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mam.config import Config, PPOConfig, to_json
from mam.runs.sinks import write_atomically
from mam.study.dashboard.curves import Curves, groups, labels_of
from mam.study.dashboard.watch import Watcher

METRICS = ("loss", "entropy", "approx_kl", "grad_norm", "episode_return")
SEEDS, EVALUATE_EVERY, EPISODES = 3, 1000, 32
TASKS, POLICIES = 5, ("mam", "mat", "mam2", "ippo")


def write_runs(root: Path, num_runs: int, num_rows: int) -> int:
    """Writes runs that differ in task, algorithm and numbers; returns their size in bytes."""
    rng, size = np.random.default_rng(0), 0
    for index in range(num_runs):
        config = Config(
            env=f"lbf/task-{index % TASKS}",
            policy=POLICIES[index // TASKS % len(POLICIES)],
            num_seeds=SEEDS,
            seed=SEEDS * index,
            ppo=PPOConfig(num_envs=16, rollout_length=32),
        )
        config = replace(config, total_timesteps=2 * num_rows * config.steps_per_update)
        path = root / f"run-{index:03d}"
        path.mkdir(parents=True)
        write_atomically(path / "config.json", json.dumps(to_json(config)))
        with (path / "metrics.jsonl").open("w") as file:
            for update in range(1, num_rows + 1):
                file.write(
                    row("train", update, {name: rng.random(SEEDS, np.float32) for name in METRICS})
                )
                if update % EVALUATE_EVERY == 0:
                    file.write(
                        row(
                            "evaluation",
                            update,
                            {"episode_return": rng.random((SEEDS, EPISODES), np.float32)},
                        )
                    )
            size += file.tell()
    return size


def row(kind: str, update: int, values: dict[str, np.ndarray]) -> str:
    """A line of metrics.jsonl."""
    head = {"kind": kind, "update": update, "step_count": 512 * update, "elapsed": 0.5 * update}
    return (
        json.dumps(head | {name: value.astype(float).tolist() for name, value in values.items()})
        + "\n"
    )


def timed(what: str, action: Callable[[], Any]) -> Any:
    """Does something and prints how long it took."""
    begin, cpu = time.perf_counter(), time.process_time()
    result = action()
    print(
        f"{what:<62}{time.perf_counter() - begin:>9.3f} s {time.process_time() - cpu:>9.3f} s CPU"
    )
    return result


def main() -> None:
    """Makes the folder, measures, and removes it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument(
        "--keep", type=Path, help="a folder to make, or to use if it exists, and to leave"
    )
    args = parser.parse_args()
    root = args.keep or Path(tempfile.mkdtemp(prefix="dashboard-"))
    try:
        if not any(root.glob("run-*")):
            size = timed("writing the folder", lambda: write_runs(root, args.runs, args.rows))
            print(f"{args.runs} runs × {args.rows:,} rows, {size / 1e9:.2f} GB")
        measure(root)
    finally:
        if not args.keep:
            shutil.rmtree(root)


def measure(root: Path) -> None:
    """Prints the figures of one folder."""
    before = memory()
    watcher, curves = Watcher(root), Curves()
    timed("first read", watcher.refresh)
    timed("a look, nothing changed", watcher.refresh)
    for run in watcher.runs.values():
        with (run.path / "metrics.jsonl").open("a") as file:
            update = run.metrics.step_count // 512 + 1
            file.write(row("train", update, {name: np.ones(SEEDS, np.float32) for name in METRICS}))
    timed("a look, every run has a new row", watcher.refresh)
    runs = next(iter(groups(watcher.runs.values(), labels_of(watcher.runs.values())).values()))[
        "mam"
    ]
    end = runs[0].metrics.step_count
    curves.of(runs[:1], "evaluation/episode_return", "steps")  # imports SciPy
    timed("curve of a run, 3 seeds", lambda: curves.of(runs[:1], "train/loss", "steps"))
    timed(
        f"curve of {len(runs)} runs, {SEEDS * len(runs)} seeds",
        lambda: curves.of(runs, "train/loss", "steps"),
    )
    window = (0.4 * end, 0.41 * end)
    timed("the same, zoomed in", lambda: curves.of(runs, "train/loss", "steps", window))
    timed("the same against wall-clock", lambda: curves.of(runs, "train/loss", "time"))
    timed("the same, nothing changed", lambda: curves.of(runs, "train/loss", "time"))
    timed("evaluations", lambda: curves.of(runs, "evaluation/episode_return", "steps"))
    print(
        f"numbers {watcher.progress.nbytes / 1e6:,.0f} MB; process {memory():,.0f} MB, "
        f"{before:,.0f} MB before reading"
    )


def memory() -> float:
    """The most memory the process ever had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
