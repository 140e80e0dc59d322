"""The page's server: one process, one port, nothing from elsewhere."""

import socket
import webbrowser
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Response
from nicegui import app, core, ui
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mam.errors import UserError
from mam.study.dashboard.map import packed
from mam.study.dashboard.page import Page, Shared
from mam.study.dashboard.replay import Players
from mam.study.dashboard.watch import Watcher

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KEEP = {"Cache-Control": "private, max-age=86400, immutable"}  # of what a replay's key names


def run(
    root: Path, *, host: str, port: int, trust: bool = False, open_browser: bool = False
) -> int:
    """Serve the page until Ctrl-C; return the exit code.

    Args:
        root: folder of the runs.
        host: address to listen on. On the loopback one, requests for other names are refused: a web
            page elsewhere could otherwise ask through the browser.
        port: to listen on; any free one if 0.
        trust: play runs whose environment is code.
        open_browser: open the page.

    Raises:
        UserError: if the port cannot be had.
    """
    listening = _listen(host, port)
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{listening.getsockname()[1]}"
    watcher = Watcher(root)
    server = uvicorn.Server(
        uvicorn.Config(
            _application(watcher, host, trust), log_level="warning", timeout_graceful_shutdown=1
        )
    )
    watcher.start()
    print(f"{root} at {url} (Ctrl-C ends it)", flush=True)
    if open_browser:
        webbrowser.open(url)
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        watcher.stop()
        listening.close()
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"cannot listen on {host}:{port}: {reason}; take another --port, or 0 for a free one"
        ) from error
    return listening


def _application(watcher: Watcher, host: str, trust: bool) -> FastAPI:
    application = FastAPI(openapi_url=None)
    if host in _LOOPBACK:
        application.add_middleware(TrustedHostMiddleware, allowed_hosts=[*_LOOPBACK, "[::1]"])
    core.sio.eio.cors_allowed_origins = None  # the page's own alone; NiceGUI takes any
    shared = Shared(watcher, Players(trust=trust))

    @application.get("/frames/{key}/{index}.png")
    def frame(key: str, index: int) -> Response:
        replay = shared.replays.get(key)
        if replay is None or not 0 <= index < len(replay.frames):
            return Response(status_code=404)
        return Response(replay.frames[index], media_type="image/png", headers=_KEEP)

    @application.get("/replays/{key}.f32")
    def numbers(key: str) -> Response:
        replay = shared.replays.get(key)
        if replay is None:
            return Response(status_code=404)
        return Response(packed(replay), media_type="application/octet-stream", headers=_KEEP)

    @ui.page("/", title="mam")
    def page() -> None:
        Page(shared).build()

    app.on_shutdown(shared.players.close)
    ui.run_with(
        application,
        title="mam",
        dark=None,
        favicon="🐍",
        binding_refresh_interval=None,
        show_welcome_message=False,
    )
    return application
