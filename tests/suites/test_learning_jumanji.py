"""A policy learns in every Jumanji suite, and one per way to decide where cells are seen."""

import pytest

TASKS = ("lbf/2s-8x8-2p-2f-coop", "rware/tiny-2ag", "connector/5x5x3a", "cleaner/5x5x2a")

NAMES = {"connector/5x5x3a": ["mam", "rec_mam", "sable", "mappo"]}


@pytest.mark.parametrize(
    ("task", "name"),
    [(task, name) for task in TASKS for name in NAMES.get(task, ["mam"])],
)
def test_two_updates(check_two_updates, task, name):
    check_two_updates(task, name)
