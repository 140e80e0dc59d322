"""A policy learns in every JaxMARL suite.

Every policy does so with masks, deaths and a global state, and with continuous actions.
"""

import pytest

from mam.networks.policy import policies

pytestmark = pytest.mark.filterwarnings(
    "ignore:Accessing `.*` directly from `Data`:DeprecationWarning"
)  # brax's own

TASKS = (
    "smax/2s3z",
    "mpe/simple_spread_3",
    "mabrax/hopper_3x1",
    "overcooked/cramped_room",
    "hanabi/2p",
)

EVERY_POLICY = ("smax/2s3z", "mabrax/hopper_3x1")
# Memory knows no task: one state-space memory and one GRU stand for all.
NAMES = [name for name in policies() if name[:4] != "rec_" or name in ("rec_mam", "rec_mappo")]


@pytest.mark.parametrize(
    ("task", "name"),
    [(task, name) for task in TASKS for name in (NAMES if task in EVERY_POLICY else ["mam"])],
)
def test_two_updates(check_two_updates, task, name):
    check_two_updates(task, name)
