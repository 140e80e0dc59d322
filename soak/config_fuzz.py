"""Random configurations: every valid one trains and stays finite, every invalid one is refused.

    python soak/config_fuzz.py              # 300 valid and 300 invalid ones, half an hour
    python soak/config_fuzz.py --valid 5 --invalid 50 --policies mam2

A valid one takes two updates, every fifth an evaluation too, on a probe environment, compiled with
few optimisations. An invalid one has a single setting that is wrong; `mam train` must answer with
exit code 2 and one line that names the setting, and write nothing.
"""

import contextlib
import io
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import tyro

from mam.cli import main as cli
from mam.config import Config, DecoderConfig, EncoderConfig, EvalConfig, NetworkConfig, PPOConfig
from mam.envs.probes import PROBES
from mam.errors import UserError
from mam.learning.train import NON_FINITE, make_train
from mam.networks.memory.registry import MEMORIES
from mam.networks.policy import policies

INDEPENDENT = ("mappo", "ippo", "rec_mappo", "rec_ippo")
WRONG = {
    "--policy": ["mamm", "x", "MAT"],
    "--env": ["probe/none", "nowhere/task", "lbf/2s", "no.such.module:make", "probe/"],
    "--preset": ["nothing"],
    "--agent-id": ["two_hot", "1"],
    "--seed": ["-1", "x", "1.5"],
    "--num-seeds": ["0", "-3", "two"],
    "--num-devices": ["0", "1000", "x"],
    "--total-timesteps": ["0", "-5", "1e-6", "many"],
    "--decode": ["parallel", "0"],
    "--decode-window": ["0", "-1", "8"],
    "--decode-max-passes": ["0", "4"],
    "--on-non-finite": ["ignore", "True"],
    "--network.d-model": ["0", "-64", "64.0", "wide"],
    "--network.num-blocks": ["0", "-1"],
    "--network.num-heads": ["0", "7", "-2"],
    "--network.d-state": ["0", "-16"],
    "--network.d-conv": ["0", "-4"],
    "--network.expand": ["0", "-2", "1.5"],
    "--network.dt-rank": ["0", "-1"],
    "--network.head-dim": ["0", "7", "-8"],
    "--network.dtype": ["float16", "int8"],
    "--network.scan": ["fast", "cuda"],
    "--network.encoder.layout": ["X", "MAX", "m"],
    "--network.critic": ["central", "Joint"],
    "--network.memory": ["lstm", "GRU"],
    "--network.decoder.layout": ["3", "M-A"],
    "--network.decoder.cross": ["Q", "MMMMMM"],
    "--ppo.lr": ["0", "-1e-3", "nan", "small"],
    "--ppo.num-envs": ["0", "-64", "x"],
    "--ppo.rollout-length": ["0", "-1"],
    "--ppo.num-epochs": ["0", "-1"],
    "--ppo.num-minibatches": ["0", "-2", "7919"],
    "--ppo.gamma": ["1.01", "-0.1", "nan"],
    "--ppo.gae-lambda": ["2", "-1", "nan"],
    "--ppo.clip-eps": ["0", "-0.2", "nan"],
    "--ppo.ent-coef": ["-0.01", "nan"],
    "--ppo.vf-coef": ["-1", "nan"],
    "--ppo.max-grad-norm": ["0", "-1", "nan"],
    "--eval.num-evaluations": ["0", "-1"],
    "--eval.num-episodes": ["0", "-1"],
    "--eval.num-absolute-episodes": ["0", "-1"],
    "--checkpoint.seconds": ["-1", "nan", "soon"],
    "--checkpoint.keep": ["0", "-1"],
    "--num-env": ["8"],
    "--ppo.learning-rate": ["1e-3"],
    "--networks.d-model": ["8"],
}


@dataclass(frozen=True)
class Args:
    """How many of each."""

    valid: int = 300
    invalid: int = 300
    policies: tuple[str, ...] = tuple(policies())
    """Of the valid ones."""
    seed: int = 0


def valid(rng: random.Random, names: tuple[str, ...]) -> Config:
    """A configuration that must train."""
    policy = rng.choice(names)
    num_heads = rng.choice([1, 2, 4])
    sequence = policy not in INDEPENDENT
    num_envs, num_minibatches = rng.choice([2, 4, 6]), rng.choice([1, 2])
    letters, blocks = rng.choices("AM2", k=2), rng.choice([1, 2])
    d_model, expand = num_heads * rng.choice([1, 2, 3, 6, 7]), rng.choice([1, 2, 3])
    network = NetworkConfig(
        d_model=d_model,
        num_blocks=blocks,
        num_heads=num_heads,
        d_state=rng.choice([1, 2, 3, 8]),
        d_conv=rng.choice([1, 2, 4]),
        expand=expand,
        dt_rank=rng.choice([None, 1, 3]),
        head_dim=rng.choice([None, 1, d_model, expand]),
        encoder=EncoderConfig(
            layout="".join(letters)[:blocks] if sequence and rng.random() < 0.3 else None
        ),
        decoder=DecoderConfig(
            layout="".join(letters[::-1])[:blocks] if sequence and rng.random() < 0.3 else None
        ),
        critic=rng.choice(["auto", "auto", "own", "pooled", "joint"]),
        memory=rng.choice([None, *MEMORIES]),
        dtype=rng.choice(["float32", "float32", "bfloat16"]),
        remat=rng.random() < 0.2,
        scan=rng.choice(["auto", "auto", "sequential", "associative"]),
    )
    ppo = PPOConfig(
        lr=10 ** rng.uniform(-5, -1.5),
        num_envs=num_envs,
        rollout_length=rng.choice([2, 4, 6]),
        num_epochs=rng.choice([1, 2]),
        num_minibatches=num_minibatches,
        gamma=rng.choice([0.0, 0.9, 0.99, 1.0]),
        gae_lambda=rng.choice([0.0, 0.95, 1.0]),
        clip_eps=rng.choice([0.05, 0.2, 2.0]),
        ent_coef=rng.choice([0.0, 0.01, 1.0]),
        vf_coef=rng.choice([0.0, 0.5, 5.0]),
        max_grad_norm=rng.choice([0.1, 0.5, 10.0]),
        recompute_log_prob=rng.random() < 0.3,
    )
    fixed_point = sequence and rng.random() < 0.3
    return Config(
        policy=policy,
        env=f"probe/{rng.choice(list(PROBES))}",
        agent_id=rng.choice(["one_hot", "sinusoid", "none"]),
        seed=rng.randrange(1000),
        num_seeds=rng.choice([1, 1, 2]),
        decode="fixed_point" if fixed_point else "sequential",
        decode_window=rng.choice([None, 1, 2]) if fixed_point else None,
        decode_max_passes=rng.choice([None, 1, 3]) if fixed_point else None,
        on_non_finite=rng.choice(["stop", "skip", "rollback"]),
        network=network,
        ppo=ppo,
        eval=EvalConfig(num_episodes=2, greedy=rng.random() < 0.5),
    )


def problem_of(config: Config, *, evaluated: bool) -> str | None:
    """What is wrong with a configuration that ought to train, and play if `evaluated`, or None."""
    try:
        trainer = make_train(config)
        state = trainer.init(np.arange(config.seed, config.seed + config.num_seeds))
        for _ in range(2):
            state, values = trainer.train_step(state)
            if bad := trainer.first_nonfinite(state, values):
                return f"not finite: {bad}"
            losses = ("loss", "grad_norm", "entropy", NON_FINITE)
            if not all(np.isfinite(values[name]).all() for name in losses):
                return f"not finite: {values}"
        if evaluated and not np.isfinite(trainer.evaluate_step(state)[1]["episode_return"]).all():
            return "an evaluation that is not finite"
    except Exception as error:  # whatever it is, it is what one looks for
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def invalid(rng: random.Random) -> tuple[str, str]:
    """A setting that is wrong, and its value."""
    flag = rng.choice(list(WRONG))
    return flag, rng.choice(WRONG[flag])


def complaint_about(flag: str, value: str) -> str | None:
    """What is wrong with how a wrong setting is refused; None if nothing is."""
    said = io.StringIO()
    before = os.listdir()
    policy = [] if flag == "--policy" else ["--policy", "mam"]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            code = cli.main(["train", *policy, f"{flag}={value}", "--out", "refused"])
        except UserError as error:
            return f"escaped: {error}"
        except Exception as error:
            return f"a traceback: {type(error).__name__}: {error}"
    lines = said.getvalue().strip().splitlines()
    words = (
        flag.lstrip("-").replace("-", "_").split(".")[-1],
        flag.lstrip("-").split(".")[-1],
        value,
    )
    if code != 2:
        return f"exit code {code}"
    if len(lines) != 1:
        return f"{len(lines)} lines: {lines}"
    if not any(word in lines[0] for word in words):
        return f"does not name it: {lines[0]}"
    return "wrote files" if os.listdir() != before else None


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Less time for programs that run three times."""
    jit, options = (
        jax.jit,
        {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False},
    )
    jax.jit = partial(jit, compiler_options=options)
    try:
        yield
    finally:
        jax.jit = jit


def main(args: Args) -> int:
    """Prints every problem; returns 1 if there was any."""
    rng, problems, begun = random.Random(args.seed), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for _ in range(args.invalid):
            flag, value = invalid(rng)
            if wrong := complaint_about(flag, value):
                problems += 1
                print(f"{flag}={value}: {wrong}", flush=True)
        print(
            f"{args.invalid} invalid settings, {problems} problems, "
            f"{time.monotonic() - begun:.0f} s",
            flush=True,
        )
        with quick_compilation():
            for number in range(args.valid):
                config = valid(rng, args.policies)
                if wrong := problem_of(config, evaluated=number % 5 == 0):
                    problems += 1
                    print(f"{wrong}\n  {config}", flush=True)
                if number % 10 == 9:
                    jax.clear_caches()
                    print(
                        f"{number + 1} of {args.valid} valid ones, "
                        f"{time.monotonic() - begun:.0f} s",
                        flush=True,
                    )
    print(f"{args.valid} valid and {args.invalid} invalid configurations: {problems} problems")
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
