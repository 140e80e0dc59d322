"""Imitation of our own experts by mam and mat: twenty minutes per run on a CPU core.

LBF (choices), simple_spread (real numbers) and PettingZoo's simple_spread, which JAX does not step.
Experts come first, and what they do is recorded:

mam record zoo:lbf/2s-8x8-2p-2f-coop/mam --episodes 1000 --out data/lbf
SMALL="--network.d-model 32 --network.num-blocks 1 --network.d-state 8 --ppo.lr 1e-3"
mam train --env mpe/simple_spread_3 $SMALL --total-timesteps 500000 --out runs/experts/spread
mam record runs/experts/spread --episodes 1000 --out data/spread
SPREAD=pettingzoo/mpe2:simple_spread_v3
mam train --env $SPREAD $SMALL --total-timesteps 500000 --out runs/experts/pettingzoo
mam record runs/experts/pettingzoo --env $SPREAD --episodes 1000 --out data/pettingzoo
mam experiment experiments/imitate.py
mam report runs/imitate --out report
"""

from mam.study.experiment.grid import grid

DATA = {
    "lbf/2s-8x8-2p-2f-coop": "data/lbf",
    "mpe/simple_spread_3": "data/spread",
    "pettingzoo/mpe2:simple_spread_v3": "data/pettingzoo",
}

runs = []
for env, data in DATA.items():
    runs += grid(
        env=env,
        policy=["mam", "mat"],
        learn="bc",
        data=data,
        num_seeds=5,
        total_timesteps=204_800,
        **{
            "network.d_model": 32,
            "network.num_blocks": 1,
            "network.d_state": 8,
            "ppo.lr": 1e-3,
            "ppo.rollout_length": 32,  # of 64 environments: 100 updates
            "ppo.num_minibatches": 4,
            "eval.num_evaluations": 4,
            "eval.num_episodes": 64,
            "eval.both_modes": False,
        },
    )
