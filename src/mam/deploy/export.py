"""A trained policy as a folder that others can run: program, card, recorded steps, an example.

<out>/card.json          what goes in and comes out, where it is from, what it was checked on
<out>/policy.onnx        or policy.stablehlo, or neither
<out>/weights.safetensors  the weights by name, which `mam.load` reads
<out>/recorded.npz       steps of the environment, and what the policy did
<out>/example.py         plays them, with nothing but the runtime
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np

from mam.config import to_json
from mam.deploy.formats import WRITERS
from mam.deploy.program import Port, Program
from mam.deploy.record import few_environments, record
from mam.errors import RunError, UserError
from mam.learning.normalise import as_normalised, transfer_policy
from mam.runs.load import CARD, LoadedPolicy, load, read_weights, write_weights
from mam.types import ExportablePolicy, Policy

Format = Literal["onnx", "stablehlo", "safetensors"]
# Packages that the example must do without.
_ABSENT = {"onnx": ("mam", "jax", "equinox"), "stablehlo": ("mam", "equinox", "optax")}


def export(
    loaded: LoadedPolicy,
    out: Path,
    kind: Format,
    *,
    env: str | None = None,
    seed: int = 0,
) -> str:
    """Write a policy to a new folder and check it there; return what the check found.

    Args:
        loaded: the policy.
        out: folder to make.
        kind: format of the program.
        env: task to export for, such as one with more agents; the run's own if None.
        seed: decides the episodes that are recorded.

    Raises:
        UserError: if the folder exists, or the policy does not fit the task or the format.
        RunError: if the exported program does something else than the policy.
    """
    config = replace(
        loaded.config, env=env or loaded.config.env, seed=loaded.policy_seed, num_seeds=1
    )
    with few_environments(config) as source, _new_folder(out) as folder:
        policy, spec = cast(ExportablePolicy, loaded.policy), source.spec
        if spec != loaded.spec:
            fitted = transfer_policy(policy, config.policy, loaded.spec, spec, config.network)
            policy = cast(ExportablePolicy, fitted)
        card = {"format": kind, **loaded.metadata, "task": config.env}
        card |= {"spec": to_json(spec), "config": to_json(config)}
        write_weights(policy, folder)
        if kind == "safetensors":
            _write_card(folder, card)
            return _compare(policy, load(folder, trust=True).policy)
        if not isinstance(as_normalised(policy).network, ExportablePolicy):
            raise UserError(f"{config.policy} has no act_on_noise, of which a program is made")
        program = Program.of(config, spec, policy)
        card |= WRITERS[kind](program, folder)
        card |= {"inputs": _ports(program, program.inputs)}
        card |= {"outputs": _ports(program, program.outputs)}
        arrays: dict[str, Any] = record(source, policy, seed)
        count = int(np.prod(arrays["reset"].shape))
        tolerance = {"action_tolerance": 1e-5 if spec.continuous else 0}
        _write_card(folder, card | {"verified": {"joint_actions": count} | tolerance})
        np.savez_compressed(folder / "recorded.npz", **arrays)
        shutil.copy(Path(__file__).with_name("example.py"), folder)
        return verify(folder, kind)


def import_weights(file: Path, like: LoadedPolicy, out: Path) -> str:
    """Write weights by name as a policy that plays, with the sizes of another; return their number.

    Args:
        file: safetensors.
        like: a policy of the same settings and sizes.
        out: folder to make.

    Raises:
        UserError: if the folder exists, or the weights are not of such a policy.
    """
    config = replace(like.config, seed=like.policy_seed, num_seeds=1)
    policy = read_weights(file, config, like.spec)
    card = {"format": "safetensors", **like.metadata, "scores": {}, "imported": file.name}
    card |= {"spec": to_json(like.spec), "config": to_json(config)}
    with _new_folder(out) as folder:
        write_weights(policy, folder)
        _write_card(folder, card)
        return _compare(policy, load(folder, trust=True).policy)


def _write_card(folder: Path, card: dict[str, Any]) -> None:
    (folder / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")


def _compare(policy: Policy, read: Policy) -> str:
    """Say that all weights were read again; see `export`."""
    one, other = jax.tree.leaves(policy), jax.tree.leaves(read)
    if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, other, strict=True)):
        raise RunError("the export was not kept: its weights are not those of the policy")
    return f"{len(one)} arrays, read back equal"


def _ports(program: Program, ports: tuple[Port, ...]) -> list[dict[str, Any]]:
    first = len(ports) - program.num_remembered
    return [
        {"name": p.name, "shape": p.shape, "dtype": p.dtype, "about": p.about, "memory": k >= first}
        for k, p in enumerate(ports)
    ]


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Make a folder, which is there afterwards only if nothing went wrong."""
    if out.exists():
        raise UserError(f"{out} exists: choose another --out")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def verify(folder: Path, kind: Format) -> str:
    """Run the example of an export in a process without this library; return what it says.

    Raises:
        RunError: if it fails, or an action or log-probability is another.
    """
    absent = ", ".join(f"{name}=None" for name in _ABSENT[kind])
    code = (
        f"import runpy, sys; sys.modules.update(dict({absent})); "
        "runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(folder / "example.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        told = (done.stdout + done.stderr).strip().splitlines()
        raise RunError(f"the export was not kept, its example fails: {told[-1] if told else ''}")
    return done.stdout.strip()
