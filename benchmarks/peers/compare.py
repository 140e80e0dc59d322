"""This library beside another one: each in its own environment, in turn, as a table.

    python benchmarks/peers/compare.py mat     CHECKOUT PYTHON   # PKU-MARL/Multi-Agent-Transformer
    python benchmarks/peers/compare.py mava    CHECKOUT PYTHON
    python benchmarks/peers/compare.py jaxmarl CHECKOUT PYTHON

CHECKOUT is a copy of the peer's repository, PYTHON the interpreter of an environment in which it
runs (docs/peers.md says how to make one); this script is run by an interpreter that has this
library. Nothing is downloaded. Every contender is a process of its own that keeps no compiled
programs; the contenders of a comparison run one after another, round by round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clock import MARK

HERE = Path(__file__).parent
PPO = (
    "--ppo.num-envs=64",
    "--ppo.rollout-length=128",
    "--ppo.num-epochs=4",
    "--ppo.num-minibatches=4",
)
SMALL = ("--network.d-model=64", "--network.num-blocks=1", "--network.d-state=16")
WIDE = ("--network.d-model=128", "--network.num-blocks=1")
TASKS = {
    "lbf/2s-8x8-2p-2f-coop": ("env=lbf", "env/scenario=2s-8x8-2p-2f-coop"),
    "rware/tiny-4ag": ("env=rware", "env/scenario=tiny-4ag"),
}


@dataclass(frozen=True)
class Comparison:
    """The peer's arguments, and ours by name."""

    name: str
    peer: tuple[str, ...]
    ours: dict[str, tuple[str, ...]]


def of_mat() -> Iterator[Comparison]:
    for n in ("8", "32", "128"):
        ours = {"mam": ("act", "mam", n), "mat": ("act", "mat", n)}
        yield Comparison(f"acting, {n} agents", (n,), ours)


def of_mava() -> Iterator[Comparison]:
    for task, overrides in TASKS.items():
        env = ("--env", task, *PPO)
        plain = ("--policy=mappo", "--network.plain", *env, *WIDE)
        normed = ("--policy=mappo", *env, *WIDE)
        yield Comparison(
            f"MAPPO, {task}",
            ("ppo.anakin.ff_mappo", *overrides),
            {
                "mappo, plain": ("train", *plain),
                "mappo, plain, no native kernels": ("train-plain", *plain),
                "mappo": ("train", *normed),
            },
        )
        mat, mam = (("--policy", name, *env, *SMALL) for name in ("mat", "mam"))
        yield Comparison(
            f"MAT, {task}",
            ("mat.anakin.mat", *overrides),
            {
                "mat": ("train", *mat),
                "mat, no native kernels": ("train-plain", *mat),
                "mam": ("train", *mam),
            },
        )
        yield Comparison(
            f"Sable without memory, {task}",
            ("sable.anakin.ff_sable", *overrides),
            {"ff_sable": ("train", "--policy=ff_sable", *env, *SMALL), "mam": ("train", *mam)},
        )


def of_jaxmarl() -> Iterator[Comparison]:
    rec = ("--policy=rec_mappo", "--env=smax/2s3z", *PPO[1:], "--ppo.num-envs=128", *WIDE)
    yield Comparison(
        "recurrent MAPPO, smax/2s3z",
        (),
        {"rec_mappo, plain": ("train", *rec, "--network.plain"), "rec_mappo": ("train", *rec)},
    )


PEERS = {
    "mat": ("official MAT", of_mat),
    "mava": ("Mava", of_mava),
    "jaxmarl": ("JaxMARL", of_jaxmarl),
}


def measured(command: Sequence[str]) -> dict[str, Any]:
    """Run a contender, and return what it tells with the seconds to its first step."""
    begun, record = time.perf_counter(), {}
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                record |= json.loads(line.removeprefix(MARK))
                record.setdefault("first_s", time.perf_counter() - begun)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode} of: {' '.join(command)}")
    return record


def compared(
    comparison: Comparison, commands: dict[str, list[str]], rounds: int
) -> Iterator[dict[str, Any]]:
    """Yield a row per contender, the peer's first."""
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for number in range(rounds):
        # Every other round goes backwards: no one always runs in the wake of the same one.
        for name in list(commands)[:: -1 if number % 2 else 1]:
            print(f"{comparison.name}: {name}, round {number + 1} of {rounds}", file=sys.stderr)
            records[name].append(measured(commands[name]))
    speed = {
        name: statistics.median(r["env_steps"] / r["seconds"] for r in found)
        for name, found in records.items()
    }
    peer = next(iter(commands))
    for name, found in records.items():
        yield {
            "comparison": comparison.name,
            "contender": name,
            "env_steps_per_s": speed[name],
            "of_peer": speed[name] / speed[peer],
            "ms": 1e3 * statistics.median(r["seconds"] for r in found),
            "cpu_ms": 1e3 * statistics.median(r["cpu_seconds"] for r in found),
            "first_s": statistics.median(r["first_s"] for r in found),
            "parameters": found[0]["parameters"],
            "versions": found[0]["versions"],
        }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    heads = ("env steps/s", "× the peer", "ms a call", "CPU ms", "first call, s", "parameters")
    lines = [f"| comparison | contender | {' | '.join(heads)} |", f"|---|---|{'--:|' * len(heads)}"]
    lines += [
        f"| {row['comparison']} | {row['contender']} | {row['env_steps_per_s']:,.0f} | "
        f"{row['of_peer']:.2f} | {row['ms']:,.1f} | {row['cpu_ms']:,.1f} | {row['first_s']:.0f} | "
        f"{row['parameters']:,} |"
        for row in rows
    ]
    versions = {tuple(row["versions"].items()): None for row in rows}
    lines += ["", *(", ".join(f"{name} {number}" for name, number in v) for v in versions)]
    return "\n".join(lines)


def main() -> None:
    """Print a table of what was asked for; rows as JSON lines where `--out` says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("python", type=Path, help="interpreter of the peer's environment")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one contender in a round")
    parser.add_argument("--only", default="", help="part of the names of comparisons to run")
    parser.add_argument("--out", type=Path, help="file that rows are appended to")
    args = parser.parse_args()
    checkout, seconds = str(args.checkout.resolve()), str(args.seconds)
    theirs = [str(args.python.absolute()), str(HERE / f"{args.peer}_peer.py"), seconds, checkout]
    own = [sys.executable, str(HERE / "ours.py"), seconds]
    rows: list[dict[str, Any]] = []
    label, comparisons = PEERS[args.peer]
    for comparison in comparisons():
        if args.only not in comparison.name:
            continue
        commands = {label: [*theirs, *comparison.peer]}
        commands |= {name: [*own, *ours] for name, ours in comparison.ours.items()}
        rows += compared(comparison, commands, args.rounds)
        if args.out:
            args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
