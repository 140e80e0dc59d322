"""Everything worth knowing about a GPU in ten minutes: kernels against float64, speed, train steps.

    make gpu-bundle                       # here: wheels of what a GPU machine may lack, in .wheels
    python benchmarks/gpu.py              # there: all steps, in order of value
    python benchmarks/gpu.py --only check-scan bench-decode --seconds 120
    python benchmarks/gpu.py --short      # minutes on a CPU: does the script itself work?

Every step is a process of its own with a time limit, so that a kernel that hangs or corrupts the
device costs one step. Results are written as they come, to OUT/results.json; a table of all of them
is printed last.
"""

import argparse
import contextlib
import csv
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]  # a line of a step's result


@dataclass(frozen=True)
class Step:
    """A part of the whole, run in a process of its own."""

    run: Callable[
        ..., list[Row]
    ]  # given whether to be short; and, where there are parts, one of them or None
    seconds: float  # its time limit, once everything is compiled
    parts: tuple[
        str, ...
    ] = ()  # what is compiled apart, before it is timed; none if it is not timed


# --- Kernels against float64 ----------------------------------------------------------------------


def in_float64(function: Callable[..., Any], *args: Any) -> Any:
    """The function's results on the CPU, in double precision, as NumPy arrays."""
    import jax

    def widen(x: Any) -> np.ndarray:
        x = np.asarray(x)
        return x.astype(np.float64) if x.dtype.kind in "fV" else x

    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return jax.device_get(jax.jit(function)(*jax.tree.map(widen, args)))


def errors(actual: Any, expected: Any) -> dict[str, float]:
    """‖actual − expected‖ / ‖expected‖ of every named array; infinite where non-finite."""
    found = {}
    for name, reference in expected.items():
        value, reference = np.asarray(actual[name], np.float64), np.asarray(reference, np.float64)
        error = np.linalg.norm(value - reference) / max(np.linalg.norm(reference), 1e-12)
        found[name] = float(error) if np.isfinite(value).all() else float("inf")
    return found


def judged(name: str, tolerance: float, measure: Callable[[], dict[str, float]]) -> Row:
    """A row of one check: the worst error and where it is; or what went wrong."""
    start = time.perf_counter()
    try:
        found = measure()
        worst = max(found, key=lambda key: found[key])
        row = {"ok": found[worst] <= tolerance, "worst": worst, "error": found[worst], "all": found}
    except Exception as error:  # whatever a compiler throws: it is what we came to learn
        traceback.print_exc()
        row = {
            "ok": False,
            "worst": "raised",
            "error": float("inf"),
            "message": f"{type(error).__name__}: {error}"[:500],
        }
    row = {
        "check": name,
        "tolerance": tolerance,
        **row,
        "seconds": round(time.perf_counter() - start, 2),
    }
    print(
        f"{'ok  ' if row['ok'] else 'FAIL'} {name}: {row['error']:.2e} "
        f"({row['worst']}, {row['seconds']} s)",
        flush=True,
    )
    return row


def scan_reference(x, dt, B, C, A, reset, h0, *, reverse):
    """The recurrence as written, one agent after another: [M, N, …] → outputs and last state."""
    import jax
    import jax.numpy as jnp

    def step(h, agent):
        x, dt, B, C, reset = agent
        h = (
            jnp.exp(dt[:, None] * A) * jnp.where(reset[:, None, None], 0, h)
            + (dt * x)[:, None] * B[:, :, None]
        )
        return h, jnp.sum(h * C[:, :, None], axis=1)

    xs = [jnp.moveaxis(v, 1, 0) for v in (x, dt, B, C, reset)]
    h, y = jax.lax.scan(step, h0, tuple(xs), reverse=reverse)
    return jnp.moveaxis(y, 0, 1), h


def scan_inputs(m: int, n: int, d: int, s: int, dtype: Any) -> tuple[list[Any], Any, Any]:
    """Arguments to differentiate by, `reset`, and the gradients of outputs and last state."""
    import jax.numpy as jnp

    rng = np.random.default_rng(n)
    shapes = ((m, n, d), (m, n, d), (m, n, s), (m, n, s), (s, d), (m, s, d), (m, n, d), (m, s, d))
    x, dt, B, C, A, h0, gy, gh = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    dt, A = 0.5 * np.abs(dt), -np.exp(A - 1.0)  # some channels remember far more than a chunk
    reset = rng.random((m, n)) < 0.1
    arguments = [jnp.asarray(v, dtype) for v in (x, dt, B, C)] + [jnp.asarray(A), jnp.asarray(h0)]
    return arguments, jnp.asarray(reset), (jnp.asarray(gy, dtype), jnp.asarray(gh))


def check_scan(short: bool) -> list[Row]:
    """The scan's kernels, and XLA's loop beside them, forward and backward."""
    import jax
    import jax.numpy as jnp

    from mam.kernels.cuda.scan import scan_kernel

    on_gpu = jax.default_backend() == "gpu"
    names = ("x", "dt", "B", "C", "A", "h0")

    def both_ways(scan, reverse, arguments, reset, gradients):
        def run(x, dt, B, C, A, h0):
            return scan(x, dt, B, C, A, reset, h0, reverse=reverse)

        (y, h), pull_back = jax.vjp(run, *arguments)
        found = pull_back(jax.tree.map(lambda g, v: g.astype(v.dtype), gradients, (y, h)))
        return {"y": y, "h": h} | {f"d{name}": g for name, g in zip(names, found, strict=True)}

    def measure(m, n, d, s, reverse, dtype):
        arguments, reset, gradients = scan_inputs(m, n, d, s, dtype)
        kernel = partial(scan_kernel, interpret=not on_gpu)
        actual = jax.jit(partial(both_ways, kernel, reverse))(arguments, reset, gradients)
        return errors(
            actual,
            in_float64(partial(both_ways, scan_reference, reverse), arguments, reset, gradients),
        )

    sizes = [(64, n, 128, 16) for n in (1, 4, 8, 9, 32, 128)]
    sizes += [
        (16, 1024, 128, 16),
        (64, 33, 64, 4),
        (64, 33, 256, 64),
        (64, 33, 24, 64),
        (8192, 4, 128, 16),
    ]
    sizes = [(4, 3, 16, 4), (4, 9, 16, 4)] if short else sizes
    rows = []
    for m, n, d, s in sizes:
        for reverse, dtype in ((False, jnp.float32), (True, jnp.float32), (False, jnp.bfloat16)):
            name = f"scan M {m} N {n} D {d} S {s}{' reverse' * reverse} {jnp.dtype(dtype).name}"
            tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
            rows.append(judged(name, tolerance, partial(measure, m, n, d, s, reverse, dtype)))
    return rows


def check_decode(short: bool) -> list[Row]:
    """The decode kernel against the loop, in float32; outputs up to the first other decision."""
    import jax
    import jax.numpy as jnp

    from mam.config import NetworkConfig
    from mam.networks.decoding.cuda import decode_kernel, kernel_supports
    from mam.networks.decoding.decide import DecodeInputs, Decoding, decide
    from mam.study.bench.inputs import random_policy, synthetic_task

    on_gpu = jax.default_backend() == "gpu"

    def measure(name, sizes, num_agents, batch, operand_dtype):
        spec = synthetic_task(num_agents)
        policy: Any = random_policy(name, spec, sizes)
        rng = np.random.default_rng(0)
        shape = (batch, num_agents, spec.num_actions)
        obs_rep = jnp.asarray(rng.normal(size=(batch, num_agents, sizes.d_model)), jnp.float32)
        mask, noise = (
            jnp.asarray(rng.random(shape) < 0.7),
            jnp.asarray(rng.gumbel(size=shape), jnp.float32),
        )

        @partial(jax.jit, static_argnums=1)
        def run(policy, kernel, obs_rep, mask, noise):
            ahead = DecodeInputs(context=policy.decoder.read(obs_rep), mask=mask, noise=noise)
            if kernel:
                return decode_kernel(
                    policy.decoder, ahead, operand_dtype=operand_dtype, interpret=not on_gpu
                )
            decision = decide(policy.decoder, policy.distribution, ahead, Decoding())
            return decision.action, decision.out

        if not kernel_supports(policy.decoder, operand_dtype):
            raise ValueError("kernel_supports refuses these sizes")
        action, out = run(policy, True, obs_rep, mask, noise)
        with jax.default_matmul_precision("highest"):
            expected_action, expected = run(policy, False, obs_rep, mask, noise)
        same = np.cumprod(np.asarray(action == expected_action), axis=-1).astype(bool)
        before = np.concatenate(
            [np.ones_like(same[:, :1]), same[:, :-1]], axis=1
        )  # read what the loop read
        gap = np.abs(np.asarray(out) - np.asarray(expected))[before & np.ones_like(same)]
        return {"out": float(gap.mean()), "decided otherwise / 10": 0.1 * float(1 - same.mean())}

    fast = NetworkConfig(d_model=64, d_state=16)
    cases = [
        (name, fast, n, b, jnp.float16)
        for name in ("mam", "mam2")
        for n, b in ((4, 64), (32, 512), (128, 4096))
    ]
    cases += [
        ("mam", fast, 4, 64, jnp.float32),
        ("mam2", NetworkConfig(d_model=32, d_state=16), 32, 64, jnp.float16),
    ]
    cases += [("mam", NetworkConfig(d_model=64, d_state=16, num_blocks=2), 32, 64, jnp.float16)]
    cases += [("mam", NetworkConfig(d_model=128, d_state=32, dt_rank=128), 8, 64, jnp.float16)]
    if short:
        cases = [
            (name, NetworkConfig(d_model=16, d_state=4, head_dim=16), 3, 5, jnp.float32)
            for name in ("mam", "mam2")
        ]
    rows = []
    for name, sizes, n, batch, dtype in cases:
        label = (
            f"decode {name} d_model {sizes.d_model} blocks {sizes.num_blocks} N {n} batch {batch}"
        )
        label += f" {jnp.dtype(dtype).name}"
        tolerance = 1e-4 if dtype == jnp.float32 else 1e-2
        rows.append(judged(label, tolerance, partial(measure, name, sizes, n, batch, dtype)))
    return rows


def check_policy(name: str, short: bool) -> list[Row]:
    """A whole policy: acting's log-probabilities against the learner's, both against float64."""
    import jax

    from mam.config import NetworkConfig
    from mam.study.bench.inputs import random_observation, random_policy, synthetic_task

    sizes = NetworkConfig(d_model=64, d_state=16)

    def measure(num_agents, precision):
        spec = synthetic_task(num_agents)
        policy: Any = random_policy(name, spec, sizes)
        batch = 4 if short else 256
        obs, reset = random_observation(spec, batch), np.zeros(batch, bool)
        memory = policy.init_memory((batch,))
        keys = jax.random.split(jax.random.key(0), batch)

        def learner(policy, memory, obs, action, order):
            evaluation = policy.evaluate(
                memory, *jax.tree.map(lambda x: x[None], (obs, action, order)), reset[None]
            )
            return {"log_prob": evaluation.log_prob[0], "value": evaluation.value[0]}

        with jax.default_matmul_precision(precision):
            _, output = jax.jit(lambda policy, *args: policy.act(*args))(
                policy, memory, obs, reset, keys
            )
            learned = jax.jit(learner)(policy, memory, obs, output.action, output.order)
        exact = in_float64(learner, policy, memory, obs, output.action, output.order)
        ratio = np.max(np.abs(np.asarray(output.log_prob - learned["log_prob"])))
        far = {f"{key} against float64": value for key, value in errors(learned, exact).items()}
        return {"act − evaluate": float(ratio), **far}

    rows = []
    for n in (3,) if short else (4, 32):
        for precision, tolerance in (("highest", 1e-4), ("default", 1e-2)):
            label = f"policy {name} N {n} {precision}"
            rows.append(judged(label, tolerance, partial(measure, n, precision)))
    return rows


# --- Speed ----------------------------------------------------------------------------------------


def bench(
    what: str, names: tuple[str, ...], tokens: int, short: bool, part: str | None
) -> list[Row]:
    """`mam bench` in this process, as rows: all candidates, or one to compile its programs."""
    from mam.cli.main import main

    out = Path(OUT, "bench", part or "all", what)
    sizes = (
        ("2", "4", "--network.d-model", "16", "--network.d-state", "4")
        if short
        else ("4", "32", "128", "1024")
    )
    size = (
        ("--batch", "64")
        if what in ("act", "decode")
        else ("--tokens", str(32 if short else tokens))
    )
    limits = ("--max-seconds", "10", "--max-memory", "40", "--rounds", "1" if part else "7")
    candidates = ("--candidates", *((part,) if part else names))
    main(["bench", what, *size, *limits, *candidates, "--out", str(out), "--num-agents", *sizes])
    with (out / "results.csv").open(encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def ceilings(short: bool, part: str | None) -> list[Row]:
    """What the card can do: a copy, and a product of matrices."""
    import jax
    import jax.numpy as jnp

    size = 1 << (20 if short else 30)
    big = jnp.arange(size, dtype=jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    product = jax.jit(lambda x: x @ x)
    side = 256 if short else 8192
    matrix = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    device = jax.devices()[0]
    return [
        {
            "what": "device",
            "value": f"{device.platform} {device.device_kind}",
            "jax": jax.__version__,
        },
        {"what": "copy, TB/s", "value": 8e-12 * size / seconds_of(lambda: copy(big))},
        {
            "what": "bf16 product, TFLOP/s",
            "value": 2e-12 * side**3 / seconds_of(lambda: product(matrix)),
        },
    ]


def seconds_of(run: Callable[[], Any], calls: int = 5) -> float:
    """The median of a few calls, after one."""
    import jax

    jax.block_until_ready(run())
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(run())
        samples.append(time.perf_counter() - start)
    return float(np.median(samples))


def train_step(task: str, short: bool, part: str | None) -> list[Row]:
    """Whole train steps, and where time goes: environments alone, acting in them, the update."""
    from mam.config import Config, NetworkConfig, PPOConfig

    network = NetworkConfig(d_model=64, num_blocks=1, d_state=16)
    ppo = PPOConfig(num_envs=1024, rollout_length=128, num_epochs=4, num_minibatches=4)
    if short:
        network = NetworkConfig(d_model=16, d_state=4)
        ppo = PPOConfig(num_envs=4, rollout_length=4, num_epochs=1, num_minibatches=1)
    rows = []
    for name in (part,) if part else POLICIES:
        row = {"task": task, "policy": name, "num_envs": ppo.num_envs}
        try:
            row |= profile(
                Config(policy=name, env=task, network=network, ppo=ppo), 1 if part else 3
            )
        except Exception as error:
            traceback.print_exc()
            row["message"] = f"{type(error).__name__}: {error}"[:500]
        print(row, flush=True)
        rows.append(row)
    return rows


def where_time_goes(what: str, short: bool, part: str | None) -> list[Row]:
    """The GPU's kernels of mam's update of 131,072 agents, or train step: the longest, added up."""
    import jax

    from mam.config import NetworkConfig
    from mam.study.bench.cases import cases
    from mam.study.bench.measure import Cell

    network = NetworkConfig(d_model=64, d_state=16)
    batch = 8 if short else 32_768 if what == "update" else 256
    candidate = cases()[what].candidates[part or "mam"](Cell(4, batch, network))
    compiled = jax.jit(candidate.function).lower(*candidate.args).compile()
    jax.block_until_ready(compiled(*candidate.args))
    folder = Path(OUT, f"profile-{what}", part or "all")
    calls = 3
    seconds = seconds_of(lambda: compiled(*candidate.args))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=options):
        for _ in range(calls):
            jax.block_until_ready(compiled(*candidate.args))
    total: dict[str, list[float]] = {}
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if not plane.name.startswith("/device:" if not short else "/host:CPU"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream") or short:
                    for event in line.events:
                        total.setdefault(event.name, []).append(event.duration_ns)
    longest = sorted(total.items(), key=lambda item: -sum(item[1]))
    rows: list[Row] = [
        {"total_ms": 1e3 * seconds, "kernels": sum(map(len, total.values())) / calls}
    ]
    rows[0]["kernels_ms"] = 1e-6 * sum(map(sum, total.values())) / calls
    return rows + [
        {"ms": 1e-6 * sum(times) / calls, "times": len(times) / calls, "kernel": kernel[:90]}
        for kernel, times in longest[:40]
    ]


def profile(config: Any, calls: int) -> Row:
    """Seconds of one train step and of its parts."""
    import jax
    import jax.numpy as jnp

    from mam.envs.registry import make_batched
    from mam.learning.rollout import rollout
    from mam.learning.train import make_train

    trainer, ppo = make_train(config), config.ppo
    state = trainer.init(jnp.arange(1))
    envs = make_batched(config.env, ppo.num_envs, config.agent_id)
    policy, actors = jax.tree.map(lambda x: x[0], (state.policy, state.actors))
    key = jax.random.key(0)

    @jax.jit
    def act(policy, actors, key):
        return jax.tree.map(
            jnp.sum, rollout(envs, policy, actors, key, ppo.rollout_length)[1].transitions.reward
        )

    @jax.jit
    def step_only(env_state, mask, key):
        def step(carry, key):
            env_state, mask = carry
            action = jax.random.categorical(key, jnp.where(mask, 0.0, -1e9))
            env_state, timestep = envs.step(env_state, action, key)
            return (env_state, timestep.observation.action_mask), timestep.reward.sum()

        return jax.lax.scan(step, (env_state, mask), jax.random.split(key, ppo.rollout_length))[1]

    environment = seconds_of(
        lambda: step_only(actors.env_state, actors.observation.action_mask, key), calls
    )
    acting = seconds_of(lambda: act(policy, actors, key), calls)
    start = time.perf_counter()
    step = trainer.train_step.lower(state).compile()
    compile_s = time.perf_counter() - start
    holder = [state]

    def whole():
        holder[0], values = step(holder[0])
        return values

    total = seconds_of(whole, calls)
    return {
        "steps_per_s": round(config.steps_per_update / total),
        "total_ms": 1e3 * total,
        "environment_ms": 1e3 * environment,
        "acting_ms": 1e3 * (acting - environment),
        "update_ms": 1e3 * (total - acting),
        "compile_s": compile_s,
    }


TASKS = ("rware/tiny-4ag", "smax/2s3z", "lbf/2s-8x8-2p-2f-coop")
POLICIES = ("mam", "mam2", "mat", "mappo")
CHECKED = (*POLICIES, "ff_sable", "sable", "rec_mam", "rec_mam2", "rec_mat")
ACTING = ("mam", "mam2", "mat", "mam-kernel", "mam2-kernel", "mam-fixed-point")
OUT = "gpu"
PREPARING = 0.55  # the share of the time that compiling may take
MIN_SECONDS = 10.0  # a step is not begun with less


def steps() -> dict[str, Step]:
    """All steps, in order of value."""

    def measured(what: str, names: tuple[str, ...], seconds: float) -> Step:
        return Step(partial(bench, what, names, 131_072), seconds, names)

    return {
        "check-scan": Step(check_scan, 200),
        "check-decode": Step(check_decode, 200),
        **{f"check-{name}": Step(partial(check_policy, name), 200) for name in CHECKED},
        "ceilings": Step(ceilings, 30, ("",)),
        "bench-act": measured("act", ACTING, 60),
        "bench-update": measured("update", ("mam", "mam-xla", "mam2", "mat"), 60),
        "bench-scan": measured("scan", ("associative", "sequential", "pallas", "ssd"), 60),
        **{
            f"train-{task.partition('/')[0]}": Step(partial(train_step, task), 60, POLICIES)
            for task in TASKS
        },
        "bench-decode": measured("decode", ACTING, 60),
        "profile-update": Step(partial(where_time_goes, "update"), 60, ("mam",)),
        "profile-train": Step(partial(where_time_goes, "train"), 60, ("mam",)),
    }


def run_step(
    name: str, out: Path, seconds: float, short: bool, part: str | None = None
) -> dict[str, Any]:
    """Runs one step in a process of its own and returns what it left."""
    result, log = (out / f"{name}{f'-{part}' * bool(part)}{end}" for end in (".json", ".log"))
    command = [sys.executable, __file__, "--out", str(out), "--step", name, *["--short"] * short]
    command += ["--part", part] if part else []
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(out / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    start, code = time.perf_counter(), "out of time"
    with log.open("w") as file, contextlib.suppress(subprocess.TimeoutExpired):
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, env=environment
        ).returncode
    rows = json.loads(result.read_text()) if result.exists() else []
    return {
        "step": name,
        "part": part,
        "exit": code,
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
    }


def table(results: list[dict[str, Any]]) -> str:
    """All results as text, a line per row."""
    lines = []
    for result in results:
        lines.append(f"## {result['step']}: exit {result['exit']}, {result['seconds']} s")
        for row in result["rows"]:
            shown = {
                k: v
                for k, v in row.items()
                if k not in ("all", "device", "jax", "what", "rounds", "baseline")
            }
            lines.append(
                "  "
                + " ".join(
                    f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items()
                )
            )
    return "\n".join(lines)


def main() -> None:
    """Runs the steps asked for, all by default, within the time given."""
    global OUT
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the results")
    parser.add_argument(
        "--only", nargs="*", choices=list(steps()), help="steps to run, instead of all"
    )
    parser.add_argument("--seconds", type=float, default=560.0, help="for all steps together")
    parser.add_argument("--short", action="store_true", help="tiny sizes: does the script work?")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    OUT = str(out)
    if options.step:
        step = steps()[options.step]
        rows = step.run(options.short, *[options.part] * bool(step.parts))
        name = options.step + f"-{options.part}" * bool(options.part)
        (out / f"{name}.json").write_text(json.dumps(rows))
        return
    start, results = time.monotonic(), []
    asked = {name: step for name, step in steps().items() if name in (options.only or steps())}

    def run(name: str, part: str | None = None, *, until: float = options.seconds) -> None:
        if (left := start + until - time.monotonic()) > MIN_SECONDS:
            limit = left if options.short or part else min(left, asked[name].seconds)
            result = run_step(name, out, limit, options.short, part)
            print(f"{name} {part or ''}: exit {result['exit']}, {result['seconds']} s", flush=True)
            if not part:
                results.append(result)
                (out / "results.json").write_text(json.dumps(results, indent=1))

    # 1. Side by side, what is not timed: checks, and compiling the programs that are to be timed.
    parts = [(name, None) for name in asked if not asked[name].parts]
    parts += [(name, part) for name in asked for part in asked[name].parts if part]
    with ThreadPoolExecutor(os.cpu_count()) as together:
        list(together.map(lambda part: run(*part, until=PREPARING * options.seconds), parts))
    # 2. One after another, what is.
    for name in asked:
        if asked[name].parts:
            run(name)
    print(table(results))


if __name__ == "__main__":
    main()
