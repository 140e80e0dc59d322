"""A training run as pure functions: `init`, `train_step`, `evaluate_step`, `absolute_metric`, one program each."""

from dataclasses import dataclass
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from mam.advantages import generalised_advantages
from mam.config import Config
from mam.envs.registry import make_batched
from mam.evaluate import evaluate
from mam.networks.policy import make_policy
from mam.rollout import Actors, init_actors, rollout
from mam.types import Environment, Policy, Transition
from mam.update import UpdateMetrics, make_batch, make_optimiser, update


class TrainState(eqx.Module):
    """Everything a run needs to go on exactly as if it had never stopped; one leading axis of seeds."""

    policy: Policy
    opt_state: optax.OptState
    actors: Actors
    best_policy: Policy  # with the highest mean return of all evaluations so far
    best_return: Float[Array, "*seeds"]
    key: Key[Array, "*seeds"]
    num_updates: Int[Array, "*seeds"]


Values = dict[str, Float[Array, "..."]]  # metric → [seeds] or [seeds, episodes]


@dataclass(frozen=True)
class Trainer:
    """The jitted functions of a run. Seed k's numbers are the same, up to rounding, whichever seeds are beside it."""

    env: Environment  # one, as evaluated: it reports its episodes' statistics and does not reset itself
    init: jax.stages.Wrapped  # seeds [seeds] → TrainState
    train_step: jax.stages.Wrapped  # TrainState → TrainState, Values: one rollout and the update on it
    evaluate_step: jax.stages.Wrapped  # TrainState → TrainState, Values: current weights; remembers the best
    absolute_metric: jax.stages.Wrapped  # TrainState → Values: best weights, fresh episodes


def make_train(config: Config) -> Trainer:
    """Builds the functions of a run; nothing is compiled before the first call.

    Raises:
        UserError: for a task or a policy that does not exist.
    """
    env = make_batched(config.env, config.ppo.num_envs)
    optimiser = make_optimiser(config.ppo)

    def init(seed: Int[Array, ""]) -> TrainState:
        policy_key, env_key, key = jax.random.split(jax.random.key(seed), 3)
        policy = make_policy(config.policy, env.spec, config.network, key=policy_key)
        return TrainState(
            policy=policy,
            opt_state=optimiser.init(cast(Any, policy)),
            actors=init_actors(env, policy, env_key),
            best_policy=policy,
            best_return=jnp.array(-jnp.inf, jnp.float32),
            key=key,
            num_updates=jnp.zeros((), jnp.int32),
        )

    def train_step(state: TrainState) -> tuple[TrainState, Values]:
        rollout_key, update_key = jax.random.split(_stream(state, 0))
        # 1. Act.
        actors, transitions = rollout(env, state.policy, state.actors, rollout_key, config.ppo.rollout_length)
        # 2. Estimate advantages. The true successors' values come from one pass over all of them.
        next_value = state.policy.value(transitions.memory, transitions.final_observation)
        advantages = generalised_advantages(
            transitions.reward,
            transitions.value,
            next_value,
            transitions.terminated[..., None],
            transitions.truncated[..., None],
            gamma=config.ppo.gamma,
            gae_lambda=config.ppo.gae_lambda,
        )
        # 3. Learn.
        policy, opt_state, metrics = update(
            state.policy, state.opt_state, make_batch(transitions, advantages), update_key, optimiser, config.ppo
        )
        values = _update_values(metrics) | _episode_values(transitions)
        values["explained_variance"] = _explained_variance(transitions.value, advantages.target)
        state = eqx.tree_at(
            lambda s: (s.policy, s.opt_state, s.actors, s.num_updates),
            state,
            (policy, opt_state, actors, state.num_updates + 1),
        )
        return state, values

    def play(policy: Policy, key: Key[Array, ""], num_episodes: int) -> Values:
        return evaluate(env.env, policy, key, num_episodes, greedy=config.eval.greedy)

    def evaluate_step(state: TrainState) -> tuple[TrainState, Values]:
        values = play(state.policy, _stream(state, 1), config.eval.num_episodes)
        mean_return = values["episode_return"].mean()
        better = mean_return >= state.best_return  # of equals the later: it has learned for longer
        best_policy = jax.tree.map(lambda new, old: jnp.where(better, new, old), state.policy, state.best_policy)
        best = (best_policy, jnp.where(better, mean_return, state.best_return))
        return eqx.tree_at(lambda s: (s.best_policy, s.best_return), state, best), values

    def absolute_metric(state: TrainState) -> Values:
        return play(state.best_policy, _stream(state, 2), config.eval.num_absolute_episodes)

    return Trainer(
        env=env.env,
        init=jax.jit(jax.vmap(init)),
        train_step=jax.jit(jax.vmap(train_step), donate_argnums=0),
        evaluate_step=jax.jit(jax.vmap(evaluate_step)),
        absolute_metric=jax.jit(jax.vmap(absolute_metric)),
    )


def _stream(state: TrainState, stream: int) -> Key[Array, ""]:
    """The key for one use (0 training, 1 evaluation, 2 absolute metric) at this update.

    Evaluating draws nothing from training's stream, so how often a run is evaluated does not change it.
    """
    return jax.random.fold_in(jax.random.fold_in(state.key, stream), state.num_updates)


def _update_values(metrics: UpdateMetrics) -> Values:
    losses = {name: getattr(metrics.losses, name) for name in metrics.losses.__dataclass_fields__}
    return losses | {"grad_norm": metrics.grad_norm, "first_ratio_deviation": metrics.first_ratio_deviation}


def _episode_values(transitions: Transition) -> Values:
    """Means of the environment's metrics over the episodes that ended in this rollout; NaN if none did."""
    ended = transitions.terminated | transitions.truncated
    count = ended.sum()
    values = {name: jnp.sum(jnp.where(ended, x, 0.0)) / count for name, x in transitions.metrics.items()}
    return values | {"num_episodes": count}


def _explained_variance(value: Float[Array, "*batch"], target: Float[Array, "*batch"]) -> Float[Array, ""]:
    """1 − Var(target − value) / Var(target): 1 is a perfect critic, 0 one that knows the mean only."""
    return 1.0 - jnp.var(target - value) / (jnp.var(target) + 1e-8)
