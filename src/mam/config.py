"""What a run is: frozen dataclasses, their derived values, and a strict JSON round trip.

The docstring under a field is its help text on the command line.
"""

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from mam.errors import UserError, shown, unknown_name

T = TypeVar("T")

# A random key is made of 32 bits: a seed above would be one of those below.
MAX_SEED = 2**32 - 1
MAX_INT = 2**63 - 1


CURVES = ("hilbert", "sweep")  # orders along positions
ORDERS = ("index", "random", *CURVES)


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder's blocks."""

    layout: str | None = None
    """A letter per block, such as MA (see `mam list`); num_blocks times the policy's own if
    None."""
    combine: Literal["sum", "product"] = "sum"
    """The two directions of a state-space mixer: both read the observations and are added, or as
    published the second reads the first and they are multiplied, which learns less."""
    order_scans: int = 1
    """Hilbert curves along which agents are mixed, each shifted across the others: the mean of
    what a mixer makes of each order. Needs --network.order hilbert."""
    local_branch: int = 0
    """Width of a convolution along the agents beside each mixer, odd: each reads so many around
    itself; 0: none."""


@dataclass(frozen=True)
class DecoderConfig:
    """The decoder's blocks."""

    layout: str | None = None
    """A letter per block, as the encoder's; both mixers of the block are of this kind."""
    cross: str | None = None
    """A letter per block for the mixer that reads the observations; as layout if None."""


def _clock_before(config: dict[str, Any]) -> str:
    """Return what runs did before there was a clock: off where there would be one now."""
    network = config.get("network")
    memory = network.get("memory") if isinstance(network, dict) else None
    return "off" if (memory or config.get("policy")) in _STATE_SPACE else "auto"


_STATE_SPACE = ("mamba", "mamba2", "rec_mam", "rec_mam2")  # memories, and policies that have them


@dataclass(frozen=True)
class RecurrenceConfig:
    """Memory over environment steps, where `network.memory` or the policy names one."""

    d_state: int = 16
    """State size per inner channel of a state-space memory."""
    d_conv: int = 4
    """Width of its convolution along time."""
    expand: int = 1
    """Inner width of a state-space memory, as a multiple of d_model."""
    dt_min: float = 1e-3
    """Step sizes at initialisation are log-uniform from here …"""
    dt_max: float = 0.1
    """… to here; 1 / step size is about how many environment steps a channel sums up."""
    normalise: bool = field(default=False, metadata={"before": True})
    """Normalise a state-space memory's output before it is added to what is seen: finds a faint,
    old cue sooner (probe/tmaze-50), and makes small states count as much as large ones, with which
    other tasks learn badly (RWARE)."""
    last_action: bool = False
    """Let agents read what they did at the step before, beside what they see."""
    clock: Literal["auto", "on", "off"] = field(default="auto", metadata={"before": _clock_before})
    """Let agents read how many steps of the episode have passed, beside what they see: greedy play
    needs it not to go in circles. auto: on beside a state-space memory, off otherwise, as
    published."""


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the encoder–decoder policy."""

    d_model: int = 64
    """Width of the residual stream."""
    num_blocks: int = 1
    """Blocks in the encoder, and as many in the decoder; hidden layers of the independent policies
    and of a critic of its own."""
    num_heads: int = 1
    """Heads of attention and of retention."""
    retention_decay: float = 0.8
    """What retention over time (sable) keeps from one environment step to the next, as a share of
    the published 0.97 to 0.998, by head."""
    d_state: int = 16
    """State size per inner channel."""
    d_conv: int = 4
    """Width of the convolution along the agents."""
    expand: int = 2
    """Inner width of a Mamba block, as a multiple of d_model."""
    dt_rank: int | None = None
    """Rank of the step-size projection; d_model / 16, rounded up, if None."""
    head_dim: int | None = None
    """Inner channels that share a decay; as many up to 64 as divide the inner width evenly, if
    None."""
    order: str = "index"
    """Order in which agents are encoded and decide: index; random, another at every step; hilbert,
    along a space-filling curve, or sweep, band by band, where the environment gives positions; or
    package.module:function, which returns keys [N] of an observation. The dead come last."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    critic: Literal["auto", "shared", "own", "pooled", "joint"] = "auto"
    """What values are read from: shared, the encoder that the decoder reads; or by a network for
    values alone, own, what the agent sees; pooled, that and the mean of all agents'; joint, that
    and the global state, or all agents side by side. auto: the policy's, which are shared (mam,
    mat, …), own (ippo) and joint (mappo)."""
    memory: str | None = None
    """What agents remember of earlier environment steps with, such as mamba (see `mam list`); the
    policy's own if None: none, but of those called rec_…."""
    recurrence: RecurrenceConfig = field(default_factory=RecurrenceConfig)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations; parameters, norms, softmax, step sizes, scan states and a critic of
    its own are float32 always."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory for more time, for very many
    agents."""
    agent_chunk: int | None = None
    """Agents that state-space mixers read at a time, handing on their states, with the same
    results; all if None. For tens of thousands of agents: less memory for a little more time, in
    learning, too, where chunks are computed again in the backward pass."""
    observation_norm: Literal["running", "layer"] = field(
        default="running", metadata={"before": "layer"}
    )
    """How features and the global state are normalised: each by its mean and deviation so far, or
    all of one agent's by each other's (LayerNorm), which hides one or two features, and small ones
    beside large ones."""
    image: Literal["cnn", "scan2d"] = "cnn"
    """What reads an agent's image, where the task gives one: cnn, small convolutions, or scan2d,
    selective scans along rows and columns, each in both directions."""
    image_width: int = 16
    """Channels of a cell there: of scan2d's tokens, and of cnn's first layer, the others of which
    have twice as many."""
    plain: bool = False
    """Layers of the independent policies without norms, with ReLU in place of GELU, and heads
    without a hidden layer: what most libraries call MAPPO, and faster."""
    scan: Literal["auto", "sequential", "associative", "pairwise", "native", "pallas"] = "auto"
    """How Mamba's scan is computed: auto takes what is fastest; associative is the published
    form."""
    mixer_options: tuple[str, ...] = ()
    """Settings that one mixer alone has, such as leak.rate=0.5 for the rate of the policy leak's;
    those of mixers of one's own (see `mam list`)."""

    @property
    def d_inner(self) -> int:
        """Channels inside a Mamba block."""
        return self.expand * self.d_model

    @property
    def resolved_dt_rank(self) -> int:
        """The rank in force."""
        return -(-self.d_model // 16) if self.dt_rank is None else self.dt_rank

    @property
    def layouts(self) -> dict[str, str]:
        """Layouts that are given, by the names of the settings."""
        decoder = self.decoder
        given = {
            "encoder.layout": self.encoder.layout,
            "decoder.layout": decoder.layout,
            "decoder.cross": decoder.cross,
        }
        return {f"network.{name}": layout for name, layout in given.items() if layout is not None}

    @property
    def num_ssm_heads(self) -> int:
        """Heads of a Mamba-2 block."""
        width = self.head_dim or max(w for w in range(1, 65) if self.d_inner % w == 0)
        return self.d_inner // width


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation on joint actions, with a ratio per agent."""

    lr: float = 5e-4
    """Adam's learning rate."""
    anneal_lr: bool = False
    """Lower the learning rate with every update, linearly, to nothing after the last; constant if
    not."""
    num_envs: int = 64
    """Environments stepped side by side, per seed."""
    rollout_length: int = 128
    """Environment steps between two updates, per environment."""
    sequence_length: int | None = None
    """Steps a policy with memory learns from in one piece, a divisor of rollout_length; whole
    rollouts if None."""
    num_epochs: int = 5
    """Passes over each rollout."""
    num_minibatches: int = 2
    """Gradient steps per pass."""
    gamma: float = 0.99
    """Discount per environment step."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation."""
    clip_eps: float = 0.2
    """Clipping range of the probability ratio, and of the value's change."""
    ent_coef: float = 0.01
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    normalise_value: bool = field(default=True, metadata={"before": False})
    """Learn values less the targets' mean and, where it is above 1, over their deviation
    (Pop-Art)."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this global norm."""
    recompute_log_prob: bool = False
    """Take the old log-probabilities from a pass of the learner in place of acting's: ratios start
    at exactly 1."""


@dataclass(frozen=True)
class CloningConfig:
    """Imitation of a dataset (--learn bc, or beside PPO), in minibatches as PPO's."""

    top_fraction: float = 1.0
    """Share of the episodes that are imitated: those of the highest returns."""
    held_out: float = 0.1
    """Share of these that are not learned from: the likelihood of their actions, and how often
    they are the policy's most likely ones, are reported with every evaluation."""
    value_coef: float = 0.0
    """Weight of the value loss, for a critic that knows the recorded returns (--learn bc)."""
    augment: str | None = None
    """A function package.module:function that changes recorded windows before they are learned
    from."""
    nll_coef: float = 1.0
    """Weight of imitation beside PPO (--learn ppo --data DIR), which falls to 0 linearly …"""
    nll_until: float = 0.5
    """… until this share of the run."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Easing in a run that starts from another's weights (--init)."""

    critic_warmup: int = 0
    """Updates at first in which only what values alone depend on learns."""
    kl_coef: float = 0.0
    """Weight of the divergence from the policy at the start, which falls to 0 linearly."""
    kl_until: float = 0.5
    """Share of the run after which that weight is 0."""
    lr_warmup: int = 0
    """Updates over which the learning rate rises, linearly."""


@dataclass(frozen=True)
class DistillConfig:
    """Learning from another run's policy (--teacher), in minibatches as PPO's."""

    value_coef: float = 0.5
    """Weight of the value loss: the critic learns what the teacher's says, or nothing if 0."""
    teacher_share: float = 1.0
    """Share of the steps at which the teacher acts, which falls to 0 linearly; the student acts at
    the others, and learns there, too, what the teacher would do."""
    teacher_until: float = 0.5
    """Share of the run after which that share is 0."""
    kl_coef: float = 1.0
    """Weight of the divergence from the teacher beside PPO (--learn ppo --teacher RUN), which falls
    to 0 linearly until teacher_until; the policy alone acts."""
    matrix_updates: int = 0
    """Updates at first in which mixers learn to be the matrices that the teacher's are (MOHAWK)."""
    hidden_updates: int = 0
    """Updates then in which blocks learn to put out what the teacher's do. With any of both, the
    student starts with all of the teacher's weights but those of mixers, and is as wide and
    deep."""

    @property
    def staged(self) -> bool:
        """Whether mixers are aligned with the teacher's before actions are learned."""
        return self.matrix_updates + self.hidden_updates > 0


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of the current weights during training, and of the best ones after it."""

    num_evaluations: int = 20
    """Evenly spaced evaluations, besides one before training; the last one is of the final
    weights."""
    num_episodes: int = 32
    """Episodes per evaluation."""
    num_absolute_episodes: int = 320
    """Fresh episodes played by the best weights after training: the absolute metric."""
    max_episode_steps: int = 10_000
    """Steps after which an episode that has not ended is cut off, and counted as unfinished."""
    greedy: bool = False
    """What counts is the return of the most likely actions instead of sampled ones; the other is
    reported beside."""
    both_modes: bool = True
    """Play as many episodes in the other mode, to report it beside. A simulator's steps are not
    free."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saves of a running run, besides those at its end and when it is stopped.

    They change no numbers.
    """

    seconds: float = 300.0
    """Time between two saves; 0 saves after every update."""
    keep: int = 2
    """The newest saves that are kept, in case the last one is damaged."""


@dataclass(frozen=True)
class WorkerConfig:
    """Processes that step environments outside JAX.

    How long they may take, and how often they may fail.
    """

    step_timeout: float = 60.0
    """Seconds that one step of one environment may take before its process is taken for dead."""
    reset_timeout: float = 300.0
    """Seconds that making or resetting one environment may take."""
    max_restarts: int = 100
    """Restarts, after crashes and exceptions, before the run is saved and ended with exit code
    1."""


@dataclass(frozen=True)
class Config:
    """One training run: everything that decides its numbers."""

    policy: str = "mam"
    """Policy, such as mam or mappo, or package.module:make of one's own; `mam list` explains them
    all."""
    env: str = "lbf/2s-8x8-2p-2f-coop"
    """Task as suite/task, suite/auto:agents=64, pettingzoo/module:env or package.module:factory;
    see `mam list`."""
    curriculum: tuple[str, ...] = ()
    """Options of --env to begin with, each for some environment steps, such as agents=8@200000
    agents=32@100000: the last ones are followed by --env itself, which every evaluation plays. The
    last ones without steps, such as agents=8, are trained on to the end."""
    agent_id: Literal["one_hot", "sinusoid", "none"] = "one_hot"
    """How agents see who they are; sinusoid has 16 features for any number of agents, one_hot one
    per agent."""
    learn: Literal["ppo", "bc", "distill"] = "ppo"
    """What is learned: ppo, the task's reward; bc, the actions of the dataset --data; distill, what
    the policy of the run --teacher does."""
    data: str | None = None
    """Folder of the dataset to imitate (see `mam record`), or to imitate at first beside PPO."""
    teacher: str | None = None
    """What is distilled (see `mam distill`), or learned from at first beside PPO: the folder of a
    run or of an exported policy, or zoo:NAME."""
    init: str | None = None
    """Whose best weights are the start: the folder of a run or of an exported policy, or zoo:NAME;
    drawn at random if None."""
    init_partial: bool = False
    """Take those weights of --init that fit, and draw the others."""
    num_workers: int | None = None
    """Processes that step environments which are not JAX programs; one per CPU core if None."""
    seed: int = 0
    """First seed; the run trains seeds seed … seed + num_seeds − 1."""
    num_seeds: int = 1
    """Independent seeds trained side by side in one program."""
    total_timesteps: int = 1_000_000
    """Environment steps per seed (not multiplied by the agents); rounded up to whole updates."""
    decode: Literal["sequential", "fixed_point", "kernel"] = "sequential"
    """How agents' actions are computed: one after another, all at once until nothing changes (the
    same actions), or one after another in a single CUDA kernel of half precision (mam, mam2; with
    --ppo.recompute-log-prob)."""
    decode_window: int | None = None
    """Agents in one fixed point; all of them if None."""
    decode_max_passes: int | None = None
    """Passes over a window before its agents decide one after another; no limit if None."""
    num_devices: int | None = None
    """Devices the environments are spread over; all there are if None."""
    on_non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """What to do with an update in which a number is NaN or infinite, after which the state is that
    of before: end the run, go on with other random numbers, or do so with half the learning
    rate."""
    log: tuple[str, ...] = ("jsonl", "tensorboard")
    """Where numbers go besides the terminal: jsonl (always), tensorboard, csv, wandb, mlflow,
    trackio, or what an installed package adds under its own name; see docs/runs.md. Changes no
    numbers."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    cloning: CloningConfig = field(default_factory=CloningConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)

    def __post_init__(self):
        _validate(self)

    @property
    def schedules(self) -> list[str]:
        """Names of the settings in force that change something in the course of the run."""
        taught = self.learn == "distill" or self.teacher is not None
        shown = self.learn == "ppo" and self.data is not None
        return [
            *["ppo.anneal_lr"] * self.ppo.anneal_lr,
            *["finetune.kl_until"] * (self.finetune.kl_coef > 0),
            *["distill.teacher_until"] * taught,
            *["cloning.nll_until"] * shown,
        ]

    @property
    def algorithm(self) -> str:
        """The policy's name in tables and files, with what is not its own.

        These are layouts, memory and what it reads, the order of agents, the published encoder,
        plain layers, the critic, and what reads images.
        """
        encoder, decoder = self.network.encoder, self.network.decoder
        parts = (("enc", encoder.layout), ("dec", decoder.layout), ("cross", decoder.cross))
        memory = [self.network.memory] if self.network.memory else []
        memory += ["action"] * self.network.recurrence.last_action
        memory += {"on": ["clock"], "off": ["noclock"]}.get(self.network.recurrence.clock, [])
        order = self.network.order.rpartition(":")[2]
        scans, local = str(encoder.order_scans), f"local{encoder.local_branch}"
        sequence = [order + scans * (encoder.order_scans > 1)] * (order != "index")
        sequence += [local] * (encoder.local_branch > 0)
        learn = [self.learn] * (self.learn != "ppo")
        learn += ["taught"] * (self.learn == "ppo" and self.teacher is not None)
        learn += ["shown"] * (self.learn == "ppo" and self.data is not None)
        learn += ["curriculum"] * bool(self.curriculum)
        unlike = ["product"] * (encoder.combine == "product") + ["plain"] * self.network.plain
        unlike += [self.network.critic] * (self.network.critic != "auto")
        unlike += [self.network.image] * (self.network.image != "cnn")
        return "-".join(
            [
                self.policy,
                *(f"{name}{layout}" for name, layout in parts if layout),
                *memory,
                *sequence,
                *unlike,
                *learn,
            ]
        )

    @property
    def steps_per_update(self) -> int:
        """Environment steps in one rollout of one seed."""
        return self.ppo.num_envs * self.ppo.rollout_length

    @property
    def num_updates(self) -> int:
        """Updates in the run."""
        return self._updates(self.total_timesteps)

    def _updates(self, timesteps: int) -> int:
        return -(-timesteps // self.steps_per_update)

    @property
    def stages(self) -> tuple[tuple[int, str], ...]:
        """First update and options of each stage; none for the task as it is."""
        first, stages = 0, []
        for stage in self.curriculum:
            options, ends, timesteps = stage.partition("@")
            stages.append((first, options))
            if not ends:
                return tuple(stages)
            first += self._updates(int(timesteps))
        return (*stages, (first, ""))

    def stage(self, update: int) -> int:
        """Return the place in `stages` of the one that the update after so many belongs to."""
        return max(i for i, (first, _) in enumerate(self.stages) if first <= update)

    @property
    def num_evaluations(self) -> int:
        """Evaluations in the run: as many as asked for, but no more than there are updates."""
        return min(self.eval.num_evaluations, self.num_updates)

    @property
    def evaluation_modes(self) -> tuple[bool, ...]:
        """Whether actions are greedy, in each mode that is played: the one that counts first."""
        return (
            (self.eval.greedy, not self.eval.greedy)
            if self.eval.both_modes
            else (self.eval.greedy,)
        )

    @property
    def mode_beside(self) -> str:
        """The name in metrics of the mode that does not count."""
        return "sampled" if self.eval.greedy else "greedy"

    @property
    def num_evaluation_episodes(self) -> int:
        """Episodes that one seed plays in evaluations and for the absolute metric."""
        once = (1 + self.num_evaluations) * self.eval.num_episodes + self.eval.num_absolute_episodes
        return once * len(self.evaluation_modes)

    def evaluate_after(self, update: int) -> bool:
        """Say whether the weights after this many updates are evaluated; the last always are."""
        count = self.num_evaluations
        return (update * count) // self.num_updates > ((update - 1) * count) // self.num_updates


_POSITIVE = (
    ("total_timesteps", "num_seeds"),
    ("d_model", "num_blocks", "num_heads", "d_state", "d_conv", "expand", "image_width"),
    (
        "num_envs",
        "rollout_length",
        "num_epochs",
        "num_minibatches",
        "lr",
        "clip_eps",
        "max_grad_norm",
    ),
    ("num_evaluations", "num_episodes", "num_absolute_episodes", "max_episode_steps"),
    ("keep",),
    ("step_timeout", "reset_timeout"),
)
_GROUPS = ("network", "ppo", "eval", "checkpoint", "worker")


def _validate(config: Config) -> None:
    """Refuse values that no run could have, naming the key and what is allowed."""
    groups = [("", config), *((f"{name}.", getattr(config, name)) for name in _GROUPS)]
    for (prefix, group), names in zip(groups, _POSITIVE, strict=True):
        for name in names:
            if not getattr(group, name) > 0:
                raise UserError(f"{prefix}{name} must be positive, got {getattr(group, name)}")
    _check_choices(config)
    memory = config.network.memory or ""
    # They stand in messages, pages and file names.
    names = {"policy": config.policy, "env": config.env, "network.memory": memory}
    names |= {"network.order": config.network.order}
    names |= {"cloning.augment": config.cloning.augment or ""}
    for name, value in names.items():
        if not value.isprintable():
            raise UserError(f"{name} must be one line of printable text, got {shown(value)}")
    for name in ("num_workers", "num_devices", "decode_window", "decode_max_passes"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise UserError(f"{name} must be positive, got {value}")
    if config.decode != "fixed_point" and (config.decode_window or config.decode_max_passes):
        raise UserError("decode_window and decode_max_passes belong to --decode fixed_point")
    if not config.log:
        raise UserError(f"log must name where numbers go, such as jsonl, got {config.log}")
    for name, value in (
        ("checkpoint.seconds", config.checkpoint.seconds),
        ("worker.max_restarts", config.worker.max_restarts),
    ):
        if not value >= 0:
            raise UserError(f"{name} must not be negative, got {value}")
    if not 0 <= config.seed <= MAX_SEED - config.num_seeds + 1:
        last = MAX_SEED - config.num_seeds + 1
        raise UserError(
            f"seed must lie in 0 … {last:,} with {config.num_seeds} seeds, got {config.seed}"
        )
    _check_ppo(config.ppo)
    _check_learning(config)
    _check_curriculum(config)
    _check_network(config.network)
    _check_finite(config)


def _check_ppo(ppo: PPOConfig) -> None:
    """Refuse coefficients out of range, and sequences or minibatches that a rollout cannot give."""
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(ppo, name) <= 1:
            raise UserError(f"ppo.{name} must lie in [0, 1], got {getattr(ppo, name)}")
    for name in ("ent_coef", "vf_coef"):
        if not getattr(ppo, name) >= 0:
            raise UserError(f"ppo.{name} must not be negative, got {getattr(ppo, name)}")
    length, num_steps = ppo.sequence_length, ppo.num_envs * ppo.rollout_length
    if length is not None and (length < 1 or ppo.rollout_length % length):
        raise UserError(
            f"ppo.sequence_length must divide ppo.rollout_length = {ppo.rollout_length}, "
            f"got {length} (None: whole rollouts)"
        )
    if num_steps % ppo.num_minibatches:
        raise UserError(
            f"ppo.num_minibatches must divide ppo.num_envs × ppo.rollout_length "
            f"= {num_steps}, got {ppo.num_minibatches}"
        )


def _check_learning(config: Config) -> None:
    """Refuse imitation without a dataset or on several devices, and shares that are none."""
    for option, what, needed, allowed in (
        ("data", "a dataset", "bc", ("bc", "ppo")),
        ("teacher", "a run", "distill", ("distill", "ppo")),
    ):
        given = getattr(config, option) is not None
        if config.learn == needed and not given:
            raise UserError(f"--learn {needed} learns from {what}: give --{option}, its folder")
        if given and config.learn not in allowed:
            raise UserError(f"--learn {config.learn} does not learn from {what}: drop --{option}")
    if config.env == "dataset" and config.data is None:
        raise UserError("--env dataset is the task of a dataset: give --data, its folder")
    if config.env == "dataset" and config.learn != "bc":
        raise UserError(f"--env dataset cannot be played: --learn bc, not {config.learn}")
    if config.data is not None and config.num_devices not in (None, 1):
        raise UserError(f"num_devices must be 1 with a dataset, got {config.num_devices}")
    cloning, finetune, distill = config.cloning, config.finetune, config.distill
    for name, value in (
        ("cloning.top_fraction", cloning.top_fraction),
        ("cloning.nll_until", cloning.nll_until),
        ("finetune.kl_until", finetune.kl_until),
        ("distill.teacher_until", distill.teacher_until),
    ):
        if not 0 < value <= 1:
            raise UserError(f"{name} must lie in (0, 1], got {value}")
    if distill.staged and config.learn != "distill":
        raise UserError(
            "distill.matrix_updates and distill.hidden_updates belong to --learn distill"
        )
    if cloning.value_coef and config.data is not None and config.learn == "ppo":
        raise UserError(
            "cloning.value_coef belongs to --learn bc: beside PPO the critic learns the task's"
        )
    if not 0 <= distill.teacher_share <= 1:
        raise UserError(f"distill.teacher_share must lie in [0, 1], got {distill.teacher_share}")
    if not 0 <= cloning.held_out < 1:
        raise UserError(f"cloning.held_out must lie in [0, 1), got {cloning.held_out}")
    for name, value in (
        ("cloning.value_coef", cloning.value_coef),
        ("cloning.nll_coef", cloning.nll_coef),
        ("finetune.critic_warmup", finetune.critic_warmup),
        ("finetune.kl_coef", finetune.kl_coef),
        ("finetune.lr_warmup", finetune.lr_warmup),
        ("distill.kl_coef", distill.kl_coef),
        ("distill.value_coef", distill.value_coef),
        ("distill.matrix_updates", distill.matrix_updates),
        ("distill.hidden_updates", distill.hidden_updates),
    ):
        if not value >= 0:
            raise UserError(f"{name} must not be negative, got {value}")
    of_values = {"bc": ("cloning", cloning.value_coef), "distill": ("distill", distill.value_coef)}
    group, value_coef = of_values.get(config.learn, ("", 1.0))
    if finetune.critic_warmup and not value_coef:
        raise UserError(
            f"finetune.critic_warmup has a critic to warm up only with {group}.value_coef above 0"
        )
    if config.init is None and (config.init_partial or finetune.kl_coef):
        raise UserError("--init-partial and --finetune.kl-coef need --init, the run to start from")


def _check_curriculum(config: Config) -> None:
    """Refuse stages that cannot be read, are empty, or leave nothing for what follows them."""
    for place, stage in enumerate(config.curriculum, 1):
        ends = "?" * (place == len(config.curriculum))
        if not re.fullmatch(rf"\w+=[^,@\s]+(,\w+=[^,@\s]+)*(@0*[1-9]\d*){ends}", stage):
            raise UserError(
                "curriculum is written options@steps, such as agents=8@200000, the last with or "
                f"without its steps, got {shown(stage)}"
            )
    if config.curriculum and config.data is not None:
        raise UserError("curriculum is for a task that is played, not for a dataset: drop --data")
    first, options = config.stages[-1]
    if first >= config.num_updates:
        raise UserError(
            f"curriculum takes {first} of the {config.num_updates} updates: nothing is left for "
            f"{options or config.env}; raise total_timesteps, or leave out the last @steps"
        )


def _check_network(network: NetworkConfig) -> None:
    """Refuse layouts that no file name takes, and widths that cannot be cut into heads."""
    for name, layout in network.layouts.items():
        # The mixers are known to networks alone; the layout stands in file names.
        if not re.fullmatch("[A-Za-z0-9]+", layout):
            raise UserError(f"{name} must be a letter per block, such as MA, got {shown(layout)}")
    for option in network.mixer_options:
        if not re.fullmatch(r"\w+\.\w+=\S+", option):
            raise UserError(
                f"network.mixer_options are written policy.setting=value, got {shown(option)}"
            )
    if network.d_model % network.num_heads:
        raise UserError(
            f"network.num_heads must divide network.d_model = {network.d_model}, "
            f"got {network.num_heads}"
        )
    if network.head_dim is not None and (
        network.head_dim < 1 or network.d_inner % network.head_dim
    ):
        raise UserError(
            f"network.head_dim must divide the inner width {network.d_inner}, "
            f"got {network.head_dim}"
        )
    if not 0 <= network.retention_decay <= 1:
        raise UserError(
            f"network.retention_decay must lie in [0, 1], got {network.retention_decay}"
        )
    encoder = network.encoder
    if encoder.order_scans < 1 or (encoder.order_scans > 1 and network.order != "hilbert"):
        raise UserError(
            "network.encoder.order_scans must be 1, or positive with network.order hilbert, "
            f"got {encoder.order_scans}"
        )
    if encoder.local_branch and (encoder.local_branch < 0 or encoder.local_branch % 2 == 0):
        raise UserError(
            f"network.encoder.local_branch must be odd, or 0, got {encoder.local_branch}"
        )
    recurrence = network.recurrence
    for name in ("d_state", "d_conv", "expand"):
        if getattr(recurrence, name) < 1:
            raise UserError(
                f"network.recurrence.{name} must be positive, got {getattr(recurrence, name)}"
            )
    if not 0 < recurrence.dt_min <= recurrence.dt_max:
        raise UserError(
            "network.recurrence.dt_min must be positive and at most dt_max "
            f"= {recurrence.dt_max}, got {recurrence.dt_min}"
        )
    for name in ("dt_rank", "agent_chunk"):
        value = getattr(network, name)
        if value is not None and value < 1:
            raise UserError(f"network.{name} must be positive, got {value}")


def _check_choices(group: Any, prefix: str = "") -> None:
    """Refuse values that are none of a few words, in this group and all below it."""
    for setting in dataclasses.fields(group):
        value = getattr(group, setting.name)
        if dataclasses.is_dataclass(value):
            _check_choices(value, f"{prefix}{setting.name}.")
        elif typing.get_origin(setting.type) is Literal:
            _checked(prefix + setting.name, value, setting.type)


def _check_finite(group: Any) -> None:
    """Refuse non-finite values, and whole numbers that no array can hold."""
    for name, value in flat(to_json(group)).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} must be finite, got {value}")
        if type(value) is int and abs(value) > MAX_INT:
            raise UserError(f"{name} must lie within ±{MAX_INT:,}, got {value}")


def to_json(config: Any) -> dict[str, Any]:
    """Return a config as plain dictionaries."""
    return dataclasses.asdict(config)


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries, with `prefix` and dots in the keys, as in `ppo.lr`."""
    found = {}
    for name, value in data.items():
        found |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return found


def from_json(
    kind: type[T], data: dict[str, Any], prefix: str = "", whole: dict[str, Any] | None = None
) -> T:
    """Build a config from what `to_json` of this version or an older one wrote.

    A missing key takes the value that does what runs did before there was one: its default, if its
    metadata do not say otherwise (`before`: a value, or what returns it for the whole file).

    Args:
        kind: the dataclass.
        data: its values by name, groups as dictionaries.
        prefix: of names in messages.
        whole: the file's values, of which these are a part; these are all if None.

    Raises:
        UserError: for an unknown key or a value of the wrong type, naming it.
    """
    types = typing.get_type_hints(kind)
    settings = dataclasses.fields(typing.cast(Any, kind))
    whole = data if whole is None else whole
    before = {s.name: s.metadata["before"] for s in settings if "before" in s.metadata}
    values = {name: x(whole) if callable(x) else x for name, x in before.items()}
    data = {
        name: {} for name, expected in types.items() if dataclasses.is_dataclass(expected)
    } | data
    for name, value in data.items():
        if name not in types:
            raise unknown_name(
                "key", prefix + name, [prefix + n for n in types], see="mam train --help"
            )
        expected = types[name]
        if dataclasses.is_dataclass(expected):
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{name} must be a group of keys, got {shown(value)}")
            values[name] = from_json(typing.cast(type, expected), value, f"{prefix}{name}.", whole)
        else:
            values[name] = _checked(prefix + name, value, expected)
    return kind(**values)


def _checked(name: str, value: Any, expected: Any) -> Any:
    """Return a value if it has the type; an int passes for a float, a bool for nothing else."""
    allowed = typing.get_args(expected) or (expected,)
    if typing.get_origin(expected) is Literal:
        if value not in allowed:
            raise UserError(
                f"{name} must be one of {', '.join(map(str, allowed))}, got {shown(value)}"
            )
        return value
    if typing.get_origin(expected) is tuple:
        listed = isinstance(value, list | tuple) and (
            allowed[-1] is Ellipsis or len(value) == len(allowed)
        )
        if not listed or not all(type(item) is allowed[0] for item in value):
            raise UserError(f"{name} must be a list of {allowed[0].__name__}, got {shown(value)}")
        return tuple(value)
    if float in allowed and type(value) is int:
        return float(value)
    for kind in allowed:
        if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
            return _checked(name, value, kind)
    if type(value) not in allowed:
        names = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
        raise UserError(f"{name} must be {names}, got {shown(value)}")
    return value
