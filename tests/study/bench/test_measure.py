"""The measuring loop, with candidates that return the seconds they are to have taken."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from mam.config import NetworkConfig
from mam.study.bench import measure as measuring
from mam.study.bench.measure import Candidate, Case, Cell, Limits, Skip, measure
from mam.study.bench.timing import Timing

LIMITS = Limits(
    rounds=4, max_seconds=50.0, max_memory=8.0
)  # 10 s a call, in four rounds and one to warm up


@pytest.fixture(autouse=True)
def seconds_as_returned(monkeypatch):
    def seconds(run):
        return float(run()[0])

    monkeypatch.setattr(measuring, "warm_up", seconds)
    monkeypatch.setattr(
        measuring,
        "interleave",
        lambda runs, estimates, rounds: {
            name: Timing((seconds(run),) * rounds) for name, run in runs.items()
        },
    )


def takes(seconds, cell, **options):
    """A candidate that takes so long, times N."""
    cost = jnp.float32(seconds * cell.num_agents)
    return Candidate(lambda cost: cost, (cost,), baseline="a", **options)


def stepwise(seconds, cell):
    """A step takes that long; what comes before takes as long as one."""
    return Candidate(
        lambda cost, n: cost * (1 + n), (jnp.float32(seconds),), baseline="a", steps=cell.num_agents
    )


def refuses(cell):
    raise Skip("made for others")


def rows_of(candidates, sizes=(4,), limits=LIMITS, **options):
    case = Case(
        {name: partial(build) for name, build in candidates.items()}, num_agents=sizes, **options
    )
    cells = [Cell(n, 2, NetworkConfig()) for n in sizes]
    return {
        (row.candidate, row.num_agents): row
        for row in measure("what", case, cells, list(candidates), limits)
    }


def test_ratios_are_to_the_baseline():
    rows = rows_of({"a": partial(takes, 0.5), "b": partial(takes, 1.0, parameters=7)})
    a, b = rows["a", 4], rows["b", 4]
    assert (a.median_ms, a.ratio, b.median_ms, b.min_ms, b.ratio) == (2e3, 1.0, 4e3, 4e3, 2.0)
    assert (b.what, b.batch, b.parameters, b.rounds, b.baseline, b.extrapolated) == (
        "what",
        2,
        7,
        4,
        "a",
        False,
    )
    assert b.device.startswith("cpu")
    assert rows_of({"b": partial(takes, 1.0)})["b", 4].ratio is None


def test_derived_columns_and_shares_of_parts():
    candidates = {
        "a": partial(takes, 1.0),
        "a/one": partial(takes, 0.5),
        "a/two": partial(takes, 0.2),
    }
    rows = rows_of(
        candidates, derived={"per_agent_us": lambda cell, seconds: seconds / cell.num_agents}
    )
    assert rows["a", 4].note == "one 50%, two 20%, rest 30%"
    assert rows["a/two", 4].ratio == pytest.approx(0.2)
    assert rows["a", 4].per_agent_us == 1.0


def test_what_is_left_out_says_why():
    rows = rows_of({"a": refuses, "b": partial(takes, 3.0), "c": partial(takes, 1.0)})
    assert rows["a", 4].note == "skipped: made for others"
    assert rows["b", 4].note == "skipped: takes 12 s a call: 5 calls exceed --max-seconds 50"
    assert rows["b", 4].median_ms is None
    assert rows["c", 4].median_ms == 4e3
    assert rows["c", 4].ratio is None, "the baseline was left out"


def test_a_candidate_predicted_to_be_slow_is_not_even_compiled():
    rows = rows_of({"a": partial(takes, 1.0)}, sizes=(2, 4, 16))
    assert rows["a", 4].median_ms == 4e3
    assert rows["a", 16].note == "skipped: predicted 16 s a call: 5 calls exceed --max-seconds 50"
    assert rows["a", 16].compile_s is None


def test_memory_has_a_limit():
    def hungry(cell):
        return Candidate(
            lambda x: jnp.tanh(jnp.sort(x @ x)[0, 0]), (jnp.ones((64, 64)),), baseline="a"
        )

    assert rows_of({"a": hungry})["a", 4].temp_mb > 0
    note = rows_of({"a": hungry}, limits=Limits(4, 50.0, 1e-9))["a", 4].note
    assert note.startswith("skipped: needs")
    assert note.endswith("over --max-memory 1e-09")


def test_a_candidate_that_fails_on_the_device_is_left_out(monkeypatch):
    def fails(run):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nallocator statistics")

    monkeypatch.setattr(measuring, "warm_up", fails)
    assert (
        rows_of({"a": partial(takes, 1.0)})["a", 4].note
        == "skipped: RESOURCE_EXHAUSTED: out of memory"
    )


def test_slow_steps_are_extrapolated_from_the_first_ones():
    rows = rows_of({"a": partial(stepwise, 0.125)}, sizes=(8, 64, 1024))
    assert not rows["a", 8].extrapolated
    assert not rows["a", 64].extrapolated
    assert rows["a", 64].median_ms == 0.125e3 * 65
    assert rows["a", 1024].extrapolated
    assert rows["a", 1024].median_ms == pytest.approx(0.125e3 * 1025)
    assert rows["a", 1024].note == "extrapolated from 16 of 1024 steps"
