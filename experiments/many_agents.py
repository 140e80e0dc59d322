"""8, 32 and 128 agents that forage: sequence policies beside independent ones, by steps and time.

Independent policies take three to four steps in the time of one, and so get as many more: the
report draws returns against both. An update learns from as many agents' steps at each size. The
last runs learn with 8 agents and are evaluated with 128. Two hours and a half on two CPU cores.

mam experiment experiments/many_agents.py
mam report runs/many_agents --out report
"""

from dataclasses import replace

from mam.presets import preset
from mam.study.experiment.grid import grid

many = preset("lbf/auto")
runs = []
for agents, cells, steps, changes in (
    (8, 16, 400_000, {"ppo.num_envs": 64}),
    (32, 32, 200_000, {}),
    (128, 64, 60_000, {"ppo.num_envs": 64, "ppo.rollout_length": 16, "ppo.num_minibatches": 8}),
):
    changes |= {"env": f"lbf/auto:agents={agents},grid={cells}", "num_seeds": 3}
    runs += grid(many, policy=["mam", "mam2", "mat"], total_timesteps=steps, **changes)
    runs += grid(many, policy=["mappo", "ippo"], total_timesteps=steps * 7 // 2, **changes)

fewer = replace(
    many,
    env="lbf/auto:agents=128,grid=64",
    curriculum=("agents=8,grid=16",),
    num_seeds=3,
    ppo=replace(many.ppo, num_envs=64),
)
runs += grid(fewer, policy=["mam", "mat"], total_timesteps=400_000)
runs += grid(fewer, policy="ippo", total_timesteps=1_400_000)
