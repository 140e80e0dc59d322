"""Checks that need no episode: specification, signatures, and what JAX says as it traces."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from mam.envs.check.report import Finding
from mam.envs.check.shapes import check_agreement, check_fields, check_metric_names, is_fatal
from mam.envs.external.worker import describe
from mam.errors import UserError
from mam.types import EnvSpec, TimeStep

_NOT_JITTABLE = (
    jax.errors.ConcretizationTypeError,  # `if`, `while`, `int()`, … on a traced value
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


class Unplayable(Exception):
    """Nothing further can be checked; holds the findings that say why."""

    def __init__(self, *findings: Finding) -> None:
        super().__init__(*map(str, findings))
        self.findings = findings


@dataclass(frozen=True)
class Traced:
    """`reset` and `step` as JAX sees them."""

    reset: ClosedJaxpr
    step: ClosedJaxpr
    first: tuple[Any, TimeStep]  # abstract (state, time step) of a reset
    later: tuple[Any, TimeStep]  # and of a step from there


# The specification and the signatures


def read_spec(env: Any) -> EnvSpec:
    """Return the specification; raise `Unplayable` if there is none."""
    spec = attempt("spec", lambda: env.spec)
    if isinstance(spec, EnvSpec):
        return spec
    raise Unplayable(Finding("protocol", "error", "spec", "an EnvSpec", type(spec).__name__))


def check_spec(spec: EnvSpec) -> Iterator[Finding]:
    """Check that sizes are whole numbers in range."""

    def whole(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    grid = spec.grid_shape
    grid_fits = isinstance(grid, tuple) and len(grid) == 3 and all(whole(size, 1) for size in grid)
    names = spec.agent_names
    names_fit = (
        isinstance(names, tuple)
        and [isinstance(name, str) for name in names] == [True] * spec.num_agents
    )
    parts = spec.action_components
    parts_fit = (
        isinstance(parts, tuple) and all(whole(size, 1) for size in parts) and not spec.continuous
    )
    rules = (
        ("name", isinstance(spec.name, str) and spec.name.strip() == spec.name != "", "a name"),
        ("num_agents", whole(spec.num_agents, 1), "a whole number, at least 1"),
        ("obs_dim", whole(spec.obs_dim, 0), "a whole number, at least 0"),
        ("num_actions", whole(spec.num_actions, 1), "a whole number, at least 1"),
        (
            "time_limit",
            spec.time_limit is None or whole(spec.time_limit, 1),
            "a whole number, at least 1, or None",
        ),
        ("grid_shape", grid is None or grid_fits, "(rows, columns, channels), or None"),
        (
            "state_dim",
            spec.state_dim is None or whole(spec.state_dim, 1),
            "a whole number, at least 1, or None",
        ),
        (
            "position_dim",
            spec.position_dim is None or whole(spec.position_dim, 1),
            "a whole number, at least 1, or None",
        ),
        ("continuous", isinstance(spec.continuous, bool), "True or False"),
        (
            "action_components",
            parts is None or (parts_fit and sum(parts) == spec.num_actions),
            f"a tuple of whole numbers that add up to num_actions, {spec.num_actions}, or None",
        ),
        ("team_reward", isinstance(spec.team_reward, bool), "True or False"),
        ("agent_names", names is None or names_fit, "a tuple with a name for each agent, or None"),
    )
    for field, fits, expected in rules:
        if not fits:
            yield Finding("spec", "error", field, expected, repr(getattr(spec, field)))


def check_signatures(env: Any, arguments: dict[str, tuple[str, ...]]) -> Iterator[Finding]:
    """Check that every method of the protocol is there and takes its arguments by position."""
    for name, parameters in arguments.items():
        method, expected = getattr(env, name, None), f"{name}({', '.join(parameters)})"
        if not callable(method):
            yield Finding("protocol", "error", name, expected, "no such method")
            continue
        try:
            inspect.signature(method).bind(*parameters)
        except TypeError as error:
            yield Finding(
                "protocol", "error", name, expected, f"{name}{inspect.signature(method)}: {error}"
            )
        except ValueError:
            continue  # built in: its signature cannot be read


# Exceptions


def attempt(
    where: str,
    function: Callable[[], Any],
    *,
    check: str = "exception",
    step: int | None = None,
    catch: type[Exception] = Exception,
) -> Any:
    """Call a function of the environment; raise `Unplayable` for exceptions of type `catch`."""
    try:
        return function()
    except Unplayable:
        raise
    except catch as error:
        got = str(error).splitlines()[0] if isinstance(error, UserError) else describe(error)
        if isinstance(error, _NOT_JITTABLE):
            expected = (
                "no Python control flow and no NumPy on traced values, "
                "so that jax.jit can compile it"
            )
            finding = Finding("jit", "error", where, expected, got, step=step)
        elif isinstance(error, jax.errors.UnexpectedTracerError):
            expected = (
                "everything that lasts to be in the returned state, "
                "nothing in attributes or globals"
            )
            finding = Finding("hidden_state", "error", where, expected, got, step=step)
        else:
            expected = "no exception" if check == "exception" else "jax.vmap to apply"
            finding = Finding(check, "error", where, expected, got, step=step)
        raise Unplayable(finding) from error


# Tracing


def trace_environment(env: Any, spec: EnvSpec) -> Traced:
    """Trace `reset` and `step`, unbatched; raise `Unplayable` where that fails."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    reset, first = _trace("reset", env.reset, key)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type), first[0]
    )
    if any(map(is_fatal, found := list(check_fields(first[1], spec)))):
        # Else the step fails, and less clearly.
        raise Unplayable(*(replace(finding, step=0) for finding in found))
    step, later = _trace("step", env.step, state, spec.joint_action, key)
    return Traced(reset, step, first, later)


def first_fault(env: Any) -> Finding | None:
    """Return the first of its arrays that nothing could be learned from; None if there is none.

    What its code raises is raised as it is.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        state, first = expect_pair("reset", jax.eval_shape(env.reset, key))
        found = [replace(finding, step=0) for finding in check_fields(first, env.spec)]
        if not any(map(_stops, found)):
            result = jax.eval_shape(env.step, state, env.spec.joint_action, key)
            found = list(check_fields(expect_pair("step", result)[1], env.spec))
    except Unplayable as error:
        found = error.findings
    return next(filter(_stops, found), None)


def _stops(finding: Finding) -> bool:
    """Say whether learning ends here as well; numbers of another type are turned, flags are not."""
    return is_fatal(finding) or (finding.check, finding.expected) == ("dtype", "bool")


def batch_environment(env: Any, traced: Traced) -> None:
    """Trace `reset` and `step` again, as a batch; raise `Unplayable` where that fails."""
    state, *_ = traced.first
    action, key = traced.step.in_avals[-2:]
    state, action, key = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), (state, action, key)
    )
    attempt("reset", lambda: jax.eval_shape(jax.vmap(env.reset), key), check="vmap")
    attempt("step", lambda: jax.eval_shape(jax.vmap(env.step), state, action, key), check="vmap")


def _trace(
    where: str, function: Callable[..., Any], *arguments: Any
) -> tuple[ClosedJaxpr, tuple[Any, TimeStep]]:
    # A lambda, because JAX would not trace the same function twice.
    make = jax.make_jaxpr(
        lambda *arguments: expect_pair(where, function(*arguments)), return_shape=True
    )
    jaxpr, shapes = attempt(where, lambda: make(*arguments))
    return jaxpr, jax.tree.unflatten(jax.tree.structure(shapes), jaxpr.out_avals)


def expect_pair(where: str, result: Any) -> tuple[Any, TimeStep]:
    """Return (state, time step) if the environment did; else raise `Unplayable`."""
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], TimeStep):
        return result
    got = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
    if isinstance(result, tuple) and len(result) == 2:
        got = f"(…, {type(result[1]).__name__})"
    raise Unplayable(Finding("protocol", "error", where, "(state, TimeStep)", got))


def check_traced(traced: Traced, spec: EnvSpec) -> Iterator[Finding]:
    """Check every field against the specification, and a step against a reset."""
    known = set()
    for step, (_, timestep) in enumerate((traced.first, traced.later)):
        for finding in check_fields(timestep, spec):
            known.add(finding.field)
            yield replace(finding, step=step)
    (state, first), (next_state, later) = traced.first, traced.later
    yield from check_metric_names(first, later, step=1)
    bare = [replace(timestep, metrics={}) for timestep in (first, later)]
    for finding in (*check_agreement("state", state, next_state), *check_agreement("", *bare)):
        if finding.field not in known:
            yield finding
            known.add(finding.field.removeprefix("final_observation."))


def check_retraced(traced: Traced, env: Any, spec: EnvSpec) -> Iterator[Finding]:
    """Check that the environment still computes the same, traced anew after episodes were played.

    What it keeps in Python (a counter, NumPy's random numbers) is a constant of the compiled
    program, so episodes cannot show it. Where the texts of the programs differ, their results
    decide.
    """
    again = trace_environment(env, spec)
    key = jax.random.key(0)
    for name in ("reset", "step"):
        before, after = getattr(traced, name), getattr(again, name)
        if _same_program(before, after):
            continue
        inputs = [key]
        if name == "step":
            state = compile_quickly(jaxpr_as_fun(traced.reset))(key)[
                : len(jax.tree.leaves(traced.first[0]))
            ]
            action = before.in_avals[len(state)]
            inputs = [*state, jnp.zeros(action.shape, action.dtype), key]
        results = [compile_quickly(jaxpr_as_fun(program))(*inputs) for program in (before, after)]
        if len(results[0]) != len(results[1]) or not all(map(_equal, *results)):
            expected = (
                "the same program whenever it is traced: randomness from keys, memory in the state"
            )
            yield Finding(
                "hidden_state", "error", name, expected, "another one after episodes were played"
            )


def compile_quickly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile like `jax.jit`, on the CPU without optimisation.

    That would take longer than it saves in so few steps.
    """
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options)


def _same_program(one: ClosedJaxpr, other: ClosedJaxpr) -> bool:
    texts = [re.sub(r"0x[0-9a-f]+", "", str(program.jaxpr)) for program in (one, other)]
    return texts[0] == texts[1] and all(
        _equal(a, b) for a, b in zip(one.consts, other.consts, strict=True)
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, jax.Array) and jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    one, other = np.asarray(one), np.asarray(other)
    return one.shape == other.shape and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
