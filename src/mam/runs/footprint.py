"""What a run will need, before it starts: XLA's own account of the compiled train step.

Memory is that of one device: the train state, which goes in and comes out, and what the step needs
besides. The allocator's own losses come on top, so a step that needs nearly all of a device may
still fail.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mam.config import Config
from mam.errors import RunError, UserError
from mam.learning.train import Trainer, TrainState, make_train
from mam.networks.policy import has_memory, sequence_length
from mam.runs.load import teacher_of
from mam.types import Keys, Observation, Policy, PolicyOutput

MEMORY_FRACTION = 0.9  # of a device's memory that may be planned for


@dataclass(frozen=True)
class Footprint:
    """Bytes on one device."""

    state: int
    temporary: int

    @property
    def total(self) -> int:
        """All that a train step holds at once; old and new state share memory where they can."""
        return self.state + self.temporary

    @staticmethod
    def of(compiled: Any) -> "Footprint":
        """Read the footprint of a compiled program, such as a train step."""
        memory = compiled.memory_analysis()
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return Footprint(memory.argument_size_in_bytes + max(new, 0), memory.temp_size_in_bytes)


@dataclass(frozen=True)
class Plan:
    """One way to run, as compiled."""

    changes: str  # of the options asked for
    num_agents: int
    footprint: Footprint  # of a train step
    acting: Footprint  # of one joint action in one environment
    compile_seconds: float  # of the train step


def device_memory() -> int:
    """Return the bytes of the first device: what JAX may use of a GPU, or the machine's memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    container = Path("/sys/fs/cgroup/memory.max")
    if container.exists() and (text := container.read_text().strip()).isdecimal():
        limits.append(int(text))
    return min(limits)


def plan(config: Config) -> Iterator[Plan]:
    """Compile the run; if it does not fit, with smaller minibatches and recomputed blocks.

    Raises:
        UserError: for a run with external environments: its train step is no single program.
    """
    room = MEMORY_FRACTION * device_memory()
    first = _compiled(config, "as asked for")
    yield first
    if first.footprint.total <= room:
        return
    yield from (_compiled(changed, words) for words, changed in _smaller(config))


def _smaller(config: Config) -> Iterator[tuple[str, Config]]:
    """List runs that need less memory, and how they differ, the mildest first."""
    ppo = config.ppo
    whole = has_memory(config.policy, config.network)
    num_sequences = config.steps_per_update // (sequence_length(config) if whole else 1)
    counts = [
        count for k in range(1, 5) if num_sequences % (count := ppo.num_minibatches * 2**k) == 0
    ]
    for count in counts:
        yield (
            f"--ppo.num-minibatches {count}",
            replace(config, ppo=replace(ppo, num_minibatches=count)),
        )
    if not config.network.remat and jax.default_backend() != "cpu":  # XLA's CPU compiler undoes it
        yield "--network.remat", replace(config, network=replace(config.network, remat=True))


def _compiled(config: Config, changes: str) -> Plan:
    trainer = make_train(config, teacher=teacher_of(config))
    try:
        if not isinstance(trainer.train_step, jax.stages.Wrapped):
            what = "learns from a dataset" if config.data else "is an external environment"
            raise UserError(
                f"{config.env} {what}: its memory is not that of one program, and is not planned"
            )
        seeds = np.arange(config.seed, config.seed + config.num_seeds)
        begun = time.perf_counter()
        state = trainer.shapes(seeds)
        compiled = trainer.train_step.lower(state).compile()
        seconds = time.perf_counter() - begun
        found = Footprint.of(compiled), _acting(state)
        return Plan(changes, trainer.spec.num_agents, *found, seconds)
    finally:
        trainer.close()


def _acting(state: TrainState) -> Footprint:
    """Return what one joint action in one environment needs, for shapes of a train state."""

    def act(policy: Policy, obs: Observation, key: Keys) -> PolicyOutput:
        return policy.act(policy.init_memory((1,)), obs, jnp.zeros(1, bool), key)[1]

    one_seed, one_env = (
        partial(
            jax.tree.map, lambda s, lead=lead: jax.ShapeDtypeStruct(lead + s.shape[1:], s.dtype)
        )
        for lead in ((), (1,))
    )
    policy, obs = one_seed((state.policy, state.actors.observation))
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    return Footprint.of(jax.jit(act).lower(policy, one_env(obs), key).compile())


def footprint(trainer: Trainer) -> str:
    """Say what a compiled trainer needs, in one line; "" if its train step is no single program."""
    if not isinstance(trainer.train_step, jax.stages.Compiled):
        return ""
    need, there = Footprint.of(trainer.train_step), device_memory()
    line = f"a train step needs {gigabytes(need.total)} of {gigabytes(there)}"
    return (
        line
        if need.total <= MEMORY_FRACTION * there
        else f"{line}: it may not fit. `mam plan` looks for settings that do"
    )


@contextmanager
def out_of_memory(config: Config) -> Iterator[None]:
    """Turn an out-of-memory error of the device into advice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        words = (
            " or ".join(words for words, _ in list(_smaller(config))[:1]) or "fewer --ppo.num-envs"
        )
        raise RunError(
            f"out of memory ({text.splitlines()[0]}): try {words}; "
            "`mam plan` with the same options says what fits"
        ) from error


def gigabytes(size: int) -> str:
    """Return a size to read, such as 512 MB or 1.25 GB."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
