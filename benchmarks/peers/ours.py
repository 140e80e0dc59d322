"""This library's contender: whole train steps, or joint actions.

    python benchmarks/peers/ours.py 20 train --env rware/tiny-4ag --policy mat
    python benchmarks/peers/ours.py 20 train-plain …   # the same without native kernels
    python benchmarks/peers/ours.py 20 act mam 32

Seconds come first; then the options of `mam train`, or a policy and a number of agents.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext

import clock


def train(args: Sequence[str], seconds: float) -> None:
    """Time train steps of a run with the options of `mam train`."""
    import jax
    import numpy as np

    from mam.cli.main import read_options
    from mam.learning.normalise import as_normalised
    from mam.learning.train import make_train
    from mam.runs.process import configure

    configure(keep_programs=False)  # the time to the first update is one of the results
    config = read_options("train", args).config
    trainer = make_train(config)
    state = trainer.init(np.arange(1))
    network = as_normalised(state.policy).network
    parameters = sum(leaf.size for leaf in jax.tree.leaves(network))

    def step() -> None:
        nonlocal state
        state, values = trainer.train_step(state)
        jax.block_until_ready((state, values))

    readings = clock.sample(step, seconds)
    clock.report(readings, config.steps_per_update, parameters, ("jax", "multi-agent-mamba"))


def act(name: str, num_agents: int, seconds: float) -> None:
    """Time joint actions of 64 environments, as `mam bench act` does."""
    import jax

    from mam.config import NetworkConfig
    from mam.runs.process import configure
    from mam.study.bench.cases import cases
    from mam.study.bench.measure import Cell

    configure(keep_programs=False)
    case = cases()["act"]
    candidate = case.candidates[name](Cell(num_agents, case.batch or 0, NetworkConfig()))
    function = jax.jit(candidate.function)

    def step() -> None:
        jax.block_until_ready(function(*candidate.args))

    readings = clock.sample(step, seconds)
    packages = ("jax", "multi-agent-mamba")
    clock.report(readings, case.batch or 0, candidate.parameters or 0, packages)


def main(seconds: str, what: str, *args: str) -> None:
    """Time what the arguments say."""
    from mam.kernels.native.library import without_native

    with without_native() if what == "train-plain" else nullcontext():
        if what == "act":
            act(args[0], int(args[1]), float(seconds))
        else:
            train(args, float(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
