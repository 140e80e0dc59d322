"""JaxMARL's contender: whole train steps of its recurrent MAPPO on SMAX.

    python benchmarks/peers/jaxmarl_peer.py 20 CHECKOUT

In an environment with JaxMARL's packages, given a checkout of it. Its training is one program that
calls the logger after every update: the logger here looks at the clock.
"""

import importlib
import os
import sys
from types import SimpleNamespace

import clock

UPDATES = 5  # of which the first compiles


def main(seconds: str, checkout: str) -> None:
    """Time updates with the settings that it comes with."""
    sys.path[:0] = [checkout, os.path.join(checkout, "baselines/MAPPO")]
    readings: list[clock.Reading] = []

    def log(metrics: dict) -> None:
        readings.append(clock.now())
        if len(readings) == 1:
            clock.tell(first=True)

    sys.modules["wandb"] = SimpleNamespace(log=log)  # type: ignore[assignment]
    import jax
    import yaml

    path = os.path.join(checkout, "baselines/MAPPO/config/mappo_homogenous_rnn_smax.yaml")
    with open(path, encoding="utf-8") as file:
        config = yaml.safe_load(file)
    env_steps = config["NUM_ENVS"] * config["NUM_STEPS"]
    config["TOTAL_TIMESTEPS"] = UPDATES * env_steps
    baseline = importlib.import_module("mappo_rnn_smax")
    result = jax.jit(baseline.make_train(config))(jax.random.PRNGKey(0))
    trained = result["runner_state"][0][0]
    jax.effects_barrier()
    parameters = sum(leaf.size for state in trained for leaf in jax.tree.leaves(state.params))
    clock.report(readings, env_steps, parameters, ("jax", "flax"))


if __name__ == "__main__":
    main(*sys.argv[1:])
