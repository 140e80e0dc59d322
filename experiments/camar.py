"""32 agents in a crowd, each to its own goal: by steps and by wall-clock.

Sequence policies decide one after another and know where the others are about to go; independent
ones take more steps in the same time, and so get as many more. Three hours of one CPU core or more,
an estimate: it has not been run at this size.

mam experiment experiments/camar.py
mam report runs/camar --out report
"""

from mam.presets import preset
from mam.study.experiment.grid import grid

many = preset("camar")
runs = grid(many, policy=["mam", "mam2", "mat"], num_seeds=3)
runs += grid(many, policy=["mappo", "ippo"], num_seeds=3, total_timesteps=1_500_000)
