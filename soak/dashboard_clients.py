"""How `mam dashboard` bears many browsers, each with a socket of its own.

    python soak/dashboard_clients.py [--pages 10] [--rows 10] [--browser /usr/bin/chromium]
    python soak/dashboard_clients.py --sockets 50

Opens pages in Chromium, appends a row to a run so many times, and waits until every page shows it;
then cuts the pages off the network for a while and waits until they have caught up. Prints how long
the slowest page took, and the server's time on the CPU and memory. Ends with an error if a page
never shows a row, or says something on its console.

A page of Chromium takes 100 MB. With --sockets there is none: clients load the page and whatever it
names, connect its socket as NiceGUI's script does, acknowledge what they hear, answer what they are
asked, and look for the row in it.
"""

import argparse
import ast
import asyncio
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mam.config import Config, to_json

PATIENCE = 60.0  # seconds a page may take
ACKNOWLEDGE = 3.0  # seconds between two acknowledgements of NiceGUI's script
CONFIG = Config(total_timesteps=10**9)


def append(path: Path, row: int) -> None:
    """A row of a run's metrics, with a return that can be looked for."""
    head = {"update": row, "step_count": row * CONFIG.steps_per_update, "elapsed": float(row)}
    with path.open("a") as file:
        file.write(
            json.dumps({"kind": "evaluation", **head, "episode_return": [[float(row)]]}) + "\n"
        )


@contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """A dashboard of a folder with one run, and its address; says at the end what it took."""
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps(to_json(CONFIG)))
    append(folder / "run" / "metrics.jsonl", 1)
    command = [sys.executable, "-m", "mam", "dashboard", str(folder), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    found = re.search(r"http://\S+", server.stdout.readline())
    assert found is not None
    try:
        yield server, found.group()
        ticks = Path(f"/proc/{server.pid}/stat").read_text().split()
        print(
            f"the server took {(int(ticks[13]) + int(ticks[14])) / 100:.1f} s of CPU, "
            f"at most {megabytes(server, 'VmHWM'):.0f} MB"
        )
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)


def megabytes(server: subprocess.Popen, name: str = "VmRSS") -> float:
    """Memory of a process, as the kernel counts it."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(re.findall(rf"{name}:\s+(\d+)", status)[0]) / 1000


class Socket:
    """What a page does without showing anything."""

    def __init__(self, url: str):
        import socketio

        self.url, self.number, self.acknowledged = url, 0, 0
        self.heard = ""  # since the last row that was seen
        self.messages, self.bytes = 0, 0
        self.io = socketio.AsyncClient(reconnection=False)
        self.io.on("*", self.hear)

    async def open(self, session: Any) -> None:
        """Load the page and its parts, and connect."""
        async with session.get(self.url) as response:
            page = await response.text()
        for path in sorted(set(re.findall(r"""["'](/_nicegui/[^"'?]+\.(?:js|css))""", page))):
            async with session.get(self.url + path) as part:
                await part.read()
        self.heard = page
        query = ast.literal_eval(re.findall(r"query: (\{.*?\})", page)[0])
        self.client, self.number = query["client_id"], query["next_message_id"]
        query |= {"document_id": uuid.uuid4(), "tab_id": uuid.uuid4(), "old_tab_id": "null"}
        query["implicit_handshake"] = "true"  # as JavaScript writes it
        await self.io.connect(
            f"{self.url}?{'&'.join(f'{name}={value}' for name, value in query.items())}",
            headers={"Origin": self.url},
            transports=["websocket"],
            wait_timeout=PATIENCE,
            socketio_path="/_nicegui_ws/socket.io",
        )

    async def hear(self, event: str, message: Any = None) -> None:
        """Take note of a message, and answer it if it asks for something."""
        if not isinstance(message, dict) or message.get("_id", self.number) < self.number:
            return
        self.number = message.get("_id", self.number - 1) + 1
        text = json.dumps(message)
        self.messages, self.bytes = self.messages + 1, self.bytes + len(text)
        self.heard += text
        if event == "run_javascript" and message.get("request_id"):
            answer = {"request_id": message["request_id"], "client_id": self.client, "result": None}
            await self.io.emit("javascript_response", answer)

    async def acknowledge(self) -> None:
        """Say every few seconds what was heard."""
        while True:
            await asyncio.sleep(ACKNOWLEDGE)
            await self.io.emit("ack", {"client_id": self.client, "next_message_id": self.number})

    async def see(self, row: int) -> None:
        """Wait until the row was heard."""
        wanted = re.compile(rf"mean\W+{row}(?:\.0)?\W*[,}}]")
        while not wanted.search(self.heard):
            assert self.io.connected, "the server hung up"
            await asyncio.sleep(0.01)
        self.heard = ""


async def drive_sockets(folder: Path, number: int, rows: int) -> None:
    """Connect clients without browsers, and measure."""
    import aiohttp

    async def see(row: int) -> float:
        begin = time.perf_counter()
        await asyncio.wait_for(asyncio.gather(*(x.see(row) for x in sockets)), PATIENCE)
        return time.perf_counter() - begin

    with serving(folder) as (server, url):
        alone = megabytes(server)
        sockets = [Socket(url) for _ in range(number)]
        begin = time.perf_counter()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout()) as session:
            for socket in sockets:
                await socket.open(session)
        heartbeats = [asyncio.create_task(socket.acknowledge()) for socket in sockets]
        await see(1)
        print(
            f"{number} clients opened, all know the run after {time.perf_counter() - begin:.1f} s"
        )
        times = []
        for row in range(2, rows + 2):
            append(folder / "run" / "metrics.jsonl", row)
            times.append(await see(row))
        print(
            f"a new row is at every client after {max(times):.1f} s at most, "
            f"{sum(times) / len(times):.1f} s on average"
        )
        heard = sum(socket.messages for socket in sockets)
        size = sum(socket.bytes for socket in sockets)
        print(
            f"{heard} messages of {size / max(heard, 1):.0f} bytes; the server had {alone:.0f} MB "
            f"before the first client, {megabytes(server):.0f} MB now"
        )
        for task, socket in zip(heartbeats, sockets, strict=True):
            task.cancel()
            await socket.io.disconnect()


def slowest(pages: list[Any], text: str) -> float:
    """Seconds until all pages show a text."""
    begin = time.perf_counter()
    for page in pages:
        page.get_by_text(text, exact=True).first.wait_for(timeout=1000 * PATIENCE)
    return time.perf_counter() - begin


def drive_pages(folder: Path, number: int, rows: int, browser_path: str) -> list[str]:
    """Open pages in Chromium, measure, and return what went wrong."""
    from playwright.sync_api import sync_playwright

    errors: list[str] = []
    with serving(folder) as (_, url), sync_playwright() as api:
        browser = api.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        contexts = [browser.new_context() for _ in range(number)]
        pages = [context.new_page() for context in contexts]
        for page in pages:
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(url)
        print(
            f"{number} pages opened, the last one shows the run after "
            f"{slowest(pages, '1.000'):.1f} s"
        )
        times = []
        for row in range(2, rows + 2):
            append(folder / "run" / "metrics.jsonl", row)
            times.append(slowest(pages, f"{row}.000"))
        print(
            f"a new row is on every page after {max(times):.1f} s at most, "
            f"{sum(times) / len(times):.1f} s on average"
        )
        for context in contexts:
            context.set_offline(True)
        time.sleep(10)
        append(folder / "run" / "metrics.jsonl", rows + 2)
        for context in contexts:
            context.set_offline(False)
        print(f"back from 10 s without network after {slowest(pages, f'{rows + 2}.000'):.1f} s")
        browser.close()
    return errors


def main() -> None:
    """Starts the server and its clients, and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", type=int, default=10)
    parser.add_argument("--sockets", type=int, default=0, help="in place of pages")
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--browser", default="/usr/bin/chromium")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.sockets:
            asyncio.run(drive_sockets(folder, args.sockets, args.rows))
            return
        if errors := drive_pages(folder, args.pages, args.rows, args.browser):
            sys.exit(f"errors: {errors}")


if __name__ == "__main__":
    main()
