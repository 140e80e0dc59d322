"""Transformers taught to Mamba-2 and Mamba in 2 to 8 % of their steps: an hour or two on a CPU.

Arms at equal steps: actions alone (kd), after hidden states (23), after matrices and hidden states
(123), and PPO from scratch. Teachers are the first of the runs, and have to be finished before the
others start: one at a time, as is the default. That of rware is a policy of the zoo, which took
five million steps.

mam experiment experiments/distill.py
mam report runs/distill --by distill.matrix_updates distill.hidden_updates --out report
"""

from mam.study.experiment.grid import grid

LBF, SPREAD, RWARE = "lbf/2s-8x8-2p-2f-coop", "mpe/simple_spread_3", "rware/tiny-4ag"
TEACHERS = {LBF: 1_000_000, SPREAD: 500_000}  # environment steps
STEPS = {LBF: 40_960, SPREAD: 40_960, RWARE: 102_400}  # of a student
SMALL = {"network.d_model": 32, "network.num_blocks": 1, "network.d_state": 8, "ppo.lr": 1e-3}
OWN = {
    LBF: {},  # its preset
    SPREAD: SMALL,
    RWARE: {
        "network.d_model": 64,
        "network.num_blocks": 1,
        "ppo.lr": 7e-4,
        "eval.num_evaluations": 10,  # of episodes of 500 steps
        "eval.both_modes": False,
    },
}
STAGES = {"kd": (0.0, 0.0), "23": (0.0, 0.2), "123": (0.2, 0.2)}  # shares of a student's updates
ROLLOUT = 16  # steps of 64 environments

runs = []
for task, steps in TEACHERS.items():
    runs += grid(env=task, policy="mat", num_seeds=5, total_timesteps=steps, **OWN[task])
for task, steps in STEPS.items():
    student = {
        "env": task,
        "policy": ["mam2", "mam"],
        "num_seeds": 3 if task == RWARE else 5,
        "total_timesteps": steps,
        "ppo.rollout_length": ROLLOUT,
        "eval.num_evaluations": 20,
        **OWN[task],
    }
    updates = steps // (64 * ROLLOUT)
    for arm, (matrices, hidden) in STAGES.items():
        distilled = grid(
            **student,
            learn="distill",
            teacher="zoo:rware/tiny-4ag/mat" if task == RWARE else f"runs/distill/{task}/mat",
            **{
                "ppo.num_epochs": 8,
                "distill.matrix_updates": round(matrices * updates),
                "distill.hidden_updates": round(hidden * updates),
            },
        )
        runs += [(f"{name},arm={arm}", config) for name, config in distilled]
    runs += grid(**student)
