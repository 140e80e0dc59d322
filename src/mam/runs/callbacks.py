"""Callbacks of a run that was started from Python."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mam.learning.train import TrainState


@dataclass(frozen=True)
class Event:
    """An update or an evaluation that just ended."""

    update: int  # updates done
    step_count: int  # environment steps done, per seed
    # Name → [num_seeds], of an evaluation [num_seeds, num_episodes]
    metrics: Mapping[str, np.ndarray]
    state: TrainState  # its arrays are gone after the next update: copy what is to be kept
    log: Callable[[str], None]  # prints a line above the progress bar
    stop: Callable[[], None]  # ends the run, saved, before its next step


class Callback:
    """Methods that are called as a run goes on; subclasses write those that they need.

    Either may return True to end the run, saved, as a signal would. What one raises ends it, too:
    saved, and raised on.
    """

    def on_update(self, event: Event) -> bool | None:
        """Take note of an update: losses, and the episodes that ended in its rollout."""

    def on_evaluation(self, event: Event) -> bool | None:
        """Take note of an evaluation: its episodes, in each mode that is played."""
