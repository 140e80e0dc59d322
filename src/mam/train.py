"""A training run as functions: `init`, `train_step`, `evaluate_step`, `absolute_metric`.

Where the environments are JAX programs each of them is one pure, compiled program; where they live on the host
the same learner is driven by a loop.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from mam.advantages import Advantages, generalised_advantages, with_the_dead
from mam.config import Config
from mam.envs.registry import lives_on_host, make_batched, make_host
from mam.evaluate import evaluate
from mam.host import blank_actors, host_evaluate, host_rollout, make_act, seed_of, start_actors
from mam.networks.decode import Decoding
from mam.networks.policy import make_policy
from mam.rollout import Actors, init_actors, rollout
from mam.types import Environment, EnvSpec, HostEnvironments, Policy, Transition
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


Values = Mapping[str, Shaped[Array | np.ndarray, "..."]]  # metric → [seeds] or [seeds, episodes]


@dataclass(frozen=True)
class Trainer:
    """The functions of a run. Seed k's numbers are the same, up to rounding, whichever seeds are beside it.

    `init`, `train_step`, `evaluate_step` and `absolute_metric` are jitted, except with environments on the host,
    where the last three are loops around jitted functions.
    """

    spec: EnvSpec
    init: Callable[[Int[Array, "seeds"]], TrainState]
    train_step: Callable[[TrainState], tuple[TrainState, Values]]  # one rollout and the update on it
    evaluate_step: Callable[[TrainState], tuple[TrainState, Values]]  # current weights; remembers the best
    absolute_metric: Callable[[TrainState], Values]  # best weights, fresh episodes
    evaluate: Callable[..., Values]  # policies [seeds], keys [seeds], num_episodes, greedy → metrics
    env: Environment | HostEnvironments  # as played: one that does not reset itself, or all of them on the host
    close: Callable[[], None] = lambda: None  # ends what lives on the host

    def compile(self, state: TrainState) -> "Trainer":
        """The same with `train_step` and `evaluate_step` compiled ahead of their first call, where they can be."""

        def compiled(step: Callable) -> Callable:
            return step.lower(state).compile() if isinstance(step, jax.stages.Wrapped) else step

        return replace(self, train_step=compiled(self.train_step), evaluate_step=compiled(self.evaluate_step))


def make_train(config: Config) -> Trainer:
    """Builds the functions of a run; nothing is compiled, and no process started, before the first call.

    Raises:
        UserError: for a task or a policy that does not exist.
    """
    return _train_on_host(config) if lives_on_host(config.env) else _train_on_device(config)


@dataclass(frozen=True)
class Learner:
    """What training does besides acting, for one seed: the same wherever the environments live."""

    config: Config
    spec: EnvSpec

    @property
    def optimiser(self) -> optax.GradientTransformation:
        return make_optimiser(self.config.ppo)

    def init(self, seed: Int[Array, ""], start: Callable[[Policy, Key[Array, ""]], Actors]) -> TrainState:
        """A fresh state; `start` puts the actors in their places."""
        config, (policy_key, env_key, key) = self.config, jax.random.split(jax.random.key(seed), 3)
        decoding = Decoding(config.decode, config.decode_window, config.decode_max_passes)
        policy = make_policy(config.policy, self.spec, config.network, decoding, key=policy_key)
        return TrainState(
            policy=policy,
            opt_state=self.optimiser.init(cast(Any, policy)),
            actors=start(policy, env_key),
            best_policy=policy,
            best_return=jnp.array(-jnp.inf, jnp.float32),
            key=key,
            num_updates=jnp.zeros((), jnp.int32),
        )

    def learn(
        self, state: TrainState, actors: Actors, transitions: Transition, key: Key[Array, ""]
    ) -> tuple[TrainState, Values]:
        """Learns from a rollout [T, B, …] that ended with `actors`."""
        ppo = self.config.ppo
        # 1. Estimate advantages.
        advantages = self._advantages(state.policy, actors, transitions)
        # 2. Learn.
        if ppo.recompute_log_prob:
            transitions = self._reevaluated(state.policy, transitions)
        policy, opt_state, metrics = update(
            state.policy, state.opt_state, make_batch(transitions, advantages), key, self.optimiser, ppo
        )
        alive = transitions.observation.alive
        values = {
            **_update_values(metrics),
            **_episode_values(transitions),
            **{name: value.mean() for name, value in transitions.policy_metrics.items()},
            "explained_variance": _explained_variance(transitions.value, advantages.target, alive),
        }
        state = eqx.tree_at(
            lambda s: (s.policy, s.opt_state, s.actors, s.num_updates),
            state,
            (policy, opt_state, actors, state.num_updates + 1),
        )
        return state, values

    def _reevaluated(self, policy: Policy, transitions: Transition) -> Transition:
        """The rollout with log-probabilities as the learner computes them."""
        memory = jax.tree.map(lambda x: x[0], transitions.memory)
        evaluation = policy.evaluate(
            memory, transitions.observation, transitions.action, transitions.order, transitions.reset
        )
        return replace(transitions, log_prob=evaluation.log_prob)

    def _advantages(self, policy: Policy, actors: Actors, transitions: Transition) -> Advantages:
        """GAE. The true successors' values come from one pass over all of them, with the memory after each step."""
        next_memory = jax.tree.map(
            lambda before, last: jnp.concatenate([before[1:], last[None]]), transitions.memory, actors.memory
        )
        next_value = policy.value(next_memory, transitions.final_observation)
        alive, still_alive = transitions.observation.alive, transitions.final_observation.alive
        terminated, team_reward = transitions.terminated[..., None], self.spec.team_reward
        return generalised_advantages(
            transitions.reward,
            with_the_dead(transitions.value, alive, team_reward=team_reward),
            with_the_dead(next_value, still_alive, team_reward=team_reward),
            terminated if team_reward else terminated | ~still_alive,
            transitions.truncated[..., None],
            gamma=self.config.ppo.gamma,
            gae_lambda=self.config.ppo.gae_lambda,
        )

    def remember(self, state: TrainState, values: Values) -> TrainState:
        """Keeps the evaluated weights if none were better before."""
        mean_return = values["episode_return"].mean()
        better = mean_return >= state.best_return  # of equals the later: it has learned for longer
        best_policy = jax.tree.map(lambda new, old: jnp.where(better, new, old), state.policy, state.best_policy)
        best = (best_policy, jnp.where(better, mean_return, state.best_return))
        return eqx.tree_at(lambda s: (s.best_policy, s.best_return), state, best)


def _train_on_device(config: Config) -> Trainer:
    """Environments are pure functions: each step of the run is one program."""
    envs = make_batched(config.env, config.ppo.num_envs, config.agent_id)
    learner = Learner(config, envs.spec)

    def init(seed: Int[Array, ""]) -> TrainState:
        return learner.init(seed, lambda policy, key: init_actors(envs, policy, key))

    def train_step(state: TrainState) -> tuple[TrainState, Values]:
        rollout_key, update_key = jax.random.split(_stream(state, 0))
        actors, transitions = rollout(envs, state.policy, state.actors, rollout_key, config.ppo.rollout_length)
        return learner.learn(state, actors, transitions, update_key)

    def play(policy: Policy, key: Key[Array, ""], num_episodes: int, greedy: bool) -> Values:
        return evaluate(envs.env, policy, key, num_episodes, greedy=greedy)

    def evaluate_step(state: TrainState) -> tuple[TrainState, Values]:
        values = play(state.policy, _stream(state, 1), config.eval.num_episodes, config.eval.greedy)
        return learner.remember(state, values), values

    def absolute_metric(state: TrainState) -> Values:
        return play(state.best_policy, _stream(state, 2), config.eval.num_absolute_episodes, config.eval.greedy)

    return Trainer(
        spec=learner.spec,
        init=_one_after_the_other(init),
        train_step=jax.jit(jax.vmap(train_step), donate_argnums=0),
        evaluate_step=jax.jit(jax.vmap(evaluate_step)),
        absolute_metric=jax.jit(jax.vmap(absolute_metric)),
        evaluate=jax.jit(jax.vmap(play, in_axes=(0, 0, None, None)), static_argnums=(2, 3)),
        env=envs.env,
    )


def _train_on_host(config: Config) -> Trainer:
    """Environments are processes beside this one. A resumed run begins new episodes: theirs cannot be saved."""
    num_seeds, ppo, settings = config.num_seeds, config.ppo, config.eval
    per_round = min(settings.num_episodes, ppo.num_envs)

    def start(num_envs: int) -> HostEnvironments:
        return make_host(config.env, num_seeds * num_envs, config.agent_id, config.num_workers)

    played = start(per_round)  # where policies are evaluated
    running: list[HostEnvironments] = []  # where they learn, from the first step of training
    learner, act = Learner(config, played.spec), {greedy: make_act(greedy=greedy) for greedy in (False, True)}

    def init(seed: Int[Array, ""]) -> TrainState:
        return learner.init(seed, lambda policy, key: blank_actors(policy, played.spec, ppo.num_envs))

    learn = jax.jit(jax.vmap(learner.learn), donate_argnums=0)
    remember = jax.jit(jax.vmap(learner.remember))
    streams = jax.jit(jax.vmap(lambda state: [jax.random.split(_stream(state, s)) for s in range(3)]))

    def train_step(state: TrainState) -> tuple[TrainState, Values]:
        keys = streams(state)[0]
        actors = state.actors
        if not running:
            running.append(start(ppo.num_envs))
            actors, _ = start_actors(running[0], actors.memory, num_seeds, seed_of(keys))
        actors, transitions = host_rollout(running[0], act[False], state.policy, actors, keys[:, 0], ppo.rollout_length)
        return learn(state, actors, transitions, keys[:, 1])

    def play(policy: Policy, key: Key[Array, "seeds"], num_episodes: int, greedy: bool) -> Values:
        memory = jax.vmap(lambda policy: policy.init_memory((per_round,)))(policy)
        return host_evaluate(played, act[greedy], policy, memory, key, num_episodes)

    def evaluate_step(state: TrainState) -> tuple[TrainState, Values]:
        values = play(state.policy, streams(state)[1][:, 0], settings.num_episodes, settings.greedy)
        return remember(state, values), values

    def absolute_metric(state: TrainState) -> Values:
        key = streams(state)[2][:, 0]
        return play(state.best_policy, key, settings.num_absolute_episodes, settings.greedy)

    def close() -> None:
        for envs in (played, *running):
            envs.close()

    return Trainer(
        spec=learner.spec,
        init=_one_after_the_other(init),
        train_step=train_step,
        evaluate_step=evaluate_step,
        absolute_metric=absolute_metric,
        evaluate=play,
        env=played,
        close=close,
    )


def _one_after_the_other(init: Callable[[Int[Array, ""]], TrainState]) -> Callable:
    """Jits `init` for many seeds, without `vmap`.

    On CPU two batched QR factorisations (of orthogonal weights) at the same time wait for each other for ever:
    each holds a thread of XLA's pool while it waits for the pool to do its share (jaxlib 0.10.2, two cores).
    """
    return jax.jit(lambda seeds: jax.lax.map(init, seeds))


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


def _explained_variance(
    value: Float[Array, "*batch N"], target: Float[Array, "*batch N"], alive: Bool[Array, "*batch N"]
) -> Float[Array, ""]:
    """1 − Var(target − value) / Var(target) over the living: 1 is a perfect critic, 0 one that knows the mean only."""
    return 1.0 - jnp.var(target - value, where=alive) / (jnp.var(target, where=alive) + 1e-8)
