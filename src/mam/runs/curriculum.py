"""What trains at each stage of a curriculum, on the way to a run's own task."""

from dataclasses import replace

import equinox as eqx
import jax
import numpy as np

from mam.config import Config
from mam.envs.external.factories import with_options
from mam.errors import UserError
from mam.learning.experience import Environments, environments
from mam.learning.normalise import transfer_policy
from mam.learning.train import Trainer, TrainState, make_train
from mam.types import EnvSpec


def trainer_at(
    config: Config, stage: int, teacher: Config | None, before: Trainer | None = None
) -> Trainer:
    """Return what trains on the task of a stage, and evaluates on the run's.

    Args:
        config: of the run.
        stage: its place in `config.stages`.
        teacher: of the run, if it has one.
        before: what trained on another stage, whose environments of evaluation are used on.

    Raises:
        UserError: for a task that does not exist.
    """
    _, options = config.stages[stage]
    played = before.environments if before else None
    source = None
    if options:
        played = played or environments(config)
        task = replace(config, env=with_options(config.env, options))
        source = replace(environments(task), clock=played.clock)
    return make_train(config, source, teacher=teacher, played=played)


def carried_over(state: TrainState, trainer: Trainer, seeds: np.ndarray) -> TrainState:
    """Return the state of a stage as one of the next: all but the episodes, which start anew.

    Args:
        state: after the last update of the stage.
        trainer: of the next one.
        seeds: of the run.
    """
    fresh = trainer.init(seeds)
    # The same arrays in a policy for another number of agents.
    structure = jax.tree.structure(_without_episodes(fresh))
    kept = jax.tree.unflatten(structure, jax.tree.leaves(_without_episodes(state)))
    return replace(kept, actors=fresh.actors)


def _without_episodes(state: TrainState) -> TrainState:
    return eqx.tree_at(lambda s: s.actors, state, ())


def check_stages(config: Config, trainer: Trainer, teacher: Config | None) -> None:
    """Refuse what the weights of the first stage do not fit, before anything is trained.

    That is the task of another stage, or the run's own, which is evaluated.

    Args:
        config: of the run.
        trainer: of the first stage.
        teacher: of the run, if it has one.

    Raises:
        UserError: with the options, and what differs.
    """
    if not config.curriculum:
        return
    seeds = np.arange(config.num_seeds)
    first, spec = _without_episodes(trainer.shapes(seeds)), _spec(trainer)
    transfer_policy(first.policy, config.policy, spec, trainer.spec, config.network)
    for stage in range(1, len(config.stages)):
        other = trainer_at(config, stage, teacher, trainer)
        try:
            own = _spec(other)
            transfer_policy(first.policy, config.policy, spec, own, config.network)
            states = (first, _without_episodes(other.shapes(seeds)))
            sizes = [[x.shape for x in jax.tree.leaves(state)] for state in states]
            if sizes[0] != sizes[1]:
                raise UserError(
                    f"{own.name} cannot follow {spec.name}: their global states, whose statistics "
                    "are kept, are of other sizes"
                )
        finally:
            other.close_source()


def _spec(trainer: Trainer) -> EnvSpec:
    source = trainer.source
    return source.spec if isinstance(source, Environments) else trainer.spec
