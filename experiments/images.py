"""What agents see as an image, read by convolutions and by scans with as many parameters.

Boards of 5 × 5 cells, and mazes of 10 × 10. The agents decide by themselves, so that nothing else
stands between an image and an action. Four runs of some minutes of a CPU core each, an estimate.

mam experiment experiments/images.py
mam report runs/images --out report
"""

from mam.config import Config, EvalConfig, NetworkConfig, PPOConfig
from mam.study.experiment.grid import grid

base = Config(
    policy="ippo",
    num_seeds=3,
    network=NetworkConfig(d_model=32, d_state=8),
    ppo=PPOConfig(lr=1e-3, num_envs=16, num_epochs=4, num_minibatches=4, max_grad_norm=0.5),
    eval=EvalConfig(num_evaluations=5, num_absolute_episodes=64, both_modes=False),
)
# Task, environment steps, and widths of cnn and scan2d at which policies are as large within 3 %.
TASKS = (("connector/5x5x3a", 30_000, 19, 16), ("cleaner/10x10x3a", 16_000, 16, 24))
runs = []
for task, steps, *widths in TASKS:
    for image, width in zip(("cnn", "scan2d"), widths, strict=True):
        network = {"network.image": image, "network.image_width": width}
        runs += grid(base, env=task, total_timesteps=steps, **network)
