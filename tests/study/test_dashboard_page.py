"""The command, and the page in a browser: on loopback, with the browser of this machine."""

import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mam.cli import main as cli
from mam.runs.play import Episode, Trace, write_trace
from report_runs import CONFIG, write_run

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
STEPS, AGENTS = 6, 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "dashboard needs a folder with runs"),
        (["nowhere"], "nowhere does not exist"),
        ([__file__], "is a file"),
        ([".", "--port", "70000"], "--port must lie in [0, 65535]"),
        ([".", "--prot", "1"], "did you mean --port"),
    ],
)
def test_mistakes_are_one_line(args, words, capsys):
    assert cli.main(["dashboard", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_missing_extra_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "nicegui", None)
    assert cli.main(["dashboard", str(tmp_path)]) == 2
    assert 'pip install "multi-agent-mamba[dashboard]"' in capsys.readouterr().err


def write_episode(run):
    """A replay whose states are shades of grey; the third looks like the second."""
    rng, shape = np.random.default_rng(0), (STEPS, AGENTS)
    shades = [
        Image.fromarray(np.full((20, 20, 3), 30 * max(state, 2) - 40, np.uint8))
        for state in range(STEPS + 1)
    ]
    shades[0].save(
        run / "episode.gif", save_all=True, append_images=shades[1:], duration=100, loop=0
    )
    trace = Trace(
        reward=np.ones(shape),
        value=rng.normal(size=shape),
        action=np.arange(STEPS * AGENTS).reshape(shape),
        log_prob=-rng.random(shape),
        order=np.tile([1, 0], (STEPS, 1)),
        alive=np.ones(shape, bool),
        positions=np.stack(np.indices(shape, float), axis=-1),  # rows are steps, columns agents
    )
    write_trace(
        run / "episode.gif",
        Episode(6.0, True, trace, STEPS + 1),
        env="lbf/small",
        algorithm="mam",
        seed=0,
    )


def serve(root, *options):
    """Starts the command; returns the process and what it says first."""
    command = [sys.executable, "-m", "mam", "dashboard", str(root), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process, process.stdout.readline()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two small runs, one of them unfinished, with a replay in the other."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "one", updates=3)
    write_run(root / "two", replace(CONFIG, policy="mat"), seed=1)
    write_episode(root / "two")
    return root


@pytest.fixture(scope="module")
def url(root):
    process, said = serve(root, "--port", "0")
    try:
        yield re.search(r"http://127\.0\.0\.1:\d+", said).group()
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "")
    assert all("is not an accepted origin" in line for line in err.splitlines())


def test_a_port_that_is_taken(url, root):
    process, said = serve(root, "--port", url.rpartition(":")[2])
    _, err = process.communicate(timeout=20)
    assert (process.returncode, said) == (2, "")
    (line,) = err.splitlines()
    assert "cannot listen on 127.0.0.1" in line


def test_requests_for_other_names_are_refused(url):
    assert urllib.request.urlopen(url).status == 200
    for address, headers, code in (
        (url, {"Host": "example.org"}, 400),
        (f"{url}/frames/x/0.png", {}, 404),
        (f"{url}/replays/x.f32", {}, 404),
    ):
        with pytest.raises(urllib.error.HTTPError, match=str(code)):
            urllib.request.urlopen(urllib.request.Request(address, headers=headers))


@pytest.mark.parametrize(
    ("origin", "own"),
    [
        ("http://evil.example", False),
        ("null", False),
        ("http://127.0.0.1:1", False),
        ("https://{host}", False),
        ("http://{host}", True),
    ],
)
@pytest.mark.parametrize("transport", ["polling", "websocket"])
def test_the_socket_answers_the_page_and_no_other(url, origin, own, transport):
    host = url.removeprefix("http://")
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    headers = {"Origin": origin.format(host=host)} | (upgrade if transport == "websocket" else {})
    connection = http.client.HTTPConnection(host, timeout=20)
    connection.request(
        "GET", f"/_nicegui_ws/socket.io/?EIO=4&transport={transport}", headers=headers
    )
    answer = connection.getresponse()
    assert (answer.status < 400) == own
    assert ("Access-Control-Allow-Origin" in answer.headers) == (own and transport == "polling")
    connection.close()


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_page_in_a_browser(url, root):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        errors, hosts = [], set()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.goto(url)
        expect = playwright.expect
        expect.set_options(timeout=20_000)

        rows = page.locator(".ag-center-cols-container .ag-row")
        expect(rows).to_have_count(2)
        expect(rows.filter(has_text="one")).to_contain_text("37 %")
        expect(rows.filter(has_text="two")).to_contain_text("finished")
        expect(page.locator(".mam-chart canvas")).to_have_count(1)
        assert labels(page) == ["mam", "mat"]
        assert drawn(page, "mam") == 1

        with (root / "one" / "metrics.jsonl").open("a") as file:
            for update in range(4, 7):
                head = {"update": update, "step_count": 16 * update, "elapsed": 20.0 + update}
                for kind, returns in (("train", [0.5] * 5), ("evaluation", [[update, 1.0]] * 5)):
                    file.write(json.dumps({"kind": kind, **head, "episode_return": returns}) + "\n")
        expect(rows.filter(has_text="one")).to_contain_text("75 %")
        expect(rows.filter(has_text="one")).to_contain_text("3.500 ± 0.000")
        page.wait_for_function(f"({DRAWN})('mam') == 4")

        rows.filter(has_text="two").click()
        page.wait_for_function(f"({LABELS})().join() == 'mat'")

        page.get_by_role("tab", name="Replay").click()
        expect(page.get_by_text(f"step 1 of {STEPS} · reward so far 0.000")).to_be_visible()
        cells = page.locator(".mam-replay .mam-grid td")
        assert cells.all_inner_texts()[:3] == [
            "0",
            "2",
            "0",
        ]  # agent 0 decides second, and takes action 0
        track = page.locator(".q-slider__track-container")
        track.click(position={"x": track.bounding_box()["width"] - 1, "y": 5})
        expect(
            page.get_by_text(f"after step {STEPS}: terminated · reward so far 6.000")
        ).to_be_visible()
        page.wait_for_function("document.querySelector('.mam-frame img')?.src.endsWith('/4.png')")

        canvas, told = page.locator(".mam-map canvas"), page.locator(".mam-map-told")
        expect(canvas).to_be_hidden()
        page.get_by_role("button", name="map").click()
        expect(canvas).to_be_visible()
        track.click(position={"x": 1, "y": 5})
        page.wait_for_function(f"({PLACED})()[1] < 100")  # in the uppermost row
        page.mouse.move(*point_of(page, agent=1))
        expect(told).to_contain_text("agent 1 · decides 1 of 2 · action 1 ·")
        page.locator("button", has_text="play_arrow").click()
        expect(page.get_by_text(f"after step {STEPS}: terminated")).to_be_visible()
        expect(page.locator("button", has_text="play_arrow")).to_be_visible()
        page.mouse.move(*point_of(page, agent=0))
        expect(told).to_contain_text(f"agent 0 · decides 2 of 2 · action {AGENTS * (STEPS - 1)} ·")
        page.get_by_role("button", name="by order").click()  # the last to decide is yellow
        page.wait_for_function(f"({PAINTED})({point_of(page, agent=0)}).join() == '240,180,30,255'")
        browser.close()
    assert not errors
    assert hosts == {url.removeprefix("http://")}


HOSTILE = "<img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The page on runs with long names that differ at their ends, and with markup anywhere."""
    root = tmp_path_factory.mktemp("hostile")
    for end in ("a", "b"):
        write_run(
            root / f"{'long' * 20}-{end}",
            replace(CONFIG, env=f"{HOSTILE} {'task' * 20}-{end}", policy=HOSTILE),
        )
    write_run(root / f"x{HOSTILE}".replace("/", ""), device=HOSTILE)
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text(json.dumps({HOSTILE: 1}))
    process, said = serve(root, "--port", "0")
    try:
        yield re.search(r"http://127\.0\.0\.1:\d+", said).group()
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_names_are_shown_whole_and_run_nothing(hostile, width):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 2400})
        page.goto(hostile)
        cells = page.locator(".ag-center-cols-container .ag-cell.mam-wrap")
        playwright.expect(cells.filter(has_text="-b").first).to_be_visible(timeout=20_000)
        page.wait_for_timeout(500)
        assert page.evaluate(CUT) == []
        for tab in ("Speed", "Settings", "Logs", "Replay"):
            page.get_by_role("tab", name=tab).click()
            page.wait_for_timeout(700)
        assert page.title() == "mam"
        assert page.locator("img[src=x]").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") == width
        browser.close()


CUT = """() => [...document.querySelectorAll(".ag-center-cols-container .ag-cell")]
    .filter(cell => cell.scrollWidth > cell.clientWidth + 1 \
|| cell.scrollHeight > cell.clientHeight + 1)
    .map(cell => cell.getAttribute("col-id") + ": " + cell.innerText)"""
LABELS = """() => getElement(+document.querySelector(".mam-chart").id.slice(1)).chart\
.getOption().series
    .filter(one => one.id.startsWith("mean")).map(one => one.name)"""
DRAWN = """name => getElement(+document.querySelector(".mam-chart").id.slice(1)).chart\
.getOption().series
    .find(one => one.id == "mean " + name)?.data.length"""


MAP = "getElement(+document.querySelector('.mam-map').id.slice(1))"
PLACED = f"() => [...{MAP}.xy]"
PAINTED = """([x, y]) => { const canvas = document.querySelector(".mam-map canvas"),
    {left, top} = canvas.getBoundingClientRect();
    return [...canvas.getContext("2d").getImageData(x - left, y - top, 1, 1).data]; }"""


def point_of(page, agent):
    """Where on the page an agent is drawn."""
    box, xy = page.locator(".mam-map canvas").bounding_box(), page.evaluate(PLACED)
    return [box["x"] + xy[2 * agent], box["y"] + xy[2 * agent + 1]]


def labels(page):
    page.wait_for_function(f"({LABELS})().length > 0")
    return page.evaluate(LABELS)


def drawn(page, name):
    return page.evaluate(DRAWN, name)
