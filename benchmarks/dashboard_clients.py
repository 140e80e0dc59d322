"""How `mam dashboard` bears many browsers: pages in Chromium, each with a socket of its own.

    python benchmarks/dashboard_clients.py [--pages 50] [--rows 10] [--browser /usr/bin/chromium]

Opens the pages, appends a row to a run so many times, and waits until every page shows it; then
cuts the pages off the network for a while and waits until they have caught up. Prints how long the
slowest page took, and the server's time on the CPU. Ends with an error if a page never shows a row,
or says something on its console.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mam.config import Config, to_json

PATIENCE = 60.0  # seconds a page may take
CONFIG = Config(total_timesteps=10**9)


def append(path: Path, row: int) -> None:
    """A row of a run's metrics, with a return that can be looked for."""
    head = {"update": row, "step_count": row * CONFIG.steps_per_update, "elapsed": float(row)}
    with path.open("a") as file:
        file.write(
            json.dumps({"kind": "evaluation", **head, "episode_return": [[float(row)]]}) + "\n"
        )


def slowest(pages: list[Any], text: str) -> float:
    """Seconds until all pages show a text."""
    begin = time.perf_counter()
    for page in pages:
        page.get_by_text(text, exact=True).first.wait_for(timeout=1000 * PATIENCE)
    return time.perf_counter() - begin


def main() -> None:
    """Starts the server and the browser, and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", type=int, default=50)
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--browser", default="/usr/bin/chromium")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as api:
        run = Path(folder) / "run"
        run.mkdir()
        (run / "config.json").write_text(json.dumps(to_json(CONFIG)))
        append(run / "metrics.jsonl", 1)
        command = [sys.executable, "-m", "mam", "dashboard", folder, "--port", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found is not None
        browser = api.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
        errors: list[str] = []
        contexts = [browser.new_context() for _ in range(args.pages)]
        pages = [context.new_page() for context in contexts]
        for page in pages:
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(found.group())
        print(
            f"{args.pages} pages opened, the last one shows the run after "
            f"{slowest(pages, '1.000'):.1f} s"
        )
        times = []
        for row in range(2, args.rows + 2):
            append(run / "metrics.jsonl", row)
            times.append(slowest(pages, f"{row}.000"))
        print(
            f"a new row is on every page after {max(times):.1f} s at most, "
            f"{sum(times) / len(times):.1f} s on average"
        )
        for context in contexts:
            context.set_offline(True)
        time.sleep(10)
        append(run / "metrics.jsonl", args.rows + 2)
        for context in contexts:
            context.set_offline(False)
        print(
            f"back from 10 s without network after {slowest(pages, f'{args.rows + 2}.000'):.1f} s"
        )
        ticks = Path(f"/proc/{server.pid}/stat").read_text().split()
        print(
            f"the server took {(int(ticks[13]) + int(ticks[14])) / 100:.1f} s of CPU; "
            f"errors: {errors}"
        )
        browser.close()
        server.send_signal(signal.SIGINT)
        server.wait(20)
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
