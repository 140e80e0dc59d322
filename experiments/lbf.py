"""Level-Based Foraging on CPU cores: the smallest tasks, five seeds, a million steps with small networks.

Two learning rates each; `encoder.combine=product` is MAM with its published encoder.

mam experiment experiments/lbf.py
mam report runs/lbf --out report
"""

from mam.experiment import grid
from mam.presets import preset

runs = [
    run
    for settings in (
        {"policy": "mam"},
        {"policy": "mam", "network.encoder.combine": "product"},
        {"policy": "mat"},
        {"policy": "mappo"},
    )
    for run in grid(
        preset("lbf/2s-8x8-2p-2f-coop"),
        env=["lbf/2s-10x10-3p-3f", "lbf/2s-8x8-2p-2f-coop", "lbf/8x8-2p-2f-coop"],
        num_seeds=5,
        total_timesteps=1_000_000,
        **settings,
        **{"ppo.lr": [1e-3, 2e-3]},
    )
]
