"""What normalising costs: whole train steps with it on and off, in turn within one process.

    python benchmarks/normalisation_cost.py --policies mam ippo --env lbf/2s-8x8-2p-2f-coop

On is the default, running statistics of observations and values; off is
`--network.observation-norm layer --ppo.no-normalise-value`. Whatever slows the machine for a while
slows both, so the ratio is what counts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import numpy as np
import tyro

from mam.config import Config
from mam.learning.train import make_train
from mam.presets import preset_for
from mam.runs.process import configure
from mam.study.bench.timing import interleave, warm_up


@dataclass(frozen=True)
class Args:
    """What to time."""

    policies: tuple[str, ...] = ("mam", "ippo")
    env: str = "lbf/2s-8x8-2p-2f-coop"
    """Task, with the settings of its preset."""
    rounds: int = 15
    """Train steps of each, after those that compile and warm up."""


def stepping(config: Config) -> Callable[[], object]:
    """Return what takes a train step, waits for it, and goes on from there the next time."""
    trainer = make_train(config)
    state = trainer.init(np.arange(config.num_seeds))

    def step() -> None:
        nonlocal state
        state, values = trainer.train_step(state)
        jax.block_until_ready((state, values))

    return step


def main(args: Args) -> None:
    """Print steps per second, and how much longer a step takes with normalisation."""
    configure()
    base, _ = preset_for(args.env)
    for policy in args.policies:
        on = replace(base, env=args.env, policy=policy)
        off = replace(
            on,
            network=replace(on.network, observation_norm="layer"),
            ppo=replace(on.ppo, normalise_value=False),
        )
        runs = {"on": stepping(on), "off": stepping(off)}
        for compile_step in runs.values():
            compile_step()
        estimates = {name: warm_up(run) for name, run in runs.items()}
        timings = interleave(runs, estimates, args.rounds)
        on_s, off_s = (np.array(timings[name].samples) for name in ("on", "off"))
        low, high = np.quantile(on_s / off_s, [0.25, 0.75])
        speeds = ", ".join(
            f"{name} {on.steps_per_update / timing.median:,.0f} steps/s"
            for name, timing in timings.items()
        )
        print(
            f"{policy} on {args.env}: {speeds}; a step takes "
            f"{timings['on'].median / timings['off'].median:.3f} times as long with it "
            f"(of pairs in turn {low:.3f} to {high:.3f}), {args.rounds} rounds",
            flush=True,
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
