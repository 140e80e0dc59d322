"""From 2 to 2048 agents: how speed and return go with their number. For a GPU.

Every task is the probe `identity` with that many agents: nothing else grows. From the project's
folder:

    mam experiment experiments/scaling.py
    mam report runs/scaling --out report

The report has return and speed of whole runs. What acting, the update and memory cost alone:

    mam bench act --num-agents 2 8 32 128 512 1024
    mam bench update --num-agents 2 8 32 128 512 1024
"""

from dataclasses import replace
from functools import partial

from mam.envs.probes import Identity
from mam.presets import preset
from mam.study.experiment.grid import grid

AGENTS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def make_env(num_agents: int) -> Identity:
    """The probe with more agents than it comes with."""
    return replace(Identity(), num_agents=num_agents)


for count in AGENTS:
    globals()[f"agents_{count}"] = partial(make_env, count)  # tasks are named module:function

runs = grid(
    preset("probe"),
    env=[f"experiments.scaling:agents_{count}" for count in AGENTS],
    policy=["mam", "mam2", "mat", "mappo"],
    agent_id="sinusoid",
    num_seeds=3,
    total_timesteps=200_000,
    **{"network.d_model": 64, "network.d_state": 16},
)
