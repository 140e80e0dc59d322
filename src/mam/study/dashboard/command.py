"""The live view of a folder of runs: `mam dashboard`.

reading (metrics as columns) → runs (one folder, its state) → watch (all of them, in a thread)
                                                                 → curves → page, replay → server
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from mam.errors import UserError, needs_extra


@dataclass(frozen=True)
class Dashboard:
    """Show runs while they train: table, curves, settings, logs and replays, as a local page.

    Needs the extra: pip install "multi-agent-mamba[dashboard]". Ctrl-C ends it.
    """

    runs: tyro.conf.Positional[Path]
    """Folder that contains the runs; new ones appear by themselves."""
    port: int = 8080
    """Port to listen on; any free one if 0."""
    host: str = "127.0.0.1"
    """Address to listen on. Whoever reaches it sees all runs, and can play episodes."""
    open: bool = False
    """Open the page in a browser."""
    trust: bool = False
    """Let the page play runs whose environment is code that their folder names; it is imported."""


def serve(options: Dashboard) -> int:
    """Serve the page until Ctrl-C; return the exit code.

    Raises:
        UserError: if the folder does not exist, the port cannot be had, or the extra is not
            installed.
    """
    if not options.runs.is_dir():
        raise UserError(
            f"{options.runs} does not exist"
            if not options.runs.exists()
            else f"{options.runs} is a file"
        )
    if not 0 <= options.port < 1 << 16:
        raise UserError(f"--port must lie in [0, 65535], got {options.port}")
    with needs_extra("mam dashboard", "NiceGUI and orjson", "dashboard"):
        import nicegui  # noqa: F401
        import orjson  # noqa: F401
    from mam.study.dashboard.server import run

    return run(
        options.runs,
        host=options.host,
        port=options.port,
        trust=options.trust,
        open_browser=options.open,
    )
