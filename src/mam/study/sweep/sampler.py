"""What a sweep tries next: Optuna's tree-structured Parzen estimator, but nothing twice."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial


class Untried(TPESampler):
    """A sampler of combinations that no other trial has: the same settings would give the same run.

    Args:
        space: values of each setting.
        seed: of everything random.
        n_startup_trials: trials at random before the estimator decides.
    """

    def __init__(self, space: Mapping[str, Sequence[Any]], *, seed: int, n_startup_trials: int):
        super().__init__(seed=seed, n_startup_trials=n_startup_trials)
        self._values = {name: tuple(values) for name, values in space.items()}
        self._random = random.Random(seed)

    @property
    def num_combinations(self) -> int:
        """The number of combinations."""
        return math.prod(map(len, self._values.values()))

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return all settings, so that they are decided on together."""
        return {name: CategoricalDistribution(values) for name, values in self._values.items()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Sample each setting by itself from the estimator; at random where that was tried."""
        tried = {
            self._combination(other.params)
            for other in study.get_trials(deepcopy=False)
            if other != trial
        }
        chosen = {
            name: self.sample_independent(study, trial, name, kind)
            for name, kind in search_space.items()
        }
        while self._combination(chosen) in tried and len(tried) < self.num_combinations:
            chosen = {name: self._random.choice(values) for name, values in self._values.items()}
        return chosen

    def _combination(self, params: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(params.get(name) for name in self._values)
