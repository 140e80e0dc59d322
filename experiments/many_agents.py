"""32 agents that forage: sequence policies beside independent ones, by steps and by wall-clock.

Independent policies take three to four steps in the time of one, and so get as many more: the
report draws returns against both. An hour and a half on two CPU cores.

mam experiment experiments/many_agents.py
mam report runs/many_agents --out report
"""

from mam.presets import preset
from mam.study.experiment.grid import grid

many = preset("lbf/auto")
runs = grid(many, policy=["mam", "mam2", "mat"], num_seeds=3)
runs += grid(many, policy=["mappo", "ippo"], num_seeds=3, total_timesteps=700_000)
