"""A policy learns in every Jumanji suite, and every policy where cells are seen."""

import pytest

from mam.networks.policy import policies

TASKS = ("lbf/2s-8x8-2p-2f-coop", "rware/tiny-2ag", "connector/5x5x3a", "cleaner/5x5x2a")

EVERY_POLICY = ("connector/5x5x3a",)
# Memory knows no task: one state-space memory and one GRU stand for all.
NAMES = [name for name in policies() if name[:4] != "rec_" or name in ("rec_mam", "rec_mappo")]


@pytest.mark.parametrize(
    ("task", "name"),
    [(task, name) for task in TASKS for name in (NAMES if task in EVERY_POLICY else ["mam"])],
)
def test_two_updates(check_two_updates, task, name):
    check_two_updates(task, name)
