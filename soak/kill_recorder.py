"""Kills a recorder at random moments, and reads what it left each time.

    python soak/kill_recorder.py             # 20 kills, two minutes
    python soak/kill_recorder.py --kills 200

Every recorder goes on with the dataset of the one that was killed before. Episodes are numbered in
what their agents see: after each kill those from 0 to the last are there, each of them once, as a
whole, and every checksum is right.
"""

import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from mam.data.store import Dataset, Writer
from mam.types import EnvSpec, Observation, Transition

SPEC = EnvSpec("soak/count", num_agents=3, obs_dim=40, num_actions=5, time_limit=None)


@dataclass(frozen=True)
class Args:
    """How often to kill."""

    kills: int = 20
    seconds: float = 1.0
    """The longest that a recorder lives once it writes."""
    seed: int = 0
    """Decides when."""
    write: Path | None = None
    """What the recorders are started with: append to this dataset until killed."""


def episode(number: int) -> Transition:
    """The episode of a number: between 1 and 90 steps in which agents see it."""
    length = 1 + number * 37 % 90
    view = np.full((length + 1, 3, 40), number, np.float32)
    view[..., 0] = np.arange(length + 1)[:, None]
    alive, legal = np.ones((length + 1, 3), bool), np.ones((length + 1, 3, 5), bool)
    seen, after = (Observation(*(x[k:][:length] for x in (view, legal, alive))) for k in (0, 1))
    last = np.arange(length) == length - 1
    return Transition(
        observation=seen,
        reset=np.arange(length) == 0,
        action=np.zeros((length, 3), np.int32),
        log_prob=None,
        value=None,
        order=np.tile(np.arange(3, dtype=np.int32), (length, 1)),
        reward=np.ones((length, 3), np.float32),
        terminated=last,
        truncated=~last & last,
        final_observation=after,
        metrics={},
    )


def write(path: Path) -> None:
    """Append episodes, a few at a time, until killed."""
    with Writer(path, SPEC) as writer:
        print("writing", flush=True)
        while True:
            for _ in range(5):
                writer.append(episode(writer.num_episodes))
            writer.flush()


def check(path: Path) -> int:
    """Return how many episodes there are; fail unless each is there once, as a whole."""
    data = Dataset.open(path)
    count = len(data.lengths)
    if not count:
        return 0
    steps = data.read()
    numbers = steps.observation.agents_view[steps.reset][:, 0, 1]
    assert numbers.tolist() == [*range(count)], "episodes are missing, or doubled"
    assert data.lengths.tolist() == [1 + n * 37 % 90 for n in range(count)], "an episode is torn"
    expected = np.concatenate([np.arange(n) for n in data.lengths])
    assert (steps.observation.agents_view[:, 0, 0] == expected).all(), "steps are torn"
    return count


def main(args: Args) -> None:
    if args.write is not None:
        write(args.write)
        return
    chance, counts = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "data"
        for _ in range(args.kills):
            command = [sys.executable, __file__, "--write", str(path)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(chance.uniform(0, args.seconds))
            process.kill()
            process.wait()
            counts.append(check(path))
    assert counts == sorted(counts), "episodes were lost"
    print(f"{args.kills} kills: every dataset whole; episodes after each: {counts}")


if __name__ == "__main__":
    main(tyro.cli(Args))
