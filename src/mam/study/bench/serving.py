"""Candidates of `mam bench serve`: one joint action as `mam.load` makes it, and as exports do."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mam.config import Config
from mam.deploy.example import Policy
from mam.deploy.formats import WRITERS
from mam.deploy.program import Program
from mam.errors import UserError
from mam.learning.train import init_policy
from mam.study.bench.inputs import count, synthetic_task
from mam.study.bench.measure import Candidate, Cell, Skip

SERVED = ("mam", "mat", "ippo")
RUNTIMES = ("jit", "stablehlo", "onnx")


@cache
def _policy(name: str, cell: Cell) -> tuple[Config, Any, Any]:
    config = Config(name, agent_id="none", network=cell.network)
    spec = synthetic_task(cell.num_agents)
    init = jax.jit(lambda key: init_policy(config, spec, key=key))
    return config, spec, init(jax.random.key(0))


def served(name: str, runtime: str, cell: Cell) -> Candidate:
    """Build one joint action per environment, in the form that a runtime is called in.

    Arrays come from the host and actions go back to it, as they do when somebody asks for them.

    Args:
        name: of the policy.
        runtime: what runs it.
        cell: the sizes.

    Raises:
        Skip: where the runtime is not installed.
    """
    config, spec, policy = _policy(name, cell)
    program = Program.of(config, spec, policy)
    rng = np.random.default_rng(0)
    arrays = {port.name: _draw(rng, port.struct(cell.batch)) for port in program.inputs}
    shared: dict[str, Any] = {"baseline": f"{name}/jit", "parameters": count(policy)}
    if runtime == "jit":
        # As it was trained to decide, with the kernels of the machine: exports go in whole passes.
        acting = Program(policy, spec, program.ids, program.inputs, program.outputs, program.memory)
        compiled = jax.jit(lambda *arrays: acting(*arrays))
        given = tuple(arrays.values())
        return Candidate(lambda: jax.device_get(compiled(*given)), (), ready=True, **shared)
    with tempfile.TemporaryDirectory() as folder:
        try:
            card = {"format": runtime, **WRITERS[runtime](program, Path(folder))}
            (Path(folder) / "card.json").write_text(json.dumps(card))
            run = Policy(folder).run
        except (ImportError, UserError) as error:
            raise Skip(str(error)) from error
    return Candidate(lambda: run(arrays), (), ready=True, **shared)


def _draw(rng: np.random.Generator, like: jax.ShapeDtypeStruct) -> np.ndarray:
    """Draw what agents see and the noise; every action is legal, and all are alive."""
    if like.dtype == np.bool_:
        return np.ones(like.shape, bool)
    return rng.normal(size=like.shape).astype(like.dtype)
