"""Run folders with made-up numbers, for tests of the report."""

import json

import numpy as np

from mam.config import Config, EvalConfig, PPOConfig, to_json

CONFIG = Config(
    env="lbf/small",
    num_seeds=5,
    total_timesteps=8 * 16,
    ppo=PPOConfig(num_envs=4, rollout_length=4),
    eval=EvalConfig(num_evaluations=4, num_episodes=3, num_absolute_episodes=5),
)


def write_run(
    path, config=CONFIG, quality=0.5, *, updates=None, seed=0, device="cpu: cpu", won=False
):
    """A run whose returns rise to about `quality`; stopped after some updates, finished if None."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(to_json(config)))
    (path / "versions.json").write_text(json.dumps({"device": device}))
    rng, total = np.random.default_rng(seed), config.num_updates
    rows = []

    def row(kind, update, num_episodes):
        level = quality * update / total + 0.1 * rng.normal(size=(config.num_seeds, 1))
        returns = level + 0.05 * rng.normal(size=(config.num_seeds, num_episodes))
        values = {"episode_return": returns.tolist()} | (
            {"won": (returns > 0.4).astype(float).tolist()} if won else {}
        )
        head = {"kind": kind, "update": update, "step_count": update * config.steps_per_update}
        rows.append(head | {"elapsed": 10.0 + 2 * update} | values)

    for update in range(1, (updates or total) + 1):
        row("train", update, 1)
        if config.evaluate_after(update):
            row("evaluation", update, config.eval.num_episodes)
    if updates is None:
        row("absolute", total, config.eval.num_absolute_episodes)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
