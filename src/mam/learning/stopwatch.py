"""Where wall-clock time goes: seconds by part."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import jax

Part = Literal[
    "environment",  # steps of a simulator, of the rollouts to learn from
    "acting",  # the policy's part in these rollouts
    "update",  # learning from them
    "train step",  # all three, where the environment is part of the same program
    "evaluation",
    "compile",
    "saving",
    "logging",
]
_COMPILING = tuple(
    f"/jax/core/compile/{step}_duration"
    for step in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)


class Stopwatch:
    """Seconds by the part of a run they went into.

    What is measured within a part counts for the inner part alone. It reads the clock and waits for
    nothing: time that a device works counts where its results are first needed.

    Attributes:
        seconds: of each part so far, without the one that goes on.
    """

    def __init__(self):
        self.seconds: dict[Part, float] = {}
        self._part: Part | None = None
        self._since = 0.0

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Count what happens inside as this part."""
        outer = self._part
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    @contextmanager
    def compiling_apart(self) -> Iterator[None]:
        """Count as "compile" the time that JAX spends on it, in any part."""

        def listen(event: str, duration_secs: float, **_: Any) -> None:
            if event in _COMPILING and self._part:
                self._since += duration_secs
                self._add("compile", duration_secs)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    def _switch(self, part: Part | None) -> None:
        now = time.perf_counter()
        if self._part:
            self._add(self._part, now - self._since)
        self._part, self._since = part, now

    def _add(self, part: Part, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds
