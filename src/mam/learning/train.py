"""A training run as functions: `init`, `train_step`, `evaluate_step`, `absolute_metric`.

One driver puts together where experience comes from, what is learned from it, and where the policy
is played. Where the environments are JAX programs each function is one pure, compiled program;
where they are external, compiled parts are called in between.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from mam.config import Config
from mam.envs.tasks import DATASET
from mam.errors import UserError
from mam.learning.advantages import Advantages
from mam.learning.alignment import Alignment, hidden_states, matrices
from mam.learning.anchor import StayClose
from mam.learning.cloning import BehaviourCloning
from mam.learning.estimates import estimate
from mam.learning.evaluate import with_kinds
from mam.learning.experience import Environments, Experience, Values, environments
from mam.learning.guided import Guided, seen_by
from mam.learning.nonfinite import (
    NO_FAULT,
    ROLLOUT_NAMES,
    first_nonfinite,
    leaf_names,
    nonfinite_in_rollout,
    nonfinite_leaves,
    select_per_seed,
)
from mam.learning.normalise import (
    NormalisedPolicy,
    Statistics,
    as_normalised,
    simplified,
    transfer_policy,
)
from mam.learning.objective import (
    InTurn,
    Objective,
    OnOther,
    WeightedSum,
    make_batch,
    same_for_all,
)
from mam.learning.ppo import PPO
from mam.learning.recordings import Recordings, Unplayed
from mam.learning.rollout import Rollout
from mam.learning.sharding import AXIS, WHOLE, Devices, Shard
from mam.learning.stopwatch import Part, Stopwatch
from mam.learning.update import make_optimiser, update, update_names
from mam.networks.decoding.decide import Decoding
from mam.networks.mixers.base import mixer_metrics
from mam.networks.policy import make_policy
from mam.types import (
    Environment,
    EnvSpec,
    ExternalEnvironments,
    FollowingPolicy,
    Policy,
    Transition,
)

P = jax.P
TRAINING, EVALUATION, ABSOLUTE, RECORDED = range(4)  # streams of random keys


class Best(eqx.Module):
    """The weights whose evaluation had the highest mean return so far."""

    policy: Policy
    mean_return: Float[Array, "*seeds"]


class TrainState(eqx.Module):
    """All that a run needs to go on as if it had never stopped; one leading axis of seeds."""

    policy: Policy
    opt_state: optax.OptState
    actors: Any  # the carry of experience: `RolloutState`
    best_policy: Policy  # with the highest mean return of all evaluations so far
    best_return: Float[Array, "*seeds"]
    best_beside: Best | None  # in the mode that is played beside the one that counts, if it is
    key: Key[Array, "*seeds"]
    num_updates: Int[Array, "*seeds"]
    start: Policy | None = None  # that the policy is to stay close to at first, if it is
    teacher: Policy | None = None  # that is distilled, if one is

    def best(self, *, beside: bool) -> Best:
        """Return the best weights in the mode that counts, or in the one beside it if played."""
        if beside and self.best_beside is not None:
            return self.best_beside
        return Best(self.best_policy, self.best_return)


NON_FINITE = "non_finite"  # the index in `watched` of the first array with a non-finite value


@dataclass(frozen=True)
class Trainer:
    """The functions of a run.

    Seed k's numbers are the same, up to rounding, whichever seeds are beside it; external
    environments, which are seeded by place, begin other episodes in another place.

    `init`, `train_step`, `evaluate_step` and `absolute_metric` are jitted, except with external
    environments, where the last three are loops around jitted functions.
    """

    init: Callable[[Int[Array | np.ndarray, "seeds"]], TrainState]
    # One rollout and the update on it
    train_step: Callable[[TrainState], tuple[TrainState, Values]]
    # Current weights; remembers the best
    evaluate_step: Callable[[TrainState], tuple[TrainState, Values]]
    absolute_metric: Callable[[TrainState], Values]  # best weights, fresh episodes
    # Policies [seeds], keys [seeds], num_episodes, greedy → metrics, AGENT_RETURN too
    evaluate: Callable[..., Values]
    # Of what `init` returns, and where its arrays lie
    shapes: Callable[[Int[Array | np.ndarray, "seeds"]], TrainState]
    environments: Environments | Unplayed
    devices: Devices
    source: Experience  # what is learned from
    recordings: Recordings | None  # of the dataset that is learned from, or from beside, if any

    @property
    def spec(self) -> EnvSpec:
        """Sizes and limits of the task; starts external environments."""
        return self.environments.spec

    @property
    def env(self) -> Environment | ExternalEnvironments:
        """The environments of evaluation: one in JAX, or external ones, which this starts."""
        return self.environments.env

    def close(self) -> None:
        """End external environments, if they were started."""
        self.environments.close()
        self.close_source()

    def close_source(self) -> None:
        """End those external environments that only rollouts come from, if any were started."""
        if isinstance(self.source, Environments) and self.source is not self.environments:
            self.source.close()

    @property
    def clock(self) -> Stopwatch:
        """The stopwatch of the parts of a train step, where they can be told apart."""
        return self.environments.clock

    @property
    def step_part(self) -> Part:
        """The part that the rest of a train step counts as."""
        return self.environments.step_part

    def first_nonfinite(self, state: TrainState, values: Values) -> dict[int, str]:
        """Name the first array with a non-finite value in a train step, by seed that had one.

        Args:
            state: after the step.
            values: what the step reported.
        """
        bad = {
            seed: int(index)
            for seed, index in enumerate(np.asarray(values[NON_FINITE]))
            if index != NO_FAULT
        }
        names = watched(state.policy) if bad else []
        return {seed: names[index] for seed, index in bad.items()}

    def compile(self, state: TrainState) -> "Trainer":
        """Compile `train_step` and `evaluate_step` ahead of their first call, where they can be."""

        def compiled(step: Callable) -> Callable:
            return step.lower(state).compile() if isinstance(step, jax.stages.Wrapped) else step

        return replace(
            self, train_step=compiled(self.train_step), evaluate_step=compiled(self.evaluate_step)
        )


def make_train(
    config: Config,
    experience: Experience | None = None,
    objective: Objective | None = None,
    teacher: Config | None = None,
    played: Environments | Unplayed | None = None,
) -> Trainer:
    """Build the functions of a run; nothing is compiled or started before the first call.

    Args:
        config: of the run; its task is where the policy is played.
        experience: what is learned from; the task itself if None. Of another task's environments,
            whose weights are of the same sizes, the policy is one for that task.
        objective: what is learned; what the configuration says if None.
        teacher: says of which kind the policy is that is distilled; its weights are the state's.
        played: environments of the task, if there are any already.

    Raises:
        UserError: for a task or a policy that does not exist.
    """
    if config.data is not None:  # read by one device
        config = replace(config, num_devices=1)
    if played is None:
        played = Unplayed(config) if config.env == DATASET else environments(config)
    recordings = _recordings(config, played, experience)
    imitated = recordings if config.learn == "bc" else None
    source, devices = cast(Experience, experience or imitated or played), played.devices
    learned = source if isinstance(source, Environments) else played
    if objective is None and config.learn != "distill":
        cloning = BehaviourCloning(config.cloning.value_coef)
        objective = cloning if config.learn == "bc" else PPO(config.ppo)

    # External environments are started when their sizes are first read.
    learner = cache(lambda: Learner(config, learned.spec, objective, devices.shard, teacher))
    specs = _device_specs(learner(), source) if devices.num_devices > 1 else None

    def init(seed: Int[Array, ""]) -> TrainState:
        return learner().init(seed, lambda policy, key: source.init(policy, key, devices.shard))

    init_seeds = jax.jit(devices.share(_in_turn(init), (P(),), specs))
    train_step, evaluate_step, absolute_metric = _step_functions(
        config, source, played, learner, specs
    )
    if recordings is not None:
        evaluate_step = _predicting(evaluate_step, recordings)
        if source is not recordings:
            train_step = _shown(train_step, recordings)
    return Trainer(
        init=init_seeds,
        train_step=train_step,
        evaluate_step=evaluate_step,
        absolute_metric=absolute_metric,
        evaluate=_evaluation(played),
        shapes=lambda seeds: devices.with_shardings(jax.eval_shape(init_seeds, seeds), specs),
        environments=played,
        devices=devices,
        source=source,
        recordings=recordings,
    )


def _step_functions(
    config: Config,
    source: Experience,
    played: Environments | Unplayed,
    learner: Callable[[], "Learner"],
    specs: TrainState | None,
) -> tuple[Callable, Callable, Callable]:
    """Return `train_step`, `evaluate_step` and `absolute_metric` of a run, compiled if they can be.

    Args:
        config: of the run.
        source: what is learned from.
        played: what evaluations are played in.
        learner: returns what learns, when it is first needed.
        specs: which axes of the state are dealt out to the devices.
    """

    def learn(*args: Any) -> tuple[TrainState, Values]:
        return learner().learn(*args)

    def remember(*args: Any) -> TrainState:
        return learner().remember(*args)

    def share(step: Callable, out_specs: Any) -> Callable:
        return played.devices.share(_over_seeds(step), (specs,), out_specs)

    whole = partial(_Steps, config, source, played, partial(_acting, config))
    traced = whole(learn, remember, _key)
    called = whole(
        jax.jit(_guarded(_over_seeds(learn), config, external=True), donate_argnums=0),
        jax.jit(jax.vmap(remember)),
        _keys,
    )
    train_step, evaluate_step, absolute_metric = called.train, called.evaluate, called.absolute
    if source.compiled:
        train_step = _guarded(share(traced.train, (specs, P())), config)
        train_step = jax.jit(train_step, donate_argnums=0)
    if played.compiled:
        evaluate_step = jax.jit(share(traced.evaluate, (specs, P())))
        absolute_metric = jax.jit(share(traced.absolute, P()))
    return train_step, evaluate_step, absolute_metric


def _recordings(
    config: Config, played: Environments | Unplayed, experience: Experience | None
) -> Recordings | None:
    """Return the dataset that is given or that a configuration names, as experience."""
    if isinstance(experience, Recordings):
        return experience
    if isinstance(played, Unplayed):
        return played.recordings
    return None if config.data is None else Recordings.of(config, lambda: played.spec)


def _shown(
    train_step: Callable[..., tuple[TrainState, Values]],
    recordings: Recordings,
) -> Callable[[TrainState], tuple[TrainState, Values]]:
    """Draw as many recorded steps for every train step as its rollout has."""

    def train(state: TrainState) -> tuple[TrainState, Values]:
        _, recorded, _ = recordings.collect(state.policy, (), _keys(state, RECORDED), WHOLE)
        return train_step(state, recorded)

    return train


def _predicting(
    evaluate_step: Callable[[TrainState], tuple[TrainState, Values]], source: Recordings
) -> Callable[[TrainState], tuple[TrainState, Values]]:
    """Report with an evaluation how well the weights predict what is held out of a dataset."""

    def evaluate(state: TrainState) -> tuple[TrainState, Values]:
        after, values = evaluate_step(state)
        return after, {**values, **source.held_out(state.policy)}

    return evaluate


@dataclass(frozen=True)
class _Steps:
    """The bodies of a run's functions, traced for one seed or called for all of them."""

    config: Config
    source: Experience
    played: Environments | Unplayed
    acting: Callable[[TrainState], Policy]
    learn: Callable[..., tuple[TrainState, Values]]
    remember: Callable[[TrainState, Values], TrainState]
    key: Callable[[TrainState, int], Key[Array, "*seeds"]]

    def train(self, state: TrainState, *recorded: Rollout) -> tuple[TrainState, Values]:
        """Collect a rollout and learn from it, and from a recorded one beside it if there is."""
        key, shard = self.key(state, TRAINING), self.played.devices.shard
        keys = jax.vmap(jax.random.split)(key) if key.ndim else jax.random.split(key)
        carry, rollout, beside = self.source.collect(
            self.acting(state), state.actors, keys[..., 0], shard
        )
        state, values = self.learn(state, carry, rollout, keys[..., 1], *recorded)
        return state, {**values, **beside}

    def evaluate(self, state: TrainState) -> tuple[TrainState, Values]:
        """Play the current weights, and keep the best."""
        policies = [state.policy] * len(self.config.evaluation_modes)
        values = self._play(state, policies, EVALUATION, self.config.eval.num_episodes)
        return self.remember(state, values), values

    def absolute(self, state: TrainState) -> Values:
        """Play the best weights in each mode."""
        modes = range(len(self.config.evaluation_modes))
        policies = [state.best(beside=bool(mode)).policy for mode in modes]
        return self._play(state, policies, ABSOLUTE, self.config.eval.num_absolute_episodes)

    def _play(
        self, state: TrainState, policies: list[Policy], stream: int, num_episodes: int
    ) -> Values:
        """Return metrics of the mode that counts and, with its name in front, of the other."""
        config, source, played = self.config, self.source, self.played
        if isinstance(source, Environments) and source is not played:  # of another task
            specs = source.spec, played.spec
            policies = [transfer_policy(p, config.policy, *specs, config.network) for p in policies]
        values = played.play_modes(
            policies, self.key(state, stream), num_episodes, config.evaluation_modes
        )
        beside = (
            {f"{config.mode_beside}_{name}": x[1] for name, x in values.items()}
            if config.eval.both_modes
            else {}
        )
        return {name: x[0] for name, x in values.items()} | beside


def _acting(config: Config, state: TrainState) -> Policy:
    """Return what acts in rollouts: the policy, beside its teacher if it has one."""
    if state.teacher is None:
        return state.policy
    student, teacher = (cast(FollowingPolicy, one) for one in (state.policy, state.teacher))
    acts = config.distill.teacher_share > 0 and config.learn == "distill"
    return Guided(student, teacher, _teacher_share(config, state.num_updates) if acts else None)


def _teacher_share(config: Config, num_updates: Int[Array, "*seeds"]) -> Float[Array, "*seeds"]:
    """Return the share of the steps at which the teacher acts."""
    distill = config.distill
    return _falling(distill.teacher_share, distill.teacher_until, config, num_updates)


def _falling(
    weight: float, until: float, config: Config, num_updates: Int[Array, "*seeds"]
) -> Float[Array, "*seeds"]:
    """Return what a weight has fallen to, linearly, to be 0 after a share of the run.

    Args:
        weight: at first.
        until: that share.
        config: of the run.
        num_updates: so far.
    """
    passed = num_updates / (until * config.num_updates)
    return weight * jnp.maximum(1 - passed, 0.0)


def _evaluation(played: Environments | Unplayed) -> Callable[..., Values]:
    """Return the playing of any weights, jitted where it can be; see `Trainer.evaluate`."""

    def evaluate(
        policy: Policy, key: Key[Array, "seeds"], num_episodes: int, greedy: bool
    ) -> Values:
        play = partial(played.play, num_episodes=num_episodes, greedy=greedy)
        if played.compiled:
            play = played.devices.share(_over_seeds(play), (P(), P()), P())
        return with_kinds(play(policy, key), played.spec, each_agent=True)

    return jax.jit(evaluate, static_argnums=(2, 3)) if played.compiled else evaluate


def _device_specs(learner: "Learner", source: Experience) -> TrainState:
    """Say which axes of the state are dealt out to the devices."""
    seed, learner = jnp.zeros((), int), replace(learner, shard=WHOLE)
    shape = jax.eval_shape(
        lambda: learner.init(seed, lambda policy, key: source.init(policy, key, WHOLE))
    )
    dealt = jax.tree.map(lambda _: P(None, AXIS), shape.actors)
    return eqx.tree_at(lambda s: s.actors, jax.tree.map(lambda _: P(), shape), dealt)


def watched(policy: Policy) -> list[str]:
    """Name every array of a train step that has to be finite, in the order of computing."""
    whole = as_normalised(policy)
    parameters, statistics = (
        leaf_names(whole.network, "parameter"),
        leaf_names(whole.statistics, "statistics of"),
    )
    return [*parameters, *ROLLOUT_NAMES, *statistics, *update_names(whole.network)]


def init_policy(config: Config, spec: EnvSpec, *, key: Key[Array, ""]) -> Policy:
    """Draw the first weights of a run's policy.

    Args:
        config: of the run.
        spec: of its task, the only thing of the environment that the policy depends on.
        key: decides the weights.
    """
    decoding = Decoding(config.decode, config.decode_window, config.decode_max_passes)
    network = make_policy(config.policy, spec, config.network, decoding, key=key)
    _check_parts(network, config)
    return with_statistics(network, config, spec)


def _check_parts(network: Policy, config: Config) -> None:
    """Refuse settings that read parts of a policy which one of a user's own may lack."""
    kl, warmup = config.finetune.kl_coef, config.finetune.critic_warmup
    read = (
        ("ppo.normalise_value", "value_layer", config.ppo.normalise_value),
        ("data", "distribution", config.data is not None),
        ("teacher", "distribution", config.teacher),
        ("teacher", "follow", config.teacher),
        ("finetune.kl_coef", "distribution", kl),
        ("finetune.critic_warmup", "critic", warmup),
    )
    for setting, part, asked in read:
        if asked and not hasattr(network, part):
            raise UserError(f"{setting} reads the part {part}, which {config.policy} lacks")


def with_statistics(network: Policy, config: Config, spec: EnvSpec) -> Policy:
    """Return a network with the normalisation of a configuration, before any sample.

    Args:
        network: in normalised units.
        config: of the run.
        spec: of its task.
    """
    running, values = config.network.observation_norm == "running", config.ppo.normalise_value
    statistics = Statistics.init(spec, observations=running, values=values)
    return simplified(NormalisedPolicy(network, statistics))


@dataclass(frozen=True)
class Learner:
    """The part of training that is not acting, for one seed, with environments of any kind."""

    config: Config
    spec: EnvSpec
    objective: Objective | None  # beside what the state says to stay close to
    shard: Shard = WHOLE
    teacher: Config | None = None  # of the policy that is distilled

    @property
    def optimiser(self) -> optax.GradientTransformation:
        return make_optimiser(self.config.ppo)

    def init(
        self, seed: Int[Array, ""], start: Callable[[Policy, Key[Array, ""]], Any]
    ) -> TrainState:
        """Return a fresh state.

        Args:
            seed: decides the weights and everything random after them.
            start: makes the carry of experience, of a policy and a key.
        """
        config, (policy_key, env_key, key) = self.config, jax.random.split(jax.random.key(seed), 3)
        policy = init_policy(config, self.spec, key=policy_key)
        never = jnp.array(-jnp.inf, jnp.float32)
        state = TrainState(
            policy=policy,
            opt_state=self.optimiser.init(cast(Any, as_normalised(policy).network)),
            actors=(),
            best_policy=policy,
            best_return=never,
            best_beside=Best(policy, never) if config.eval.both_modes else None,
            key=key,
            num_updates=jnp.zeros((), jnp.int32),
            start=policy if config.finetune.kl_coef else None,
            teacher=self._blank_teacher(),
        )
        return replace(state, actors=start(_acting(config, state), env_key))

    def _blank_teacher(self) -> Policy | None:
        """Return zeros in the place of the teacher's weights, which are read from its run."""
        if self.teacher is None:
            return None
        draw = partial(init_policy, self.teacher, self.spec)
        shapes = jax.eval_shape(lambda: draw(key=jax.random.key(0)))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def _at(
        self, state: TrainState, rollout: Rollout, taught: Rollout, recorded: Rollout | None
    ) -> Objective:
        """Return what is learned from a rollout.

        That is the objective, what the teacher does, what a recorded rollout shows, and at first to
        stay close to the start.

        Args:
            state: before it.
            rollout: as the policy remembers it.
            taught: as the teacher does.
            recorded: a dataset's, if one is imitated beside.
        """
        config, finetune, cloning = self.config, self.config.finetune, self.config.cloning
        terms: list[tuple[Any, Objective]] = [(1.0, self.objective)] if self.objective else []
        if state.teacher is not None:
            terms += self._lessons(as_normalised(state.teacher), taught, state.num_updates)
        if recorded is not None:
            weight = _falling(cloning.nll_coef, cloning.nll_until, config, state.num_updates)
            terms.append((weight, OnOther(BehaviourCloning(), recorded)))
        if state.start is not None:
            weight = _falling(finetune.kl_coef, finetune.kl_until, config, state.num_updates)
            terms.append((weight, StayClose("start", as_normalised(state.start), rollout)))
        if not terms:
            raise UserError("there is nothing to learn: a distilling run needs its teacher")
        return terms[0][1] if len(terms) == 1 else WeightedSum(tuple(terms))

    def _lessons(
        self, teacher: NormalisedPolicy, rollout: Rollout, num_updates: Int[Array, ""]
    ) -> list[tuple[Any, Objective]]:
        """Return what is learned of a teacher after so many updates: one stage after another.

        Args:
            teacher: in the environment's units.
            rollout: as the teacher remembers it.
            num_updates: so far.
        """
        config, distill = self.config, self.config.distill
        if config.learn == "ppo":
            close = StayClose("teacher", teacher, rollout)
            weight = _falling(distill.kl_coef, distill.teacher_until, config, num_updates)
            return [(weight, close)]
        close = StayClose("teacher", teacher, rollout, distill.value_coef)
        if not distill.staged:
            return [(1.0, close)]
        stages = (
            (distill.matrix_updates, Alignment("matrix_distance", matrices, teacher, rollout)),
            (distill.hidden_updates, Alignment("hidden_distance", hidden_states, teacher, rollout)),
        )
        stages = [(length, stage) for length, stage in stages if length]
        ends = jnp.cumsum(jnp.array([length for length, _ in stages]))
        current = same_for_all(jnp.sum(num_updates >= ends))
        return [(1.0, InTurn((*(stage for _, stage in stages), close), current))]

    def learn(
        self,
        state: TrainState,
        carry: Any,
        rollout: Rollout,
        key: Key[Array, ""],
        recorded: Rollout | None = None,
    ) -> tuple[TrainState, Values]:
        """Learn from a rollout.

        Args:
            state: before it.
            carry: what experience goes on from after the rollout.
            rollout: [T, B, …].
            key: decides the minibatches.
            recorded: a dataset's rollout that is imitated beside, if one is.

        Returns:
            The state after it, and what is reported, one number each.
        """
        ppo, shard = self.config.ppo, self.shard
        rollout, taught = (rollout, rollout) if state.teacher is None else seen_by(rollout)
        objective = self._at(state, rollout, taught, recorded)
        policy, transitions, estimates = as_normalised(state.policy), rollout.transitions, None
        flags = [*nonfinite_leaves(policy.network), *nonfinite_in_rollout(transitions)]
        # 1. Estimate advantages, in units of reward.
        if objective.needs_values:
            transitions, estimates = estimate(policy, rollout, self.spec, ppo, shard)
            policy = policy.update_values(estimates.target, transitions.observation.alive, shard)
        # 2. Take into the statistics what was seen, from the next rollout on.
        statistics = policy.statistics.update(transitions.observation, shard)
        flags += nonfinite_leaves(statistics)
        bad = first_nonfinite(flags, shard)
        # 3. Learn, in the network's units.
        observation = policy.statistics.normalise(transitions.observation)
        scaled = replace(rollout, transitions=replace(transitions, observation=observation))
        batch = make_batch(scaled, objective.prepare(policy, scaled, estimates), shard)
        lr_scale = self._lr_scale(state.num_updates)
        how = (self.optimiser, objective, ppo, shard, lr_scale, self._frozen(state))
        network, opt_state, metrics = update(policy.network, state.opt_state, batch, key, *how)
        # 4. Report.
        in_update = jnp.where(metrics.bad == NO_FAULT, NO_FAULT, len(flags) + metrics.bad)
        values = {
            **metrics.values,
            **_episode_values(transitions, shard),
            **{name: x.mean() for name, x in shard.gather(transitions.policy_metrics, 1).items()},
            **_value_metrics(transitions, estimates, shard),
            "learning_rate": optax.tree.get(opt_state, "learning_rate") * lr_scale,
            **self._taught_values(state),
            NON_FINITE: jnp.where(bad == NO_FAULT, in_update, bad),
            **mixer_metrics(network),
        }
        state = replace(
            state,
            policy=simplified(NormalisedPolicy(network, statistics)),
            opt_state=opt_state,
            actors=carry,
            num_updates=state.num_updates + 1,
        )
        return state, values

    def _taught_values(self, state: TrainState) -> Values:
        """Return how often the teacher acted, if there is one."""
        if state.teacher is None or self.config.learn != "distill":
            return {}
        return {"teacher_share": _teacher_share(self.config, state.num_updates)}

    def _lr_scale(self, num_updates: Int[Array, ""]) -> Float[Array, ""] | float:
        """Return what the learning rate is multiplied by after so many updates."""
        scale, warmup = 1.0, self.config.finetune.lr_warmup
        if self.config.ppo.anneal_lr:
            scale = 1 - num_updates / self.config.num_updates
        return scale * jnp.minimum((num_updates + 1) / warmup, 1.0) if warmup else scale

    def _frozen(self, state: TrainState) -> PyTree[Bool[Array, ""]] | None:
        """Say which parameters do not learn yet: at first all but the critic's."""
        warmup = self.config.finetune.critic_warmup
        if not warmup:
            return None
        early, network = state.num_updates < warmup, as_normalised(state.policy).network
        frozen = jax.tree.map(lambda _: early, network)
        critic = cast(Any, network).critic
        learns = jax.tree.map(lambda _: jnp.zeros((), bool), critic)
        return eqx.tree_at(lambda network: cast(Any, network).critic, frozen, learns)

    def remember(self, state: TrainState, values: Values) -> TrainState:
        """Keep the evaluated weights, for each mode in which none were better before.

        Args:
            state: the weights that were played.
            values: metrics of the evaluation, [episodes].
        """

        def better(best: Best, returns: Any) -> Best:
            mean_return = returns.mean(dtype=best.mean_return.dtype)
            # Of equals the later: it has learned for longer.
            is_better = mean_return >= best.mean_return
            new = Best(state.policy, mean_return)
            return jax.tree.map(lambda new, old: jnp.where(is_better, new, old), new, best)

        best = better(state.best(beside=False), values["episode_return"])
        if state.best_beside is not None:
            beside = better(state.best_beside, values[f"{self.config.mode_beside}_episode_return"])
            state = eqx.tree_at(lambda s: s.best_beside, state, beside)
        return eqx.tree_at(
            lambda s: (s.best_policy, s.best_return), state, (best.policy, best.mean_return)
        )


def _guarded(
    step: Callable[..., tuple[TrainState, Values]], config: Config, *, external: bool = False
) -> Callable:
    """Take back what a step did to seeds with a non-finite value; if that ends the run, to all.

    What happened in an external environment cannot be taken back.
    """

    def guarded(state: TrainState, *args: Any) -> tuple[TrainState, Values]:
        new, values = step(state, *args)
        bad, old = values[NON_FINITE] != NO_FAULT, state
        if config.on_non_finite == "stop":
            bad = jnp.broadcast_to(bad.any(), bad.shape)
        else:  # on with other random numbers
            old = eqx.tree_at(lambda s: s.num_updates, old, new.num_updates)
        if config.on_non_finite == "rollback":
            half = 0.5 * optax.tree.get(old.opt_state, "learning_rate")
            old = eqx.tree_at(
                lambda s: s.opt_state, old, optax.tree.set(old.opt_state, learning_rate=half)
            )
        if external:
            old = eqx.tree_at(lambda s: s.actors, old, new.actors)
        return select_per_seed(bad, old, new), values

    return guarded


def _over_seeds(step: Callable) -> Callable:
    """Make a function of one seed one of arguments with a leading axis of seeds.

    On CPU one seed after another: one keeps the cores busy, and the memory is that of one.
    Elsewhere all at once.
    """
    return _in_turn(step) if jax.default_backend() == "cpu" else jax.vmap(step)


def _in_turn(step: Callable) -> Callable:
    """Make a function of one seed one of many, one after another.

    `init` needs it everywhere: on CPU two batched QR factorisations (of orthogonal weights) at the
    same time wait for each other for ever: each holds a thread of XLA's pool while it waits for the
    pool to do its share (jaxlib 0.10.2, two cores).
    """
    return lambda *args: jax.lax.map(lambda arg: step(*arg), args)


def _key(state: TrainState, stream: int | Int[Array, ""]) -> Key[Array, ""]:
    """Return the key for one use at this update.

    Evaluating draws nothing from training's stream, so how often a run is evaluated does not change
    it.
    """
    return jax.random.fold_in(jax.random.fold_in(state.key, stream), state.num_updates)


_keys = jax.jit(jax.vmap(_key, in_axes=(0, None)))  # of all seeds


def _episode_values(transitions: Transition, shard: Shard) -> Values:
    """Return means of metrics over the episodes that ended in a rollout; infinite if none did.

    No NaN, which JAX_DEBUG_NANS would take for a mistake: see `on_host`.
    """
    ended, metrics = shard.gather(
        (transitions.terminated | transitions.truncated, transitions.metrics), 1
    )
    count = ended.sum()
    values = {
        name: jnp.where(
            count > 0, jnp.sum(jnp.where(ended, x, 0.0)) / jnp.maximum(count, 1), jnp.inf
        )
        for name, x in metrics.items()
    }
    return values | {"num_episodes": count}


def on_host(values: Values) -> dict[str, np.ndarray]:
    """Return the metrics of a step as NumPy arrays: NaN where infinity stands for no number.

    That is where no episode ended, and in other stages of distilling.
    """
    metrics = {name: np.asarray(x) for name, x in jax.device_get(values).items()}
    metrics.pop(NON_FINITE, None)
    none = metrics.get("num_episodes", np.ones(())) == 0
    for name, x in metrics.items():
        if x.dtype.kind == "f":
            missing = np.isposinf(x) & (none | (name in _OF_STAGES))
            metrics[name] = np.where(missing, x.dtype.type(np.nan), x)
    return metrics


_OF_STAGES = ("matrix_distance", "hidden_distance", "teacher_kl", "teacher_value_loss")


def _value_metrics(transitions: Transition, estimates: Advantages | None, shard: Shard) -> Values:
    """Return how well the critic predicts, if it learns."""
    if estimates is None:
        return {}
    seen = (transitions.value, estimates.target, transitions.observation.alive)
    return {"explained_variance": _explained_variance(*shard.gather(seen, 1))}


def _explained_variance(
    value: Float[Array, "*batch N"],
    target: Float[Array, "*batch N"],
    alive: Bool[Array, "*batch N"],
) -> Float[Array, ""]:
    """Return 1 − Var(target − value) / Var(target) over the living.

    1 is a perfect critic, 0 one that knows the mean only.
    """
    return 1.0 - jnp.var(target - value, where=alive) / (jnp.var(target, where=alive) + 1e-8)
