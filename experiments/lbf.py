"""Level-Based Foraging on CPU cores: the smallest tasks, five seeds, half a million steps with small networks.

mam experiment experiments/lbf.py
mam report runs/lbf --out report
"""

from mam.experiment import grid
from mam.presets import preset

runs = grid(
    preset("lbf/2s-8x8-2p-2f-coop"),
    env=["lbf/2s-8x8-2p-2f-coop", "lbf/8x8-2p-2f-coop", "lbf/2s-10x10-3p-3f"],
    policy=["mam", "mat", "mappo"],
    num_seeds=5,
)
