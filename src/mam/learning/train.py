"""A training run as functions: `init`, `train_step`, `evaluate_step`, `absolute_metric`.

Where the environments are JAX programs each of them is one pure, compiled program; where they live on the host
the same learner is driven by a loop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from mam.config import Config
from mam.envs.registry import lives_on_host, make_batched, make_host
from mam.envs.wrappers import AutoReset
from mam.errors import UserError
from mam.learning.advantages import Advantages, constant_value, generalised_advantages, with_the_dead
from mam.learning.evaluate import evaluate
from mam.learning.external import aligned, blank_actors, host_evaluate, host_rollout, seed_of, start_actors, take_infos
from mam.learning.nonfinite import FINE, ROLLOUT_NAMES, bad_in_rollout, bad_leaves, first_bad, kept, leaf_names
from mam.learning.normalise import NormalisedPolicy, Statistics, as_normalised, simplified
from mam.learning.rollout import Actors, init_actors, rollout
from mam.learning.sharding import AXIS, WHOLE, Devices, Shard
from mam.learning.update import UpdateMetrics, make_batch, make_optimiser, update, update_names
from mam.networks.decoding.decide import Decoding
from mam.networks.mixers.roles import largest_step_size
from mam.networks.policy import make_policy
from mam.types import Environment, EnvSpec, HostEnvironments, Policy, Transition

P = jax.P


class Best(eqx.Module):
    """The weights whose evaluation had the highest mean return so far."""

    policy: Policy
    mean_return: Float[Array, "*seeds"]


class TrainState(eqx.Module):
    """Everything a run needs to go on exactly as if it had never stopped; one leading axis of seeds."""

    policy: Policy
    opt_state: optax.OptState
    actors: Actors
    best_policy: Policy  # with the highest mean return of all evaluations so far
    best_return: Float[Array, "*seeds"]
    best_beside: Best | None  # in the mode that is played beside the one that counts, if it is
    key: Key[Array, "*seeds"]
    num_updates: Int[Array, "*seeds"]

    def best(self, *, beside: bool) -> Best:
        """The best weights in the mode that counts, or in the one beside it, as far as that was played."""
        if beside and self.best_beside is not None:
            return self.best_beside
        return Best(self.best_policy, self.best_return)


NON_FINITE = "non_finite"  # the value that says which of `watched` went bad first
Values = Mapping[str, Shaped[Array | np.ndarray, "..."]]  # metric → [seeds] or [seeds, episodes]


@dataclass(frozen=True)
class Trainer:
    """The functions of a run. Seed k's numbers are the same, up to rounding, whichever seeds are beside it.

    `init`, `train_step`, `evaluate_step` and `absolute_metric` are jitted, except with environments on the host,
    where the last three are loops around jitted functions.
    """

    spec: EnvSpec
    init: Callable[[Int[Array | np.ndarray, "seeds"]], TrainState]
    train_step: Callable[[TrainState], tuple[TrainState, Values]]  # one rollout and the update on it
    evaluate_step: Callable[[TrainState], tuple[TrainState, Values]]  # current weights; remembers the best
    absolute_metric: Callable[[TrainState], Values]  # best weights, fresh episodes
    evaluate: Callable[..., Values]  # policies [seeds], keys [seeds], num_episodes, greedy → metrics
    shapes: Callable[[Int[Array | np.ndarray, "seeds"]], TrainState]  # of what `init` returns, and where its arrays lie
    env: Environment | HostEnvironments  # as played: one that does not reset itself, or all of them on the host
    devices: Devices
    close: Callable[[], None] = lambda: None  # ends what lives on the host

    def first_bad(self, state: TrainState, values: Values) -> dict[int, str]:
        """What was the first array with a number that is not finite in a train step, for each seed that had one."""
        bad = {seed: int(index) for seed, index in enumerate(np.asarray(values[NON_FINITE])) if index != FINE}
        names = watched(state.policy) if bad else []
        return {seed: names[index] for seed, index in bad.items()}

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


def watched(policy: Policy) -> list[str]:
    """Everything in a train step that has to be finite, in the order in which it is computed."""
    whole = as_normalised(policy)
    parameters, statistics = leaf_names(whole.network, "parameter"), leaf_names(whole.statistics, "statistics of")
    return [*parameters, *ROLLOUT_NAMES, *statistics, *update_names(whole.network)]


def init_policy(config: Config, spec: EnvSpec, *, key: Key[Array, ""]) -> Policy:
    """Draw the first weights of a run's policy; what it decides depends on nothing else of the environment."""
    decoding = Decoding(config.decode, config.decode_window, config.decode_max_passes)
    network = make_policy(config.policy, spec, config.network, decoding, key=key)
    return with_statistics(network, config, spec)


def with_statistics(network: Policy, config: Config, spec: EnvSpec) -> Policy:
    """Return a network with the normalisation that the configuration asks for."""
    running, values = config.network.observation_norm == "running", config.ppo.normalise_value
    statistics = Statistics.init(spec, observations=running, values=values)
    return simplified(NormalisedPolicy(network, statistics))


@dataclass(frozen=True)
class Learner:
    """What training does besides acting, for one seed: the same wherever the environments live."""

    config: Config
    spec: EnvSpec
    shard: Shard = WHOLE

    @property
    def optimiser(self) -> optax.GradientTransformation:
        return make_optimiser(self.config.ppo)

    def init(self, seed: Int[Array, ""], start: Callable[[Policy, Key[Array, ""]], Actors]) -> TrainState:
        """A fresh state; `start` puts the actors in their places."""
        config, (policy_key, env_key, key) = self.config, jax.random.split(jax.random.key(seed), 3)
        policy = init_policy(config, self.spec, key=policy_key)
        never = jnp.array(-jnp.inf, jnp.float32)
        return TrainState(
            policy=policy,
            opt_state=self.optimiser.init(cast(Any, as_normalised(policy).network)),
            actors=start(policy, env_key),
            best_policy=policy,
            best_return=never,
            best_beside=Best(policy, never) if config.eval.both_modes else None,
            key=key,
            num_updates=jnp.zeros((), jnp.int32),
        )

    def learn(
        self, state: TrainState, actors: Actors, transitions: Transition, key: Key[Array, ""]
    ) -> tuple[TrainState, Values]:
        """Learns from a rollout [T, B, …] that ended with `actors`."""
        ppo, shard = self.config.ppo, self.shard
        policy = as_normalised(state.policy)
        flags = [*bad_leaves(policy.network), *bad_in_rollout(transitions)]
        # 1. Estimate advantages, in units of reward.
        transitions, next_value = self._with_values(policy, actors, transitions)
        advantages = self._advantages(actors, transitions, next_value)
        # 2. Take into the statistics what was seen, from the next rollout on, and what is to be predicted, at once.
        policy = policy.update_values(advantages.target, transitions.observation.alive, shard)
        statistics = policy.statistics.update(transitions.observation, shard)
        flags += bad_leaves(statistics)
        bad = first_bad(flags, shard)
        # 3. Learn, in the network's units.
        scaled = policy.normalise(transitions)
        if ppo.recompute_log_prob:
            scaled = self._reevaluated(policy.network, scaled)
        batch = make_batch(scaled, replace(advantages, target=policy.normalise_value(advantages.target)), shard)
        lr_scale = 1 - state.num_updates / self.config.num_updates if ppo.anneal_lr else 1.0
        network, opt_state, metrics = update(
            policy.network, state.opt_state, batch, key, self.optimiser, ppo, shard, lr_scale
        )
        # 4. What one watches.
        alive, value, target = shard.gather((transitions.observation.alive, transitions.value, advantages.target), 1)
        in_update = jnp.where(metrics.bad == FINE, FINE, len(flags) + metrics.bad)
        values = {
            **_update_values(metrics),
            **_episode_values(transitions, shard),
            **{name: x.mean() for name, x in shard.gather(transitions.policy_metrics, 1).items()},
            "explained_variance": _explained_variance(value, target, alive),
            "learning_rate": optax.tree.get(opt_state, "learning_rate") * lr_scale,
            NON_FINITE: jnp.where(bad == FINE, in_update, bad),
        }
        if (step_size := largest_step_size(network)) is not None:
            values["step_size_max"] = step_size
        state = eqx.tree_at(
            lambda s: (s.policy, s.opt_state, s.actors, s.num_updates),
            state,
            (simplified(NormalisedPolicy(network, statistics)), opt_state, actors, state.num_updates + 1),
        )
        return state, values

    def _reevaluated(self, policy: Policy, transitions: Transition) -> Transition:
        """The rollout with log-probabilities as the learner computes them."""
        memory = jax.tree.map(lambda x: x[0], transitions.memory)
        evaluation = policy.evaluate(
            memory, transitions.observation, transitions.action, transitions.order, transitions.reset
        )
        return replace(transitions, log_prob=evaluation.log_prob)

    def _with_values(
        self, policy: NormalisedPolicy, actors: Actors, transitions: Transition
    ) -> tuple[Transition, Float[Array, "T B N"]]:
        """The rollout and the true successors' values, from one pass over all of them with the memory after each step.

        Values that are normalised start, at the first rollout, as the best constant.
        """
        next_memory = jax.tree.map(
            lambda before, last: jnp.concatenate([before[1:], last[None]]), transitions.memory, actors.memory
        )
        next_value = policy.value(next_memory, transitions.final_observation)
        if policy.statistics.values is None:
            return transitions, next_value
        alive, gamma = transitions.observation.alive, self.config.ppo.gamma
        start = constant_value(transitions.reward, self._terminated(transitions), alive, gamma=gamma, shard=self.shard)
        known = policy.statistics.values.count > 0
        value, next_value = (jnp.where(known, x, start) for x in (transitions.value, next_value))
        return replace(transitions, value=value), next_value

    def _terminated(self, transitions: Transition) -> Bool[Array, "T B #N"]:
        """For whom the action was the last: death ends one's own reward, not a team's."""
        terminated = transitions.terminated[..., None]
        return terminated if self.spec.team_reward else terminated | ~transitions.final_observation.alive

    def _advantages(self, actors: Actors, transitions: Transition, next_value: Float[Array, "T B N"]) -> Advantages:
        """GAE, in which the dead's values are replaced."""
        alive, still_alive = transitions.observation.alive, transitions.final_observation.alive
        goes_on = jnp.concatenate([alive[1:], actors.observation.alive[None]])  # who was not truncated alone
        team_reward = self.spec.team_reward
        return generalised_advantages(
            transitions.reward,
            with_the_dead(transitions.value, alive, team_reward=team_reward),
            with_the_dead(next_value, still_alive, team_reward=team_reward),
            self._terminated(transitions),
            transitions.truncated[..., None] | (still_alive & ~goes_on),
            gamma=self.config.ppo.gamma,
            gae_lambda=self.config.ppo.gae_lambda,
        )

    def remember(self, state: TrainState, values: Values) -> TrainState:
        """Keeps the evaluated weights if none were better before, for each mode that was played."""

        def better(best: Best, returns: Any) -> Best:
            mean_return = returns.mean(dtype=best.mean_return.dtype)
            is_better = mean_return >= best.mean_return  # of equals the later: it has learned for longer
            new = Best(state.policy, mean_return)
            return jax.tree.map(lambda new, old: jnp.where(is_better, new, old), new, best)

        best = better(state.best(beside=False), values["episode_return"])
        if state.best_beside is not None:
            beside = better(state.best_beside, values[f"{self.config.mode_beside}_episode_return"])
            state = eqx.tree_at(lambda s: s.best_beside, state, beside)
        return eqx.tree_at(lambda s: (s.best_policy, s.best_return), state, (best.policy, best.mean_return))


def _train_on_device(config: Config) -> Trainer:
    """Environments are pure functions: each step of the run is one program, in which every device has its share."""
    num_envs, devices = config.ppo.num_envs, Devices(config.num_devices or jax.device_count())
    if devices.num_devices > jax.device_count():
        raise UserError(f"num_devices = {devices.num_devices}, but there are {jax.device_count()}")
    if num_envs % devices.num_devices:
        raise UserError(
            f"ppo.num_envs must be a multiple of the {devices.num_devices} devices, got {num_envs}; "
            "num_devices takes fewer of them"
        )
    everywhere, shard = make_batched(config.env, num_envs, config.agent_id), devices.shard
    learner = Learner(config, everywhere.spec, shard)

    def here() -> AutoReset:
        share = num_envs // devices.num_devices
        return replace(everywhere, num_envs=share, first=shard.index * share)

    def init(seed: Int[Array, ""]) -> TrainState:
        return learner.init(seed, lambda policy, key: init_actors(here(), policy, key))

    def train_step(state: TrainState) -> tuple[TrainState, Values]:
        rollout_key, update_key = jax.random.split(_stream(state, 0))
        actors, transitions = rollout(here(), state.policy, state.actors, rollout_key, config.ppo.rollout_length, shard)
        return learner.learn(state, actors, transitions, update_key)

    def play(policy: Policy, key: Key[Array, ""], num_episodes: int, greedy: bool | Bool[Array, ""]) -> Values:
        limit = config.eval.max_episode_steps
        return evaluate(everywhere.env, policy, key, num_episodes, greedy=greedy, max_steps=limit, shard=shard)

    def play_modes(policies: Sequence[Policy], key: Key[Array, ""], num_episodes: int) -> Values:
        """Plays each mode with its policy: one program, in which the mode is data."""
        modes = jax.tree.map(lambda *x: jnp.stack(x), *policies), jnp.array(config.evaluation_modes)
        return _by_mode(jax.lax.map(lambda mode: play(mode[0], key, num_episodes, mode[1]), modes), config)

    def evaluate_step(state: TrainState) -> tuple[TrainState, Values]:
        policies = [state.policy] * len(config.evaluation_modes)
        values = play_modes(policies, _stream(state, 1), config.eval.num_episodes)
        return learner.remember(state, values), values

    def absolute_metric(state: TrainState) -> Values:
        return play_modes(_best_policies(state, config), _stream(state, 2), config.eval.num_absolute_episodes)

    def evaluate_policies(policy: Policy, key: Key[Array, "seeds"], num_episodes: int, greedy: bool) -> Values:
        seeds = _over_seeds(lambda policy, key: play(policy, key, num_episodes, greedy))
        return devices.share(seeds, (P(), P()), P())(policy, key)

    specs = None  # which axes of the state are dealt out: none to a single device
    if devices.num_devices > 1:
        alone = Learner(config, everywhere.spec)
        shape = jax.eval_shape(lambda: alone.init(jnp.zeros((), int), lambda *args: init_actors(everywhere, *args)))
        specs = eqx.tree_at(
            lambda s: s.actors, jax.tree.map(lambda _: P(), shape), jax.tree.map(lambda _: P(None, AXIS), shape.actors)
        )
    init_seeds = jax.jit(devices.share(_in_turn(init), (P(),), specs))
    step_seeds = devices.share(_over_seeds(train_step), (specs,), (specs, P()))
    return Trainer(
        spec=learner.spec,
        init=init_seeds,
        train_step=jax.jit(_guarded(step_seeds, config), donate_argnums=0),
        evaluate_step=jax.jit(devices.share(_over_seeds(evaluate_step), (specs,), (specs, P()))),
        absolute_metric=jax.jit(devices.share(_over_seeds(absolute_metric), (specs,), P())),
        evaluate=jax.jit(evaluate_policies, static_argnums=(2, 3)),
        shapes=lambda seeds: devices.place(jax.eval_shape(init_seeds, seeds), specs),
        env=everywhere.env,
        devices=devices,
    )


def _guarded(step: Callable[..., tuple[TrainState, Values]], config: Config, *, on_host: bool = False) -> Callable:
    """Takes back what a step did to the seeds in which a number was not finite; if that ends the run, to all seeds.

    What happened in an environment on the host cannot be taken back.
    """

    def guarded(state: TrainState, *args: Any) -> tuple[TrainState, Values]:
        new, values = step(state, *args)
        bad, old = values[NON_FINITE] != FINE, state
        if config.on_non_finite == "stop":
            bad = jnp.broadcast_to(bad.any(), bad.shape)
        else:  # on with other random numbers
            old = eqx.tree_at(lambda s: s.num_updates, old, new.num_updates)
        if config.on_non_finite == "rollback":
            half = 0.5 * optax.tree.get(old.opt_state, "learning_rate")
            old = eqx.tree_at(lambda s: s.opt_state, old, optax.tree.set(old.opt_state, learning_rate=half))
        if on_host:
            old = eqx.tree_at(lambda s: s.actors, old, new.actors)
        return kept(bad, old, new), values

    return guarded


def _train_on_host(config: Config) -> Trainer:
    """Environments are processes beside this one. A resumed run begins new episodes: theirs cannot be saved."""
    num_seeds, ppo, settings = config.num_seeds, config.ppo, config.eval
    if jax.process_count() > 1:
        raise UserError(f"{config.env} lives in processes of one host: only environments in JAX run on several")
    per_round = min(settings.num_episodes, ppo.num_envs)

    def start(num_envs: int, first: int = 0) -> HostEnvironments:
        return make_host(config.env, num_seeds * num_envs, config.agent_id, config.num_workers, config.worker, first)

    played = start(per_round)  # where policies are evaluated
    running: list[HostEnvironments] = []  # where they learn, from the first step of training
    learner = Learner(config, played.spec)

    def init(seed: Int[Array, ""]) -> TrainState:
        return learner.init(seed, lambda policy, key: blank_actors(policy, played.spec, ppo.num_envs))

    learn = jax.jit(_guarded(_over_seeds(learner.learn), config, on_host=True), donate_argnums=0)
    init_seeds = jax.jit(_in_turn(init))
    remember = jax.jit(jax.vmap(learner.remember))
    streams = jax.jit(jax.vmap(lambda state: [jax.random.split(_stream(state, s)) for s in range(3)]))

    def train_step(state: TrainState) -> tuple[TrainState, Values]:
        keys = streams(state)[0]
        actors = state.actors
        if not running:
            running.append(start(ppo.num_envs, first=played.num_envs))
            actors, _ = start_actors(running[0], actors.memory, num_seeds, seed_of(keys))
        actors, transitions = host_rollout(running[0], state.policy, actors, keys[:, 0], ppo.rollout_length)
        transitions, infos = take_infos(transitions)
        state, values = learn(state, actors, transitions, keys[:, 1])
        return state, {**values, **infos}

    def play(policy: Policy, key: Key[Array, "seeds"], num_episodes: int, greedy: bool) -> Values:
        memory = jax.vmap(lambda policy: policy.init_memory((per_round,)))(policy)
        limit = settings.max_episode_steps
        return host_evaluate(played, policy, memory, key, num_episodes, greedy=greedy, max_steps=limit)

    def play_modes(policies: Sequence[Policy], key: Key[Array, "seeds"], num_episodes: int) -> Values:
        modes = zip(policies, config.evaluation_modes, strict=True)
        values = [play(policy, key, num_episodes, greedy) for policy, greedy in modes]
        return _by_mode(jax.tree.map(lambda *values: np.stack(values), *aligned(values)), config)

    def evaluate_step(state: TrainState) -> tuple[TrainState, Values]:
        policies = [state.policy] * len(config.evaluation_modes)
        values = play_modes(policies, streams(state)[1][:, 0], settings.num_episodes)
        return remember(state, values), values

    def absolute_metric(state: TrainState) -> Values:
        return play_modes(_best_policies(state, config), streams(state)[2][:, 0], settings.num_absolute_episodes)

    def close() -> None:
        for envs in (played, *running):
            envs.close()

    return Trainer(
        spec=learner.spec,
        init=init_seeds,
        train_step=train_step,
        evaluate_step=evaluate_step,
        absolute_metric=absolute_metric,
        evaluate=play,
        shapes=lambda seeds: jax.eval_shape(init_seeds, seeds),
        env=played,
        devices=Devices(),
        close=close,
    )


def _over_seeds(step: Callable) -> Callable:
    """A function of one seed for arguments with a leading axis of seeds.

    On CPU one seed after another: one keeps the cores busy, and the memory is that of one. Elsewhere all at once.
    """
    return _in_turn(step) if jax.default_backend() == "cpu" else jax.vmap(step)


def _in_turn(step: Callable) -> Callable:
    """A function of one seed for many, one after another.

    `init` needs it everywhere: on CPU two batched QR factorisations (of orthogonal weights) at the same time wait for
    each other for ever: each holds a thread of XLA's pool while it waits for the pool to do its share (jaxlib 0.10.2,
    two cores).
    """
    return lambda *args: jax.lax.map(lambda arg: step(*arg), args)


def _stream(state: TrainState, stream: int) -> Key[Array, ""]:
    """The key for one use (0 training, 1 evaluation, 2 absolute metric) at this update.

    Evaluating draws nothing from training's stream, so how often a run is evaluated does not change it.
    """
    return jax.random.fold_in(jax.random.fold_in(state.key, stream), state.num_updates)


def _best_policies(state: TrainState, config: Config) -> list[Policy]:
    """The best weights in each mode that is played."""
    return [state.best(beside=bool(index)).policy for index in range(len(config.evaluation_modes))]


def _by_mode(values: Values, config: Config) -> Values:
    """Metrics [modes, …] of the mode that counts and of the one beside it, if played, which is named in front."""
    beside = {f"{config.mode_beside}_{name}": x[1] for name, x in values.items()} if config.eval.both_modes else {}
    return {name: x[0] for name, x in values.items()} | beside


def _update_values(metrics: UpdateMetrics) -> Values:
    losses = {name: getattr(metrics.losses, name) for name in metrics.losses.__dataclass_fields__}
    return losses | {"grad_norm": metrics.grad_norm, "first_ratio_deviation": metrics.first_ratio_deviation}


def _episode_values(transitions: Transition, shard: Shard) -> Values:
    """Means of the environment's metrics over the episodes that ended in this rollout; NaN if none did."""
    ended, metrics = shard.gather((transitions.terminated | transitions.truncated, transitions.metrics), 1)
    count = ended.sum()
    values = {name: jnp.sum(jnp.where(ended, x, 0.0)) / count for name, x in metrics.items()}
    return values | {"num_episodes": count}


def _explained_variance(
    value: Float[Array, "*batch N"], target: Float[Array, "*batch N"], alive: Bool[Array, "*batch N"]
) -> Float[Array, ""]:
    """1 − Var(target − value) / Var(target) over the living: 1 is a perfect critic, 0 one that knows the mean only."""
    return 1.0 - jnp.var(target - value, where=alive) / (jnp.var(target, where=alive) + 1e-8)
