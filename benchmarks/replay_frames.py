"""How smoothly the dashboard's replay moves many agents: frames a second in headless Chromium.

    python benchmarks/replay_frames.py [--agents 100 1000] [--steps 500] [--speed 60]

Writes replays of made-up agents that swarm, serves them, plays each in the whole page, coloured
either way, and prints the frames a second by the browser's own clock, and the share of frames later
than 1/30 s after the one before. Also how long the trace takes to open.
`--screenshots DIR` leaves pictures of each, at 1440 and 390 pixels, light and dark.
"""

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mam.config import Config, to_json
from mam.runs.play import Episode, Trace, write_trace
from mam.runs.sinks import write_atomically

TASK = "camar/random_grid-32"
SIZES = {"desktop": (1440, 1000), "phone": (390, 844)}
FRAMES = """ms => new Promise(done => {
  const times = [], end = performance.now() + ms;
  const note = now => { times.push(now); now < end ? requestAnimationFrame(note) : done(times); };
  requestAnimationFrame(note);
})"""


def write_run(root: Path, agents: int, steps: int) -> None:
    """Write a run with a replay of agents that circle about centres that drift."""
    rng, path = np.random.default_rng(0), root / f"agents-{agents}"
    path.mkdir(parents=True)
    write_atomically(path / "config.json", json.dumps(to_json(Config(env=TASK))))
    t = np.arange(steps)[:, None]
    angle = rng.uniform(0, 2 * np.pi, agents) + 0.03 * t * rng.uniform(0.4, 1.6, agents)
    radius = 2 + 6 * np.sqrt(rng.random(agents)) + np.sin(t / 40)
    positions = radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    shape = (steps, agents)
    trace = Trace(
        reward=rng.normal(size=shape).astype(np.float32),
        value=(radius / 8 + 0.05 * rng.normal(size=shape)).astype(np.float32),
        action=rng.normal(size=(*shape, 2)).astype(np.float32),
        log_prob=-rng.random(shape).astype(np.float32),
        order=np.argsort(angle % (2 * np.pi), axis=1),
        alive=(np.arange(agents) % 10 != 3) | (t < steps // 2),
        positions=positions.astype(np.float32),
    )
    episode = Episode(1.0, False, trace, 0, undrawn="made up")
    write_trace(path / "episode.gif", episode, env=TASK, algorithm="mam", seed=0)


def opened(browser: Any, url: str, name: str, size: tuple[int, int], dark: bool = False) -> Any:
    """Open the replay of a run; return the page, and print how long that took."""
    width, height = size
    page = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
    )
    page.on("pageerror", lambda error: print(f"error in the page: {error}"))
    page.goto(url)
    row = page.locator(".ag-center-cols-container .ag-row", has_text=name)
    row.first.click()
    page.get_by_role("tab", name="Replay").click()
    begin = time.perf_counter()
    page.get_by_text("Point at an agent").wait_for(timeout=120_000)
    page.wait_for_timeout(300)
    print(f"{name:<14}{width:>5} px  opened in {time.perf_counter() - begin:.1f} s")
    return page


def choose(page: Any, label: str, text: str) -> None:
    """Take an option of a select."""
    page.locator(".q-select", has_text=label).last.click()
    page.locator(".q-menu .q-item", has_text=re.compile(f"^{text}$")).click()
    page.wait_for_timeout(200)


def measure(page: Any, name: str, colour: str, speed: int, steps: int) -> None:
    """Play to the end and print how smooth it was."""
    page.get_by_role("button", name=f"by {colour}").click()
    seconds = steps / speed
    page.locator("button", has_text="play_arrow").click()
    times = np.array(page.evaluate(FRAMES, 1000 * (seconds - 0.5)))
    gaps = np.diff(times)
    page.get_by_text(f"after step {steps}").wait_for(timeout=30_000)
    page.wait_for_timeout(500)
    print(
        f"{name:<14}by {colour:<6} {1000 / gaps.mean():6.1f} frames/s, median gap"
        f" {np.median(gaps):5.1f} ms, 99th percentile {np.percentile(gaps, 99):5.1f} ms,"
        f" {(gaps > 1000 / 30 + 1).mean():5.1%} later than 33 ms"
    )


def main() -> None:
    """Make the replays, measure, and remove them."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--agents", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--speed", type=int, default=60, help="one that the page offers")
    parser.add_argument("--screenshots", type=Path)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="replay-"))
    for agents in args.agents:
        write_run(root, agents, args.steps)
    command = [sys.executable, "-m", "mam", "dashboard", str(root), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found is not None
        with sync_playwright() as api:
            browser = api.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            for agents in args.agents:
                name = f"agents-{agents}"
                page = opened(browser, found.group(), name, SIZES["desktop"])
                choose(page, "speed", f"{args.speed} steps/s")
                for colour in ("value", "order"):
                    measure(page, name, colour, args.speed, args.steps)
                page.close()
                if args.screenshots:
                    shoot(browser, found.group(), name, args.screenshots)
            browser.close()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=20)
        shutil.rmtree(root)


def shoot(browser: Any, url: str, name: str, folder: Path) -> None:
    """Leave pictures of a replay in the middle of an episode."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, size in SIZES.items():
        for dark in (False, True):
            page = opened(browser, url, name, size, dark)
            track = page.locator(".q-slider__track-container")
            track.scroll_into_view_if_needed()
            track.click(position={"x": track.bounding_box()["width"] * 0.6, "y": 5})
            box = page.locator(".mam-map canvas").bounding_box()
            if dark:
                page.get_by_role("button", name="by order").click()
            page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.12)
            page.wait_for_timeout(700)
            look = "dark" if dark else "light"
            page.screenshot(path=folder / f"{name}-{kind}-{look}.png", full_page=True)
            page.close()


if __name__ == "__main__":
    main()
