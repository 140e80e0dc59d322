"""How acting grows with the number of agents: milliseconds, microseconds per agent, and memory.

    python benchmarks/agents_scale.py
    python benchmarks/agents_scale.py --policies mam --batch 1 --network.agent-chunk 4096

Every cell, one joint action of one policy at one size, encoder included, is measured in a process
of its own. `program MB` is what XLA says that it needs: observations, weights, outputs and all that
is in between. `peak MB` is the most memory that the process ever had, libraries and compiling
included. A cell is left out if it would exceed a limit, by its program's own account or by how the
two sizes before it grew. The slopes are those of the logarithms, by least squares over all sizes
and between the last two.
"""

import multiprocessing
import resource
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated

import tyro

from mam.config import NetworkConfig
from mam.study.bench.timing import power_law, predict

HEAD = f"{'policy':8} batch {'agents':>9} {'joint ms':>11} {'µs/agent':>10} program MB   peak MB"


@dataclass(frozen=True)
class Args:
    """What to measure, and what to leave out."""

    policies: tuple[str, ...] = ("mam", "mam2", "mat")
    num_agents: tuple[int, ...] = (100, 1000, 10_000, 100_000, 1_000_000)
    batch: tuple[int, ...] = (1, 64)
    """Environments that act at once."""
    calls: int = 5
    """Joint actions of which the median counts, after one that does not."""
    max_seconds: float = 120.0
    """Longest joint action."""
    max_memory: float = 16.0
    """Most memory that a program may need, in GB."""
    network: Annotated[NetworkConfig, tyro.conf.arg(name="network")] = field(
        default_factory=NetworkConfig
    )


@dataclass(frozen=True)
class Cell:
    """What one process measured; no seconds where the program exceeds the limit."""

    program_mb: float
    peak_mb: float
    seconds: float | None


def measure(policy: str, num_agents: int, batch: int, args: Args) -> Cell:
    """Compile acting at one size, and time it if it fits."""
    import jax
    import jax.numpy as jnp

    from mam.runs.footprint import Footprint
    from mam.runs.process import configure
    from mam.study.bench.inputs import random_observation, random_policy, synthetic_task

    configure()
    spec = synthetic_task(num_agents)
    keys, reset = jax.random.split(jax.random.key(0), batch), jnp.zeros(batch, bool)
    actor = random_policy(policy, spec, args.network)
    obs = jax.eval_shape(lambda: random_observation(spec, batch))

    def act(actor, obs, keys):
        return actor.act(actor.init_memory((batch,)), obs, reset, keys)[1]

    compiled = jax.jit(act).lower(actor, obs, keys).compile()
    size = Footprint.of(compiled).total
    if size > 1e9 * args.max_memory:
        return Cell(size / 1e6, 0.0, None)
    obs, samples = random_observation(spec, batch), []
    for _ in range(1 + args.calls):
        begun = time.perf_counter()
        jax.block_until_ready(compiled(actor, obs, keys))
        samples.append(time.perf_counter() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    return Cell(size / 1e6, peak * 1024 / 1e6, median(samples[1:]))


def in_own_process(*cell) -> Cell:
    """Run `measure` in a process that ends with it."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, *cell).result()


def series(policy: str, batch: int, args: Args) -> list[tuple[int, Cell]]:
    """Print a line for every size, and return those that were timed."""
    found: list[tuple[int, Cell]] = []
    for n in sorted(args.num_agents):
        line = f"{policy:8} {batch:5} {n:9,}"
        ahead = predict([(size, cell.seconds or 0.0) for size, cell in found], n)
        if ahead is not None and ahead > args.max_seconds:
            print(f"{line}  left out: would take some {ahead:.0f} s", flush=True)
            break
        try:
            cell = in_own_process(policy, n, batch, args)
        except BrokenProcessPool:
            print(f"{line}  its process died: out of memory?", flush=True)
            break
        if cell.seconds is None:
            print(f"{line}  left out: needs {cell.program_mb / 1e3:.3g} GB", flush=True)
            break
        found.append((n, cell))
        ms, us = 1e3 * cell.seconds, 1e6 * cell.seconds / (n * batch)
        print(
            f"{line} {ms:11.2f} {us:10.2f} {cell.program_mb:10.1f} {cell.peak_mb:9.0f}", flush=True
        )
    return found


def slopes(sizes: Sequence[int], values: Sequence[float]) -> str:
    """Say how values grow: over all sizes, and at the end."""
    return f"{power_law(sizes, values):.2f} ({power_law(sizes[-2:], values[-2:]):.2f} at the end)"


def main(args: Args) -> None:
    """Prints a table for every policy and batch."""
    print(HEAD)
    for batch in args.batch:
        for policy in args.policies:
            found = series(policy, batch, args)
            if len(found) > 1:
                sizes, cells = zip(*found, strict=True)
                times = slopes(sizes, [cell.seconds for cell in cells])
                memory = slopes(sizes, [cell.program_mb for cell in cells])
                print(f"  {policy}, batch {batch}: time ∝ N^{times}, memory ∝ N^{memory}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
