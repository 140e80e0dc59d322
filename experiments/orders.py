"""In which order 32 foragers are read and decide, and what an encoder sees of its neighbours.

Orders by place put foragers next to each other that are; several shifted curves and a branch along
the curve let more neighbours meet. One setting in turn beside `index`, five seeds, half of the
preset's steps. Half an hour of one CPU core.

mam experiment experiments/orders.py
mam report runs/orders --out report
"""

from mam.presets import preset
from mam.study.experiment.grid import grid

many = preset("lbf/auto")
runs = []
for changes in (
    {"network.order": "index"},
    {"network.order": "random"},
    {"network.order": "hilbert"},
    {"network.order": "hilbert", "network.encoder.order_scans": 3},
    {"network.order": "hilbert", "network.encoder.local_branch": 5},
):
    changes["network.recurrence.clock"] = "off"  # as it was measured
    runs += grid(many, num_seeds=5, total_timesteps=100_000, **changes)
