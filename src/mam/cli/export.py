"""`mam export RUN`: a policy for other runtimes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Export:
    """Write a run's policy as a program for ONNX Runtime or JAX, checked, with an example."""

    run: tyro.conf.Positional[Path]
    """Folder of the run or of an exported policy, or zoo:NAME (see `mam zoo`)."""
    format: Literal["onnx", "stablehlo", "safetensors"] = "onnx"
    """onnx: for onnxruntime, without JAX. stablehlo: for jax.export, on CPU, CUDA and TPU.
    safetensors: the weights alone, for `mam.load`."""
    out: Path | None = None
    """Folder to make; RUN/export-FORMAT if None."""
    env: str | None = None
    """Task to export for in place of the run's own: with another number of agents, say."""
    policy_seed: int | None = None
    """Which of the run's seeds; the one with the best evaluation if None."""
    seed: int = 0
    """Decides the episodes that the export is checked on."""
    trust: bool = False
    """Import the environment that the folder names, where that is code, without naming
    it as --env."""


def export(args: Export) -> None:
    """Export a policy, and say what was checked."""
    from mam.deploy.export import export as write
    from mam.envs.external.factories import agreed_task
    from mam.runs import process
    from mam.runs.load import load, saved_config
    from mam.runs.zoo import beside

    process.configure()
    agreed_task(saved_config(args.run), args.env, trust=args.trust)
    policy = load(args.run, policy_seed=args.policy_seed, trust=args.trust)
    out = args.out or beside(args.run, f"export-{args.format}")
    found = write(policy, out, args.format, env=args.env, seed=args.seed)
    print(f"seed {policy.policy_seed} is in {out}: {found}")
