"""Where time goes: parts within parts, and the file that keeps them."""

import itertools
import json
from contextlib import suppress
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.learning import stopwatch
from mam.learning.stopwatch import Stopwatch
from mam.runs.times import are_times, read_times, shares, write_times


@pytest.fixture(autouse=True)
def ticks(monkeypatch):
    """A clock that is one second later whenever it is looked at."""
    monkeypatch.setattr(
        stopwatch, "time", SimpleNamespace(perf_counter=itertools.count(0.0).__next__)
    )


def test_what_is_measured_within_a_part_counts_for_the_inner_one_alone():
    clock = Stopwatch()
    with clock.part("update"), suppress(KeyError), clock.part("acting"):
        with clock.part("environment"):
            pass
        with clock.part("environment"):
            raise KeyError
    assert clock.seconds == {"update": 2, "acting": 3, "environment": 2}


def test_compiling_is_apart_from_the_part_in_which_it_happens():
    clock, step = Stopwatch(), jax.jit(lambda x: jnp.cumsum(x) + 1)
    with clock.compiling_apart():
        step(np.zeros(3))  # of no part
        with clock.part("acting"):
            step(np.zeros(4))
        compiling = clock.seconds["compile"]
        with clock.part("acting"):
            step(np.zeros(4))
    step(np.zeros(5))
    assert clock.seconds["compile"] == compiling > 0
    assert sum(clock.seconds.values()) == pytest.approx(2)


def test_shares_begin_with_the_largest():
    assert (
        shares({"evaluation": 1.0, "environment": 3.0, "saving": 0.001})
        == "environment 75 %, evaluation 25 %"
    )
    assert shares({}) == shares({"compile": 0.0}) == ""


@pytest.mark.parametrize(
    "times", [[], {"other": 1.0}, {"update": "1"}, {"update": None}, {"update": 1}]
)
def test_a_file_of_another_kind_says_nothing(times, tmp_path):
    path = tmp_path / "times.json"
    assert read_times(path) == {}
    path.write_text(json.dumps(times))
    assert read_times(path) == {}
    assert not are_times(times)
    write_times(path, {"update": 1.5})
    assert read_times(path) == {"update": 1.5}
