"""A policy learns in every JaxMARL suite.

Every policy does so with masks, deaths and a global state; of continuous actions, which contracts
try with every policy, there is one policy per way to decide.
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

# Memory knows no task: one state-space memory and one GRU stand for all.
NAMES = {
    "smax/2s3z": [
        name for name in policies() if name[:4] != "rec_" or name in ("rec_mam", "rec_mappo")
    ],
    "mabrax/hopper_3x1": ["mam", "sable", "mappo"],
}


@pytest.mark.parametrize(
    ("task", "name"),
    [(task, name) for task in TASKS for name in NAMES.get(task, ["mam"])],
)
def test_two_updates(check_two_updates, task, name):
    check_two_updates(task, name)
