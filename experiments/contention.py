"""Agents that must not get in each other's way: deciding in sequence beside deciding alone.

`probe/channels`: every agent takes one of its few channels and needs one that nobody else takes.
Independent policies take four times as many steps, in about the time of the others. An hour and a
half of one CPU core, an estimate: 32 agents have not been run at this size.

mam experiment experiments/contention.py
mam report runs/contention --out report
"""

from mam.presets import preset
from mam.study.experiment.grid import grid

runs = []
for task in ("probe/channels-16", "probe/channels-32"):
    base = preset(task)
    runs += grid(base, policy=["mam", "mam2", "mat"], num_seeds=3)
    runs += grid(base, policy=["mappo", "ippo"], num_seeds=3, total_timesteps=1_200_000)
