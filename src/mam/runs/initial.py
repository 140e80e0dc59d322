"""The weights of earlier runs that a run starts from: its own first ones, and its teacher's."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mam.config import Config
from mam.errors import UserError
from mam.learning.nonfinite import leaf_names
from mam.learning.normalise import as_normalised, rescaled, simplified
from mam.learning.train import Trainer, TrainState
from mam.networks.sequence import SequencePolicy
from mam.runs.load import Weights, load_weights
from mam.types import Policy

_CLOCK = r"\.memory\.dense\b"  # its weights, in a memory of the policy
_CRITIC = r"\b(tower|value_head)\."  # weights for values alone
_VALUES = r"\b(tower\.head|critic\.head|value_head)\.out\."  # the last of them
_SHOWN = 4  # names in a message


def started_from(config: Config, trainer: Trainer, tell: Callable[[str], None] = print) -> Trainer:
    """Return a trainer whose `init` takes the weights of the runs that the configuration names.

    Each seed starts from, and is taught by, the same seed of a run with as many, else the best one.
    A run that is resumed has its weights, and does not read the others again.

    Args:
        config: of the new run.
        trainer: of the new run.
        tell: called with a line about what is drawn anew, with `init_partial`.

    Raises:
        UserError: if there is no such run, or weights do not fit.
    """
    return _taught(config, _begun(config, trainer, tell))


def _taught(config: Config, trainer: Trainer) -> Trainer:
    """Return a trainer whose `init` takes the weights of the teacher, if there is one.

    A policy that is drawn at random also takes its units, of what is seen and of values.
    """
    if config.teacher is None:
        return trainer
    weights = load_weights(Path(config.teacher), named={"policy": config.policy})
    if weights.config.agent_id != config.agent_id:
        raise UserError(
            f"the teacher {config.teacher} sees --agent-id {weights.config.agent_id}: "
            f"take it, too, instead of {config.agent_id}"
        )
    teacher = weights.fitted(_by_seed(config, weights), trainer.spec)
    if config.distill.staged:
        _check_alike(config, trainer, teacher)

    def init(seeds: np.ndarray) -> TrainState:
        state = replace(trainer.init(seeds), teacher=_copied(teacher))
        if config.init is not None or config.learn != "distill":
            return state
        new, units = as_normalised(state.policy), as_normalised(teacher).statistics
        policy = simplified(replace(new, statistics=new.statistics.taken_from(units)))
        return _with_policy(state, _taken(policy, teacher) if config.distill.staged else policy)

    return replace(trainer, init=init)


def _check_alike(config: Config, trainer: Trainer, teacher: Policy) -> None:
    """Refuse a student whose blocks cannot be aligned with its teacher's, naming what differs."""
    shapes = trainer.shapes(np.zeros(config.num_seeds, np.int64)).policy
    student, other = as_normalised(shapes).network, as_normalised(teacher).network
    if not isinstance(student, SequencePolicy) or not isinstance(other, SequencePolicy):
        raise UserError("mixers are aligned between sequence policies: neither may be independent")
    sizes = [
        {
            "network.d_model": one.value_layer.weight.shape[-2],
            "the number of encoder blocks": len(one.encoder.blocks),
            "the number of decoder blocks": len(one.decoder.blocks),
        }
        for one in (student, other)
    ]
    unlike = [
        f"{name} is {own} instead of {sizes[1][name]}"
        for name, own in sizes[0].items()
        if own != sizes[1][name]
    ]
    left = _fitted(shapes, teacher)[1] if not unlike else []
    drawn = rf"\.(mixer|cross)\b|{_CLOCK}|{_CRITIC}"
    unlike += [name for name in left if not re.search(drawn, name)]
    if unlike:
        raise UserError(
            f"to be aligned with the teacher's, blocks must be as wide and as many: "
            f"{', '.join(unlike[:_SHOWN])}"
        )


def _by_seed(config: Config, weights: Weights) -> Policy:
    """Return an earlier policy for each seed of a run."""
    seeds = np.arange(config.num_seeds)
    if len(weights.best_return) != config.num_seeds:
        seeds = np.full(config.num_seeds, np.argmax(weights.best_return))
    return jax.tree.map(lambda x: jnp.asarray(x)[seeds], weights.policies)


def _begun(config: Config, trainer: Trainer, tell: Callable[[str], None]) -> Trainer:
    """Return a trainer whose `init` takes the policy of the run to start from, if there is one."""
    if config.init is None:
        return trainer
    policies = _by_seed(config, load_weights(Path(config.init), named={"policy": config.policy}))
    shapes = trainer.shapes(np.zeros(config.num_seeds, np.int64)).policy
    _, left = _fitted(shapes, policies)
    if left:
        names = ", ".join(left[:_SHOWN]) + f" and {len(left) - _SHOWN} more" * (len(left) > _SHOWN)
        if not config.init_partial:
            clock = any(re.search(_CLOCK, name) for name in left)
            without = ", --network.recurrence.clock off does without a clock" * clock
            raise UserError(
                f"the weights of {config.init} do not fit: {names}; "
                f"--init-partial takes the others{without}"
            )
        tell(f"not taken from {config.init}, but drawn: {names}")

    def init(seeds: np.ndarray) -> TrainState:
        state = trainer.init(seeds)
        return _with_policy(state, _taken(state.policy, policies))

    return replace(trainer, init=init)


def _fitted(new: Policy, old: Policy) -> tuple[Policy, list[str]]:
    """Return `new` with the arrays of `old` that fit, by place and shape, and the others' names.

    Args:
        new: arrays or shapes.
        old: of another task, of other sizes, or another policy.
    """
    new_whole, old_whole = as_normalised(new), as_normalised(old)
    found = {_place(path): x for path, x in jax.tree.leaves_with_path(old_whole)}
    leaves, structure = jax.tree.flatten(new_whole)
    places = [_place(path) for path, _ in jax.tree.leaves_with_path(new_whole)]
    fits = [
        place in found and found[place].shape == leaf.shape
        for place, leaf in zip(places, leaves, strict=True)
    ]
    # A count is worth something beside the mean that it is of only.
    drawn = {place for place, fit in zip(places, fits, strict=True) if not fit}
    fits = [
        fit and re.sub(r"\.count$", ".mean", place) not in drawn
        for place, fit in zip(places, fits, strict=True)
    ]
    taken = [
        jnp.asarray(found[place], leaf.dtype) if fit else leaf
        for place, leaf, fit in zip(places, leaves, fits, strict=True)
    ]
    names = leaf_names(new_whole, "")
    left = [name.strip() for name, fit in zip(names, fits, strict=True) if not fit]
    return simplified(jax.tree.unflatten(structure, taken)), left


def _place(path: jax.tree_util.KeyPath) -> str:
    """Name the place of a weight, of a memory whatever else is read beside it."""
    return re.sub(r"(\.memory)(\.recurrence)+", r"\1", jax.tree_util.keystr(path))


def _taken(new: Policy, old: Policy) -> Policy:
    """Return `new` with the arrays of `old` that fit, [seeds, …], and values that mean the same."""
    fitted, left = _fitted(new, old)
    taken, source = as_normalised(fitted), as_normalised(old)
    layer, its_layer = (getattr(one.network, "value_layer", None) for one in (taken, source))
    if layer is None or its_layer is None or any(re.search(_VALUES, name) for name in left):
        return simplified(taken)
    statistics, units = taken.statistics, source.statistics.values
    if units is None:
        return simplified(replace(taken, statistics=statistics.taken_from(source.statistics)))
    if statistics.values is not None:
        return simplified(taken)
    return simplified(
        replace(taken, network=jax.vmap(rescaled)(taken.network, units.deviation, units.mean))
    )


def _with_policy(state: TrainState, policy: Policy) -> TrainState:
    """Return a fresh state with another policy, which it starts from."""
    state = replace(state, policy=_copied(policy), best_policy=_copied(policy))
    if state.best_beside is not None:
        state = eqx.tree_at(lambda s: s.best_beside.policy, state, _copied(policy))
    return state if state.start is None else replace(state, start=_copied(policy))


def _copied(policy: Policy) -> Policy:
    """Return arrays of its own: a train step may be given all of the state."""
    return jax.tree.map(jnp.copy, policy)
