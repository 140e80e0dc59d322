"""Timing, with programs that cost what they say and a clock that is theirs."""

import math

import pytest

from mam.study.bench.timing import (
    FEWEST_ROUNDS,
    MOST_ROUNDS,
    interleave,
    power_law,
    predict,
    rounds_for,
    single_calls,
    warm_up,
)


class World:
    """A clock that moves only while programs run, and the order in which they ran."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def clock(self):
        return self.now

    def program(self, name, *costs):
        """Costs so much at its calls, the last for ever after."""
        left = list(costs)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]
            self.calls.append(name)

        return run


def test_single_calls_are_a_sample_each_and_slow_ones_are_seen():
    world = World()
    costs = [0.001] * 197 + [0.5, 0.7, 0.9]
    runs = {"a": world.program("a", *costs), "b": world.program("b", 0.002)}
    timings = single_calls(runs, 200, clock=world.clock)
    assert world.calls == ["a", "b"] * 200
    assert timings["a"].median == pytest.approx(0.001)
    assert timings["a"].p99 == pytest.approx(0.5)
    assert timings["b"].p99 == pytest.approx(0.002)


def test_programs_take_turns_and_every_other_round_goes_backwards():
    world = World()
    runs = {name: world.program(name, 1.0) for name in "abc"}
    interleave(runs, dict.fromkeys(runs, 1.0), 3, world.clock)
    assert "".join(world.calls) == "abc" + "cba" + "abc"


def test_medians_and_minima_are_of_the_rounds():
    world = World()
    runs = {"a": world.program("a", 2.0, 9.0, 1.0, 3.0, 4.0), "b": world.program("b", 6.0)}
    timings = interleave(runs, {"a": 2.0, "b": 6.0}, 5, world.clock)
    assert (timings["a"].median, timings["a"].minimum) == (3.0, 1.0)
    assert timings["b"].median / timings["a"].median == 2.0
    assert len(timings["a"].samples) == 5


def test_short_programs_are_called_until_a_sample_is_long_enough():
    world = World()
    runs = {"short": world.program("short", 1e-5), "long": world.program("long", 0.1)}
    timings = interleave(runs, {"short": 1e-5, "long": 0.1}, 2, world.clock)
    assert world.calls.count("short") == 2 * 100
    assert world.calls.count("long") == 2
    assert timings["short"].median == pytest.approx(1e-5)


def test_warming_up_takes_the_second_call_unless_the_first_is_long():
    world = World()
    assert warm_up(world.program("short", 0.5, 0.2), world.clock) == pytest.approx(0.2)
    assert warm_up(world.program("long", 50.0, 2.0), world.clock) == pytest.approx(50.0)
    assert world.calls == ["short", "short", "long"]


def test_rounds_fit_into_a_few_seconds():
    assert rounds_for([100.0]) == FEWEST_ROUNDS
    assert rounds_for([1e-6]) == MOST_ROUNDS
    assert rounds_for([0.1, 0.14]) == 12
    assert rounds_for([]) == 0


def test_the_slope_is_the_power():
    sizes = [4, 16, 64]
    assert power_law(sizes, [3e-3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert power_law(sizes, [7.0] * 3) == pytest.approx(0.0, abs=1e-12)


def test_predictions_follow_the_last_two_sizes():
    assert predict([], 8) is None
    assert predict([(4, 2.0)], 8) == 2.0
    assert predict([(2, 5.0), (4, 1.0), (8, 4.0)], 16) == pytest.approx(16.0)
    assert predict([(4, 3.0), (8, 2.0)], 64) == 2.0, "times do not shrink"
    assert math.isfinite(predict([(1, 1e-6), (2, 1.0)], 4))
