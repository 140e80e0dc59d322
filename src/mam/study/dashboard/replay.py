"""Episodes that were played: found, read, and another one played in a process of its own."""

import asyncio
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from mam.envs.external.factories import code_of
from mam.errors import RunError, UserError, printable, shown
from mam.runs.files import open_regular, parse_object
from mam.study.dashboard.runs import LiveRun, changed

# Files of a run's folder that are no traces.
_OTHERS = (
    "config.json",
    "versions.json",
    "marl_eval.json",
    "times.json",
    "teacher.json",
    "trackers.json",
)
_MOST_BYTES = 1 << 28  # of a trace
_MOST_PIXELS = 1 << 30  # of all frames of a GIF
_ARRAYS = ("reward", "value", "action", "log_prob", "order", "alive")
_POSITIONS = "positions"  # an array that only some have


@dataclass(frozen=True)
class Replay:
    """A played episode: what `mam play` wrote, see `mam.runs.play.write_trace`."""

    about: dict[str, Any]  # everything but the arrays
    # By name, [T, N]; actions may be [T, N, K] or [T, N, A]; positions, where known, are [T, N, F]
    trace: dict[str, np.ndarray]
    frames: list[bytes]  # PNG of each state, fewer or none where nothing was drawn
    moments: np.ndarray  # [num_frames], which of `frames` shows each state
    # What agents take of each other, by mixer: [T, N, N], or [T, N, 1 + N] of earlier actions
    mixing: dict[str, np.ndarray]

    @property
    def length(self) -> int:
        """Steps of the episode, T."""
        return len(self.trace["reward"])

    @property
    def last(self) -> int:
        """The last state that can be shown: T, after the last action, unless no frame shows it."""
        return max(len(self.moments) - 1, 0) if len(self.moments) else self.length

    @property
    def agents(self) -> list[str]:
        """Names of the agents; their places where a trace has none."""
        names, count = self.about.get("agents"), self.trace["reward"].shape[1]
        given = names if isinstance(names, list) and len(names) == count else range(count)
        return [printable(name) for name in given]

    @cached_property
    def decimals(self) -> int:
        """Digits to show of actions: none of indices."""
        return 0 if (self.trace["action"] % 1 == 0).all() else 2

    def reward_so_far(self, state: int) -> float:
        """Sum the team's reward before a state, averaged over agents."""
        return float(self.trace["reward"][:state].mean(axis=1).sum()) if state else 0.0

    def frame(self, state: int) -> int | None:
        """Return which of the frames shows a state; None without frames."""
        return int(self.moments[min(state, len(self.moments) - 1)]) if len(self.moments) else None


def replays_of(run: LiveRun) -> dict[str, Path]:
    """Find the traces of a run by name, the newest first."""
    found = [path for path in run.path.glob("*.json") if path.name not in _OTHERS]
    found += run.path.glob("replays/*.json")
    return {printable(path.stem): path for path in sorted(found, key=changed, reverse=True)}


def load(path: Path) -> Replay:
    """Read a trace and its GIF.

    Raises:
        UserError: if either cannot be read.
    """
    try:
        data = _read(path)
        trace = {name: np.array(data.pop(name), np.float64) for name in _ARRAYS}
        if (positions := data.pop(_POSITIONS)) is not None:
            trace[_POSITIONS] = np.array(positions, np.float64)
        _check(trace)
        mixing = {
            printable(name): np.array(share, np.float64)
            for name, share in (data.pop("mixing") or {}).items()
        }
        _check_mixing(mixing, trace["reward"].shape)
        data["episode_return"] = float(data.get("episode_return") or 0)
        picture = data.get("picture")
        frames, durations = (
            _frames(path.parent / Path(picture).name) if picture else ([], np.empty(0))
        )
        count = min(int(data.get("num_frames") or 0), len(trace["reward"]) + 1) if frames else 0
    except Exception as error:  # whatever the files hold: Pillow has errors of its own
        raise UserError(f"{printable(path.name)} cannot be shown: {printable(error)}") from error
    # A GIF shows a state that looks like the one before it by showing that one longer.
    ends = np.cumsum(durations)
    middles = (np.arange(count) + 0.5) / max(count, 1) * (ends[-1] if len(ends) else 0)
    moments = np.minimum(np.searchsorted(ends, middles), max(len(frames) - 1, 0))
    return Replay(about=data, trace=trace, frames=frames, moments=moments, mixing=mixing)


def _read(path: Path) -> dict[str, Any]:
    """Read a trace, of millions of numbers perhaps: what is not arrays is checked one by one."""
    with open_regular(path) as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"longer than {_MOST_BYTES} bytes")
    data = orjson.loads(text)
    arrays = {name: data.pop(name, None) for name in (*_ARRAYS, _POSITIONS, "mixing")}
    return parse_object(orjson.dumps(data)) | arrays


def _check(trace: dict[str, np.ndarray]) -> None:
    shape = trace["reward"].shape
    ndim = {"action": (2, 3), _POSITIONS: (3,)}
    fit = all(
        array.shape[:2] == shape and array.ndim in ndim.get(name, (2,)) and array.size
        for name, array in trace.items()
    )
    if len(shape) != 2 or not all(shape) or not fit:
        raise ValueError("its arrays do not fit each other")
    if (np.sort(trace["order"]) != np.arange(shape[1])).any():
        raise ValueError("its order is none")


def _check_mixing(mixing: dict[str, np.ndarray], shape: tuple[int, ...]) -> None:
    for share in mixing.values():
        if share.shape[:-1] != shape or share.shape[-1] - shape[1] not in (0, 1):
            raise ValueError("its mixing does not fit its agents")


def _frames(path: Path) -> tuple[list[bytes], np.ndarray]:
    from PIL import Image, ImageSequence

    frames, durations, pixels = [], [], 0
    with open_regular(path) as gif, Image.open(gif) as image:
        for frame in ImageSequence.Iterator(image):
            pixels += frame.width * frame.height
            if pixels > _MOST_PIXELS:
                raise ValueError("its picture is too large")
            durations.append(frame.info.get("duration", 100))
            file = io.BytesIO()
            frame.convert("RGB").save(file, "PNG", compress_level=1)
            frames.append(file.getvalue())
    return frames, np.array(durations, np.float64)


class Players:
    """Processes that play episodes: the page's own compiles nothing and imports no code of a run.

    Args:
        trust: play runs whose environment is code that their folder names, too.
    """

    def __init__(self, *, trust: bool = False):
        self._trust = trust
        self._processes: set[asyncio.subprocess.Process] = set()

    def refusal(self, run: LiveRun) -> str:
        """Say why a run is not played here, with what would be imported; empty if it may be."""
        if run.config is None:
            return "its config.json cannot be read"
        code = list(code_of(run.config).values())
        if self._trust or not code:
            return ""
        return (
            f"playing it would import {' and '.join(map(shown, code))}, which the folder names: "
            f"if you trust that code, start the page with --trust"
        )

    async def play(
        self, run: LiveRun, *, policy_seed: int, greedy: bool, seed: int, say: Callable[[str], None]
    ) -> Path:
        """Play one episode with `mam play`, on the CPU: what trains keeps its devices.

        Args:
            run: whose best weights play.
            policy_seed: which of the run's seeds.
            greedy: take the most likely actions.
            seed: decides the episode.
            say: called with every line that `mam play` prints.

        Returns:
            The trace.

        Raises:
            UserError: if it is not to be played here.
            RunError: if it fails, with the last line it printed.
        """
        if refusal := self.refusal(run):
            raise UserError(refusal)
        assert run.config is not None
        out = (
            run.path
            / "replays"
            / f"seed{policy_seed}-{'greedy' if greedy else 'sampled'}-{seed}.gif"
        )
        options = [
            "--seed",
            str(seed),
            "--policy-seed",
            str(policy_seed),
            *(["--greedy"] if greedy else []),
        ]
        # What was shown is what is imported, whatever the folder says by then.
        code = code_of(run.config)
        options += ["--env", code["env"]] if "env" in code else []
        options += ["--trust"] if code.keys() - {"env"} else []
        try:
            out.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot write to {out.parent}: {error.strerror}") from error
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mam", "play", str(run.path), "--out", str(out), *options),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"},
            start_new_session=True,  # Ctrl-C is for the page, which ends it
        )
        self._processes.add(process)
        last = "it printed nothing"
        try:
            assert process.stdout is not None
            async for line in process.stdout:
                if text := line.decode(errors="replace").strip():
                    last = text
                    say(text)
            code = await process.wait()
        finally:
            self._processes.discard(process)
            if process.returncode is None:
                process.kill()
        if code:
            raise RunError(last.removeprefix("mam: "))
        return out.with_suffix(".json")

    def close(self) -> None:
        """End what still plays."""
        for process in self._processes:
            if process.returncode is None:
                process.kill()
