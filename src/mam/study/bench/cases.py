"""What can be compared: the candidates of each bench, and the sizes at which they meet."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from mam.config import Config, EncoderConfig, NetworkConfig, PPOConfig
from mam.envs.probes import PROBES
from mam.envs.wrappers import AgentId, AutoReset, EpisodeStatistics
from mam.kernels.cuda.scan import kernel_supports
from mam.kernels.native.library import use_native, without_native
from mam.kernels.selective_scan import has_cuda, selective_scan
from mam.kernels.ssd import ssd
from mam.learning.objective import Batch
from mam.learning.ppo import PPO
from mam.learning.rollout import init_rollout_state, rollout
from mam.learning.train import Learner, TrainState, with_statistics
from mam.learning.update import make_optimiser, update
from mam.networks.decoding.cuda import kernel_supports as decode_kernel_supports
from mam.networks.decoding.decide import DecodeInputs, Decoding, decide
from mam.networks.embed import ObservationEmbedding
from mam.networks.mixers.registry import mixer_families
from mam.networks.policy import INDEPENDENT, RECURRENT
from mam.study.bench.baselines import act_uncached, matched_sizes, matched_width
from mam.study.bench.inputs import (
    NUM_ACTIONS,
    count,
    normal,
    policy_shapes,
    random_batch,
    random_like,
    random_observation,
    random_policy,
    synthetic_images,
    synthetic_task,
)
from mam.study.bench.measure import Candidate, Case, Cell, Skip
from mam.study.bench.serving import RUNTIMES, SERVED, served
from mam.types import EnvSpec, Observation, Policy

SCANS = ("associative", "sequential", "pairwise", "native", "pallas")
DecodeMethod = Literal["sequential", "fixed_point", "kernel"]
NUM_AGENTS = (4, 16, 64, 256)  # of most benches
PAIRWISE_AGENTS = 3  # the sum over pairs is unrolled, and takes minutes to compile for many
SEQUENCE_LENGTH = (
    128  # steps that an update with memory learns from at a time, if there are so many
)
ROLLOUT_LENGTH = 16  # environment steps in a train step; the shares of time do not depend on it
IMAGE_SIDES = (5, 10, 20)  # cells
PER_AGENT = {"per_agent_us": lambda cell, seconds: 1e6 * seconds / cell.num_agents}


def _both_ways(function: Callable[..., Array]) -> Callable[..., tuple[Array, PyTree]]:
    """Make a function also return its arguments' gradients, for a given gradient of its output."""

    def run(gradient: Array, *args: Any) -> tuple[Array, PyTree]:
        y, pull_back = jax.vjp(function, *args)
        return y, pull_back(gradient)

    return run


def _scan(implementation: str, cell: Cell) -> Candidate:
    """Build Mamba's scan, forward and backward."""
    if implementation == "pairwise" and cell.num_agents > PAIRWISE_AGENTS:
        raise Skip(f"made for N ≤ {PAIRWISE_AGENTS}")
    d_inner, d_state = cell.network.d_inner, cell.network.d_state
    if implementation == "pallas" and not has_cuda():
        raise Skip("made for CUDA")
    if implementation == "native" and not use_native():
        raise Skip("no native kernels, or not only CPUs")
    if implementation == "pallas" and not kernel_supports(cell.num_agents, d_inner, d_state):
        raise Skip(f"takes no d_inner = {d_inner} with d_state = {d_state}")
    A = -jnp.broadcast_to(jnp.arange(1.0, d_state + 1), (d_inner, d_state))

    def scan(*args: Array) -> Array:
        return selective_scan(*args, implementation=implementation)[0]

    return _scan_candidate(scan, cell, A, heads=d_inner)


def _ssd(implementation: Literal["products", "native"], cell: Cell) -> Candidate:
    """Build Mamba-2's scan, forward and backward."""
    if implementation == "native" and not use_native():
        raise Skip("no native kernels, or not only CPUs")
    heads = cell.network.num_ssm_heads

    def scan(*args: Array) -> Array:
        return ssd(*args, implementation=implementation)[0]

    return _scan_candidate(scan, cell, -jnp.arange(1.0, heads + 1), heads=heads)


def _scan_candidate(scan: Callable[..., Array], cell: Cell, A: Array, *, heads: int) -> Candidate:
    shape, dtype = (cell.batch, cell.num_agents), cell.network.dtype
    x, gradient = normal(2, *shape, cell.network.d_inner).astype(dtype)
    dt = 0.1 * jax.nn.sigmoid(normal(*shape, heads, seed=1))
    B, C = normal(2, *shape, cell.network.d_state, seed=2).astype(dtype)
    return Candidate(
        _both_ways(scan), (gradient, x, dt, A, B, C, jnp.ones(heads)), baseline="associative"
    )


def _block(family: str, role: str, cell: Cell) -> Candidate:
    """Build one mixer, forward and backward."""
    build = partial(mixer_families()[family].build, role, cell.network)
    mixer = random_like(jax.eval_shape(lambda key: build(key=key), jax.random.key(0)))
    x, context, gradient = normal(3, cell.batch, cell.num_agents, cell.network.d_model).astype(
        cell.network.dtype
    )

    def mix(mixer: Any, x: Array, context: Array) -> Array:
        return mixer(x, context)

    args = (gradient, mixer, x, context)
    return Candidate(_both_ways(mix), args, baseline=f"attention/{role}", parameters=count(mixer))


def _image(encoder: str, side: int, cell: Cell, *, as_large_as: str | None = None) -> Candidate:
    """Build what makes d_model numbers of an image, forward and backward to its weights."""
    spec = synthetic_images(cell.num_agents, side)

    def shapes(config: NetworkConfig) -> Any:
        return jax.eval_shape(
            lambda key: ObservationEmbedding(spec, config, key=key), jax.random.key(0)
        )

    sizes = partial(replace, cell.network, image=encoder)
    config, note = sizes(), ""
    if as_large_as is not None:
        parameters = count(shapes(replace(config, image=as_large_as)))
        width = matched_width(lambda width: count(shapes(sizes(image_width=width))), parameters)
        config, note = sizes(image_width=width), f"image_width {width}"
    embed = random_like(shapes(config))
    gradient = normal(cell.batch, cell.num_agents, config.d_model)

    def run(gradient: Array, embed: Any, obs: Observation) -> tuple[Array, PyTree]:
        return _both_ways(lambda embed: embed(obs))(gradient, embed)

    args = (gradient, embed, random_observation(spec, cell.batch))
    baseline = f"cnn/{side}x{side}"
    return Candidate(run, args, baseline=baseline, parameters=count(embed), note=note)


def _act(
    name: str, cell: Cell, *, cached: bool = True, decode: DecodeMethod = "sequential"
) -> Candidate:
    """Build one joint action per environment, encoder included."""
    spec = synthetic_task(cell.num_agents)
    policy = random_policy(name, spec, cell.network, _decoding(name, spec, cell, decode))
    obs = random_observation(spec, cell.batch)
    keys, reset = jax.random.split(jax.random.key(0), cell.batch), jnp.zeros(cell.batch, bool)
    shared = {"args": (policy, obs, keys), "baseline": "mat", "parameters": count(policy)}
    if cached:
        memory = policy.init_memory((cell.batch,))
        return Candidate(
            lambda policy, obs, keys: policy.act(memory, obs, reset, keys)[1], **shared
        )
    return Candidate(act_uncached, steps=cell.num_agents, **shared)


def _decode(name: str, cell: Cell, *, decode: DecodeMethod = "sequential") -> Candidate:
    """Build one joint action per environment, given the encoder's output and the noise."""
    spec = synthetic_task(cell.num_agents)
    policy: Any = random_policy(name, spec, cell.network)
    decoding = _decoding(name, spec, cell, decode)
    obs_rep = normal(cell.batch, cell.num_agents, cell.network.d_model).astype(cell.network.dtype)
    noise = normal(cell.batch, cell.num_agents, NUM_ACTIONS, seed=1)

    def choose(policy: Any, obs_rep: Array, noise: Array) -> Any:
        inputs = DecodeInputs(
            context=policy.decoder.read(obs_rep), mask=jnp.ones(noise.shape, bool), noise=noise
        )
        return decide(policy.decoder, policy.distribution, inputs, decoding)

    return Candidate(
        choose, (policy, obs_rep, noise), baseline="mat", parameters=count(policy.decoder)
    )


def _decoding(name: str, spec: EnvSpec, cell: Cell, decode: DecodeMethod) -> Decoding:
    """Return the way to decode; raise Skip for a kernel where there is none."""
    if decode == "kernel":
        if not has_cuda():
            raise Skip("made for CUDA")
        policy: Any = policy_shapes(name, spec, cell.network)
        if not decode_kernel_supports(policy.decoder):
            raise Skip("no decode kernel for these sizes")
    return Decoding(decode)


def _update(name: str, cell: Cell, **changes: Any) -> Candidate:
    """Build one gradient step of PPO on random data."""
    spec, config = synthetic_task(cell.num_agents), replace(cell.network, **changes)
    ppo = PPOConfig(num_epochs=1, num_minibatches=1)
    return _update_candidate(
        random_policy(name, spec, config), spec, cell.batch, SEQUENCE_LENGTH, ppo, baseline="mat"
    )


def _update_matched(name: str, other: str, cell: Cell) -> Candidate:
    """Build one gradient step of a policy with as many parameters as another policy has."""
    spec = synthetic_task(cell.num_agents)
    config = matched_sizes(
        name, spec, cell.network, count(policy_shapes(other, spec, cell.network))
    )
    return replace(_update(name, replace(cell, network=config)), note=f"d_model {config.d_model}")


def _update_candidate(
    policy: Policy, spec: EnvSpec, steps: int, length: int, ppo: PPOConfig, *, baseline: str
) -> Candidate:
    """Build a whole update on that many environment steps, in sequences of `length`."""
    optimiser = make_optimiser(ppo)

    def learn(policy: Policy, opt_state: Any, batch: Batch, key: Key[Array, ""]) -> Any:
        return update(policy, opt_state, batch, key, optimiser, PPO(ppo), ppo)

    args = (
        policy,
        optimiser.init(cast(Any, policy)),
        random_batch(policy, spec, steps, length),
        jax.random.key(2),
    )
    return Candidate(learn, args, baseline=baseline, parameters=count(policy))


def _through_xla(build: Callable[[Cell], Candidate], cell: Cell) -> Candidate:
    """Build a candidate without the kernels made for the device: native ones, or CUDA's scan."""
    if has_cuda():
        return build(replace(cell, network=replace(cell.network, scan="sequential")))
    if not use_native():
        raise Skip("there are no native kernels to do without")
    candidate = build(cell)

    def run(*args: Any) -> Any:
        with without_native():
            return candidate.function(*args)

    return replace(candidate, function=run)


def _train(name: str, part: str | None, cell: Cell) -> Candidate:
    """Build a whole train step, or the part of it that acts, or the part that updates."""
    config = Config(
        name,
        network=cell.network,
        ppo=PPOConfig(num_envs=cell.batch, rollout_length=ROLLOUT_LENGTH),
    )
    env = replace(PROBES["identity"](), num_agents=cell.num_agents, num_actions=NUM_ACTIONS)
    envs = AutoReset(EpisodeStatistics(AgentId(env, "sinusoid")), cell.batch)
    learner, policy = (
        Learner(config, envs.spec, PPO(config.ppo)),
        random_policy(name, envs.spec, cell.network),
    )
    if part == "update":
        return _update_candidate(
            policy, envs.spec, config.steps_per_update, ROLLOUT_LENGTH, config.ppo, baseline=name
        )
    key, normalised = jax.random.key(0), with_statistics(policy, config, envs.spec)
    state = TrainState(
        policy=normalised,
        opt_state=learner.optimiser.init(cast(Any, policy)),
        actors=jax.jit(partial(init_rollout_state, envs))(normalised, key),
        best_policy=normalised,
        best_return=jnp.zeros(()),
        best_beside=None,
        key=key,
        num_updates=jnp.zeros((), jnp.int32),
    )

    def act(state: TrainState, key: Key[Array, ""]) -> Any:
        return rollout(envs, state.policy, state.actors, key, ROLLOUT_LENGTH)

    def step(state: TrainState, key: Key[Array, ""]) -> Any:
        act_key, update_key = jax.random.split(key)
        carry, found = act(state, act_key)
        return learner.learn(state, carry, found, update_key)

    return Candidate(
        act if part else step,
        (state, key),
        baseline=name if part else "mat",
        parameters=count(policy),
    )


def _ways_to_act(
    act: Callable[..., Candidate], names: list[str]
) -> dict[str, Callable[[Cell], Candidate]]:
    """List these policies; fused decoders also through XLA, in one kernel, and as a fixed point."""
    found: dict[str, Callable[[Cell], Candidate]] = {name: partial(act, name) for name in names}
    for family in mixer_families().values():
        decoder = jax.eval_shape(
            lambda key, family=family: family.build("decoder", NetworkConfig(), key=key),
            jax.random.key(0),
        )
        if decoder.fused is None:
            continue
        name = family.policy
        found[f"{name}-xla"] = partial(_through_xla, partial(act, name))
        for method in ("kernel", "fixed_point"):
            found[f"{name}-{method.replace('_', '-')}"] = partial(act, name, decode=method)
    return found


def _policies() -> list[str]:
    """List the policies that see agents as a sequence."""
    return [family.policy for family in mixer_families().values()]


def _with_memory() -> list[str]:
    """List those that remember by a stage of their own."""
    return [f"rec_{name}" for name in RECURRENT if name not in INDEPENDENT]


def cases() -> dict[str, Case]:
    """Return all benches by name, with every kind of mixer there is."""
    return {
        "scan": Case(
            {name: partial(_scan, name) for name in SCANS}
            | {"ssd": partial(_ssd, "products"), "ssd native": partial(_ssd, "native")},
            num_agents=(2, 8, 32, 128, 512),
            tokens=16_384,
        ),
        "block": Case(
            {
                f"{family}/{role}": partial(_block, family, role)
                for role in ("encoder", "decoder", "cross")
                for family in mixer_families()
            },
            num_agents=NUM_AGENTS,
            tokens=8192,
        ),
        "image": Case(
            {
                f"{name}/{side}x{side}": partial(build, side)
                for side in IMAGE_SIDES
                for name, build in {
                    "cnn": partial(_image, "cnn"),
                    "scan2d": partial(_image, "scan2d"),
                    "cnn-matched": partial(_image, "cnn", as_large_as="scan2d"),
                }.items()
            },
            num_agents=(4,),
            tokens=1024,
        ),
        "act": Case(
            _ways_to_act(_act, [*_policies(), *_with_memory()])
            | {"mat-uncached": partial(_act, "mat", cached=False)},
            num_agents=NUM_AGENTS,
            batch=64,
            derived=PER_AGENT,
        ),
        "decode": Case(
            _ways_to_act(_decode, _policies()), num_agents=NUM_AGENTS, batch=64, derived=PER_AGENT
        ),
        "update": Case(
            {name: partial(_update, name) for name in [*_policies(), *_with_memory()]}
            | {
                "mam-xla": partial(_through_xla, partial(_update, "mam")),
                "mat-matched": partial(_update_matched, "mat", "mam"),
                "mam-published": partial(
                    _update, "mam", scan="associative", encoder=EncoderConfig(combine="product")
                ),
            },
            num_agents=NUM_AGENTS,
            tokens=8192,
        ),
        "serve": Case(
            {
                f"{name}/{runtime}": partial(served, name, runtime)
                for name in SERVED
                for runtime in RUNTIMES
            },
            num_agents=(4, 32, 128, 512),
            batch=1,
            calls=200,
        ),
        "train": Case(
            {
                f"{name}/{part}" if part else name: partial(_train, name, part)
                for name in _policies()
                for part in (None, "acting", "update")
            },
            num_agents=(4, 16, 64),
            batch=64,
            derived={
                "env_steps_per_s": lambda cell, seconds: cell.batch * ROLLOUT_LENGTH / seconds
            },
        ),
    }
