"""A long run: does its memory grow, does anything compile again, what does the guard cost?

    python soak/endurance.py     # 2,000 updates with saves and logs, then the guard's share

Memory is the resident set of the whole process, after a warm-up and at the end. Compilations are
counted by JAX. The guard's share is measured on `mam` with the sizes of the LBF preset: train steps
with and without its checks take turns.
"""

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from mam.config import CheckpointConfig, Config, EvalConfig, NetworkConfig, PPOConfig
from mam.learning import nonfinite as guard
from mam.learning import train, update
from mam.presets import preset_for
from mam.runs import loop as runs
from mam.runs import process as runtime
from mam.runs.sinks import JsonLines


@dataclass(frozen=True)
class Args:
    """How long."""

    updates: int = 2000
    warm_up: int = 200
    policy: str = "mam"
    guard_rounds: int = 15
    """Pairs of train steps that are compared; 0 leaves the guard out."""


def resident() -> float:
    """Megabytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this needs /proc")


def endure(args: Args) -> bool:
    """Whether memory grew by less than a hundredth and nothing compiled after the first update."""
    compiled, seen = [], {}
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: (
            compiled.append(name) if name.endswith("backend_compile_duration") else None
        )
    )
    write = JsonLines.write

    def watching(self, record):
        write(self, record)
        if record.kind == "train" and record.update in (args.warm_up, args.updates):
            seen[record.update] = (resident(), len(compiled))

    JsonLines.write = watching
    config = Config(
        policy=args.policy,
        env="probe/identity",
        total_timesteps=32 * args.updates,
        network=NetworkConfig(d_model=8, d_state=2),
        ppo=PPOConfig(num_envs=4, rollout_length=8, num_epochs=1, num_minibatches=1),
        eval=EvalConfig(
            num_evaluations=args.updates // 100, num_episodes=4, num_absolute_episodes=8
        ),
        checkpoint=CheckpointConfig(seconds=5.0),
    )
    with tempfile.TemporaryDirectory() as folder:
        runs.run(config, *runs.start(config, Path(folder) / "run"))
    JsonLines.write = write
    (before, programs), (after, programs_after) = seen[args.warm_up], seen[args.updates]
    growth = after / before - 1
    print(
        f"{args.updates} updates: {before:.1f} MB after {args.warm_up}, "
        f"{after:.1f} MB at the end ({growth:+.2%}); "
        f"{programs_after - programs} compilations in between"
    )
    return growth < 0.01 and programs_after == programs


def guard_share(rounds: int) -> None:
    """Prints the median over pairs of what the guard adds to a train step."""
    config = replace(preset_for(Config.env)[0], policy="mam")
    steps = {}
    for name in ("with", "without"):
        if name == "without":
            never = lambda *_: jnp.zeros((), bool)  # noqa: E731
            guard.is_nonfinite = update.is_nonfinite = never
            train.kept = lambda bad, old, new: new
        trainer = train.make_train(config)
        state = trainer.init(np.arange(1))
        steps[name] = [trainer.train_step, trainer.train_step(state)[0]]
    seconds = {"with": [], "without": []}
    for _ in range(rounds):
        for name, (step, state) in steps.items():
            begun = time.perf_counter()
            state, _ = jax.block_until_ready(step(state))
            seconds[name].append(time.perf_counter() - begun)
            steps[name][1] = state
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    best = {name: min(values) for name, values in seconds.items()}
    print(
        f"a train step takes {median['with']:.3f} s with the guard, "
        f"{median['without']:.3f} s without it "
        f"({median['with'] / median['without'] - 1:+.1%}; "
        f"of the fastest {best['with'] / best['without'] - 1:+.1%})"
    )


def main(args: Args) -> int:
    """Returns 1 if memory grew or something compiled again."""
    runtime.configure()
    well = endure(args)
    if args.guard_rounds:
        guard_share(args.guard_rounds)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
