"""One episode step by step, for looking at it: an image, and a trace of what was decided."""

import json
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Num

from mam.config import EvalConfig
from mam.envs.external.worker import describe
from mam.envs.wrappers import IdEncoding, agent_ids
from mam.errors import RunError, UserError
from mam.runs.files import writing
from mam.runs.sinks import to_json, write_atomically
from mam.types import Environment, Observation, Policy

FRAME_MILLISECONDS = 100
MOST_DRAWN = 64  # agents; pictures of more take minutes, and a map of where they are shows as much


@dataclass(frozen=True)
class Trace:
    """The course of an episode, step by step: decisions at t, and the rewards they led to."""

    reward: Float[np.ndarray, "T N"]  # a team's is repeated
    value: Float[np.ndarray, "T N"]
    action: Num[np.ndarray, "T N"] | Num[np.ndarray, "T N K"]  # indices, or components
    log_prob: Float[np.ndarray, "T N"]  # given the earlier agents' actions
    order: Int[np.ndarray, "T N"]  # order[t, k] = the agent that decided k-th
    alive: Bool[np.ndarray, "T N"]
    # Where agents were as they decided; None where the environment does not say
    positions: Float[np.ndarray, "T N F"] | None = None

    @classmethod
    def of(cls, steps: list[dict[str, Any]]) -> "Trace":
        """Stack what was noted at each step."""
        noted = {field.name: [step[field.name] for step in steps] for field in fields(cls)}
        known: dict[str, Any] = {
            name: np.stack(arrays) for name, arrays in noted.items() if arrays[0] is not None
        }
        return cls(**known)


@dataclass(frozen=True)
class Episode:
    """An episode that was played."""

    episode_return: float  # the team's, averaged over agents
    terminated: bool  # not merely cut off by the time limit
    trace: Trace
    num_frames: int  # of the GIF
    undrawn: str = ""  # why there is none; empty if there is one
    agents: tuple[str, ...] | None = None  # their names, if they have any
    observation: Observation | None = None  # what was seen, [T, N, …]


@dataclass(frozen=True)
class ExternalTask:
    """An external environment, made to be played in this process; see `make_external`."""

    name: str
    agent_id: IdEncoding


@dataclass(frozen=True)
class _Playing:
    """The way in which an episode is played, and what is kept of it; see `play`."""

    policy: Policy
    seed: int
    path: Path
    greedy: bool
    max_steps: int
    picture: bool | None


def trace_path(picture: Path) -> Path:
    """Return where the trace of an episode is: beside its image."""
    return picture.with_suffix(".json")


def play(
    env: Environment | ExternalTask,
    policy: Policy,
    seed: int,
    path: Path,
    *,
    greedy: bool = False,
    max_steps: int = EvalConfig.max_episode_steps,
    picture: bool | None = None,
    **about: Any,
) -> Episode:
    """Play an episode and write it as a GIF and a trace.

    Args:
        env: one environment that reports `episode_return`, or an external one.
        policy: the weights to play with.
        seed: decides everything random.
        path: GIF to write, of the T + 1 states, or in an external environment the T that were acted
            on, and beside it, as .json, the trace; see `write_trace`. Of an environment that cannot
            be drawn there is the trace alone.
        greedy: take the most likely actions instead of sampling.
        max_steps: steps after which an episode that has not ended is cut off.
        picture: draw the GIF; if None, unless it is known where more than `MOST_DRAWN` agents are.
        about: what else the trace should say, such as the run's own seed.
    """
    how = _Playing(policy, seed, path, greedy, max_steps, picture)
    if isinstance(env, ExternalTask):
        name, played = env.name, _play_external(env, how)
    else:
        name, played = env.spec.name, _play_on_device(env, how)
    write_trace(path, played, env=name, seed=seed, greedy=greedy, **about)
    return played


def _play_on_device(env: Environment, how: _Playing) -> Episode:
    """Play an episode of an environment in JAX, and draw it; see `play`."""
    reset_key, key = jax.random.split(jax.random.key(how.seed))

    @jax.jit
    def step(state, timestep, memory, first, key):
        act_key, env_key, key = jax.random.split(key, 3)
        memory, output = how.policy.act(
            memory, timestep.observation, first, act_key, greedy=how.greedy
        )
        state, following = env.step(state, output.action, env_key)
        note = _note(timestep.observation, output, following.reward)
        return state, following, memory, following.ended, key, note

    state, timestep = jax.jit(env.reset)(reset_key)
    memory, first, states, notes = how.policy.init_memory(), np.True_, [state], []
    ended = False
    while not ended and len(notes) < how.max_steps:
        state, timestep, memory, first, key, note = step(state, timestep, memory, first, key)
        states.append(state)
        notes.append(note)
        ended = bool(first)
    undrawn = _unwanted(how.picture, timestep.observation.positions)
    try:
        if not undrawn:
            with writing(how.path):
                env.animate(states, how.path)
    except RunError:  # no space for it, nor for the trace
        raise
    except Exception as error:
        undrawn = _why_undrawn(env.spec.name, error)
    notes = jax.device_get(notes)
    return Episode(
        episode_return=float(timestep.metrics["episode_return"]),
        terminated=bool(timestep.terminated),
        trace=Trace.of(notes),
        num_frames=0 if undrawn else len(states),
        undrawn=undrawn,
        agents=env.spec.agent_names,
        observation=_seen(notes),
    )


def _play_external(task: ExternalTask, how: _Playing) -> Episode:
    """Play an episode of an external environment, and draw it; see `play`."""
    from PIL import Image

    from mam.envs.external.factories import find_factory
    from mam.envs.external.pettingzoo import PettingZooEnv

    env = PettingZooEnv(find_factory(task.name)(render_mode="rgb_array", index=0), task.name)
    ids = agent_ids(env.layout.num_agents, task.agent_id)
    act = jax.jit(lambda *inputs: how.policy.act(*inputs, greedy=how.greedy))
    key, memory, frames, notes, over = (
        jax.random.key(how.seed),
        how.policy.init_memory(),
        [],
        [],
        False,
    )
    arrays, terminated = env.reset(how.seed), False
    undrawn = _unwanted(how.picture, arrays.get("positions"))
    while not over and len(notes) < how.max_steps:
        view = np.concatenate([ids, arrays["agents_view"]], axis=1)
        inputs: dict[str, Any] = arrays | {"agents_view": view}
        observation = Observation(**inputs)
        memory, output = act(memory, observation, np.array(not notes), key)
        try:
            if not undrawn and (frame := env.frame()) is not None:
                frames.append(Image.fromarray(frame))
        except Exception as error:
            frames, undrawn = [], _why_undrawn(task.name, error)
        output = jax.device_get(output)
        outcome = env.step(np.asarray(output.action))
        notes.append(_note(observation, output, outcome.reward))
        arrays, key = outcome.observation, jax.random.fold_in(key, len(notes))
        terminated = outcome.terminated
        over = terminated or outcome.truncated
    with suppress(Exception):
        env.close()
    if frames:
        with writing(how.path):
            frames[0].save(
                how.path,
                save_all=True,
                append_images=frames[1:],
                duration=FRAME_MILLISECONDS,
                loop=0,
            )
    elif not undrawn:
        asked = 'with render_mode="rgb_array" its render() returns nothing'
        undrawn = f"{task.name} cannot be drawn: {asked}"
    trace = Trace.of(notes)
    episode_return = float(trace.reward.mean(axis=1, dtype=np.float64).sum())
    agents = env.layout.agents
    return Episode(episode_return, terminated, trace, len(frames), undrawn, agents, _seen(notes))


def _unwanted(picture: bool | None, positions: Any) -> str:
    """Return in a line why an episode is not to be drawn; empty if it is."""
    count = 0 if positions is None else positions.shape[-2]
    if picture is None and count > MOST_DRAWN:
        return f"{count} agents are drawn only with --picture True; the dashboard has a map of them"
    return "a picture was not asked for" if picture is False else ""


def _why_undrawn(name: str, error: Exception) -> str:
    """Return in a line why there is no picture; drawing is code of the environment's."""
    told = isinstance(error, UserError | NotImplementedError) and str(error)
    return str(error) if told else f"{name} cannot be drawn: {describe(error)}"


def _note(observation: Observation, output: Any, reward: Any) -> dict[str, Any]:
    """Return one step of a trace."""
    decided = {name: getattr(output, name) for name in ("value", "action", "log_prob", "order")}
    seen = {"alive": observation.alive, "positions": observation.positions}
    return decided | seen | {"reward": reward, "observation": observation}


def _seen(notes: list[dict[str, Any]]) -> Observation:
    """Stack what was seen at each step."""
    return jax.tree.map(lambda *x: np.stack(x), *(note["observation"] for note in notes))


def write_trace(path: Path, episode: Episode, **about: Any) -> None:
    """Write what happened in an episode as one JSON object.

    `env`, `seed`, `greedy` and whatever else is said about it; `agents` (their names, null if they
    have none), `episode_return`, `terminated`, `picture` (name of the GIF, null if there is none),
    `num_frames` (T + 1 or T, of which a GIF leaves out repetitions) and `undrawn` (why);
    then the arrays of `Trace`, as lists over steps: `reward`, `value`, `action`, `log_prob`,
    `order`, `alive`, and `positions` if there are any. Non-finite values are null.

    Args:
        path: the GIF; the trace goes to `trace_path` of it.
        episode: what was played.
        about: further fields.
    """
    (episode_return,) = to_json(np.array([episode.episode_return]))
    outcome = {"episode_return": episode_return, "terminated": episode.terminated}
    outcome |= {"agents": episode.agents}
    picture = None if episode.undrawn else path.name
    drawn = {"picture": picture, "num_frames": episode.num_frames, "undrawn": episode.undrawn}
    arrays = {name: to_json(x) for name, x in vars(episode.trace).items() if x is not None}
    with writing(trace_path(path)):
        write_atomically(
            trace_path(path), json.dumps(about | outcome | drawn | arrays, allow_nan=False)
        )
