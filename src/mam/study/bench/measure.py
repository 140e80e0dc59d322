"""The measuring loop of every bench: compiles a cell's candidates and times them in turn."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mam.config import NetworkConfig
from mam.study.bench.results import Row
from mam.study.bench.timing import (
    FEWEST_ROUNDS,
    Run,
    interleave,
    predict,
    rounds_for,
    single_calls,
    warm_up,
)

PREFIX = 16  # steps after which a candidate that goes step by step is judged


@dataclass(frozen=True)
class Cell:
    """One size at which candidates meet."""

    num_agents: int
    batch: int
    network: NetworkConfig


class Skip(Exception):
    """Why a candidate takes no part in a cell."""


@dataclass(frozen=True)
class Candidate:
    """A program to be timed at one size."""

    function: Callable[..., Any]  # compiled
    args: tuple[Any, ...]  # what it is called with
    baseline: str  # the candidate whose time is 1
    parameters: int | None = None
    # Of one length, if it takes steps; how many is then its last argument, not in `args`.
    steps: int | None = None
    ready: bool = False  # compiled by itself, or no program of JAX
    note: str = ""


@dataclass(frozen=True)
class Case:
    """A comparison: candidates by name, and the sizes at which they meet.

    A candidate called `whole/part` is a part of `whole`, where that is measured too.
    """

    candidates: Mapping[str, Callable[[Cell], Candidate]]  # builds it for a cell, or raises Skip
    num_agents: tuple[int, ...]
    tokens: int | None = None  # agents in all environments together; decides the batch
    batch: int | None = None  # environments
    calls: int | None = None  # single ones, if what counts is how long somebody waits for each
    # Column → its value from a cell and seconds.
    derived: Mapping[str, Callable[[Cell, float], float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """Limits on what may be spent on one candidate in one cell."""

    rounds: int | None  # as many as take a few seconds if None
    max_seconds: float
    max_memory: float  # GB, 10^9 bytes

    def check_time(self, seconds: float, what: str) -> None:
        """Raise Skip if so long a call cannot be repeated often enough."""
        if seconds * self.repeats > self.max_seconds:
            raise Skip(
                f"{what} {seconds:.2g} s a call: "
                f"{self.repeats} calls exceed --max-seconds {self.max_seconds:g}"
            )

    @property
    def repeats(self) -> int:
        """The fewest calls a measurement takes, warming up included."""
        return 1 + (self.rounds or FEWEST_ROUNDS)


@dataclass(frozen=True)
class _Program:
    """A candidate compiled and warmed up."""

    candidate: Candidate
    run: Run
    estimate: float  # seconds `run` takes
    scale: float  # from `run` to a whole call; 1 if it is one
    compile_s: float
    temp_mb: float | None

    @property
    def note(self) -> str:
        """The parts that a time was made of."""
        return (
            f"extrapolated from {PREFIX} of {self.candidate.steps} steps"
            if self.scale != 1.0
            else ""
        )


def measure(
    what: str,
    case: Case,
    cells: Sequence[Cell],
    names: Sequence[str],
    limits: Limits,
    *,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Time the named candidates in every cell.

    Args:
        what: name of the bench.
        case: what is compared.
        cells: the sizes, fewest agents first.
        names: of the candidates.
        limits: what to leave out.
        tell: called with what is being compiled, and with "" before anything is timed.

    Yields:
        Rows, cell by cell, one for every name: what is left out has a note in place of times.
    """
    history: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    for cell in cells:
        programs: dict[str, _Program] = {}
        skipped: dict[str, str] = {}
        for name in names:
            tell(f"N = {cell.num_agents}: compiling {name}")
            try:
                candidate = case.candidates[name](cell)
                programs[name] = _prepare(
                    candidate, limits, predict(history[name], cell.num_agents)
                )
            except Skip as reason:
                skipped[name] = f"skipped: {reason}"
        tell("")  # whatever moves on a screen takes time from what is timed
        results = _time(case, cell, programs, limits.rounds)
        for name in names:
            measured = results.get(name) or {"note": skipped[name]}
            yield Row(
                what,
                name,
                cell.num_agents,
                cell.batch,
                device=_device(),
                jax=jax.__version__,
                **measured,
            )
            if name in results:
                history[name].append((cell.num_agents, measured["median_ms"] / 1e3))


def _device() -> str:
    device = jax.devices()[0]
    return " ".join(dict.fromkeys((device.platform, device.device_kind)))


def _time(
    case: Case, cell: Cell, programs: Mapping[str, _Program], rounds: int | None
) -> dict[str, dict[str, Any]]:
    """Measure the columns of each of the programs of a cell."""
    estimates = {name: program.estimate for name, program in programs.items()}
    runs = {name: program.run for name, program in programs.items()}
    if case.calls:
        rounds = rounds or case.calls
        timings = single_calls(runs, rounds)
    else:
        rounds = rounds or rounds_for(list(estimates.values()))
        timings = interleave(runs, estimates, rounds)
    medians = {name: timing.median * programs[name].scale for name, timing in timings.items()}
    return {
        name: {
            "median_ms": 1e3 * medians[name],
            "min_ms": 1e3 * timings[name].minimum * program.scale,
            "p99_ms": 1e3 * timings[name].p99 if case.calls else None,
            "baseline": program.candidate.baseline,
            "ratio": medians[name] / medians[base]
            if (base := program.candidate.baseline) in medians
            else None,
            "temp_mb": program.temp_mb,
            "parameters": program.candidate.parameters,
            "compile_s": program.compile_s,
            "rounds": rounds,
            "extrapolated": program.scale != 1.0,
            "note": " · ".join(
                filter(None, (program.candidate.note, program.note, _shares(name, medians)))
            ),
        }
        | {column: derive(cell, medians[name]) for column, derive in case.derived.items()}
        for name, program in programs.items()
    }


def _shares(whole: str, medians: Mapping[str, float]) -> str:
    """Say what the parts of a candidate take of its time, each measured on its own."""
    parts = {name: seconds for name, seconds in medians.items() if name.startswith(f"{whole}/")}
    shares = {name.partition("/")[2]: seconds / medians[whole] for name, seconds in parts.items()}
    if shares:
        shares["rest"] = 1 - sum(shares.values())
    return ", ".join(f"{part} {share:.0%}" for part, share in shares.items())


def _prepare(candidate: Candidate, limits: Limits, predicted: float | None) -> _Program:
    """Compile a candidate and call it once or twice; raise Skip where it exceeds a limit."""
    if predicted is not None and candidate.steps is None:
        limits.check_time(predicted, "predicted")
    if candidate.ready:
        start = time.perf_counter()
        candidate.function(*candidate.args)  # compiles
        compile_s = time.perf_counter() - start

        def ready(steps: int | None) -> Run:
            return lambda: candidate.function(*candidate.args)

        return _Program(candidate, *_warm_up(ready, None, limits), compile_s, None)
    args = candidate.args if candidate.steps is None else (*candidate.args, jnp.int32(0))
    # Flat lists go in and come out: it takes a tenth of a millisecond to take a policy apart.
    leaves, structure = jax.tree.flatten(args)

    def flat(leaves: list[Array]) -> list[Array]:
        return jax.tree.leaves(candidate.function(*jax.tree.unflatten(structure, leaves)))

    try:
        start = time.perf_counter()
        compiled = jax.jit(flat).lower(leaves).compile()
        compile_s = time.perf_counter() - start
        memory = compiled.memory_analysis()
        temp_mb = None if memory is None else memory.temp_size_in_bytes / 1e6
        if temp_mb is not None and temp_mb > 1e3 * limits.max_memory:
            raise Skip(
                f"needs {temp_mb / 1e3:.3g} GB of temporary memory, "
                f"over --max-memory {limits.max_memory:g}"
            )

        def call(steps: int | None) -> Run:
            inputs = leaves if steps is None else [*leaves[:-1], jnp.int32(steps)]
            return lambda: jax.block_until_ready(compiled(inputs))

        return _Program(candidate, *_warm_up(call, candidate.steps, limits), compile_s, temp_mb)
    except jax.errors.JaxRuntimeError as error:  # out of memory, above all
        raise Skip(str(error).partition("\n")[0]) from error


def _warm_up(
    call: Callable[[int | None], Run], steps: int | None, limits: Limits
) -> tuple[Run, float, float]:
    """Return what to run in the rounds, its seconds, and the factor from there to a whole call.

    Where there are steps, and all of them would take too long, only the first few are run.
    """
    taken = None if steps is None else min(PREFIX, steps)
    run, scale = call(taken), 1.0
    estimate = warm_up(run)
    if steps is not None and taken is not None:
        # What comes before the steps counts as one: it takes no longer, so nothing is overstated.
        scale = (steps + 1) / (taken + 1)
        if estimate * scale * limits.repeats <= limits.max_seconds:
            run, estimate, scale = call(steps), estimate * scale, 1.0
    limits.check_time(estimate, "takes")
    return run, estimate, scale
