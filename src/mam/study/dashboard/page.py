"""The page: the table of runs, and below it what can be looked at of those that are selected."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from nicegui import ui

from mam.study.dashboard.charts import Charts, Speeds
from mam.study.dashboard.curves import SPEED, Curves
from mam.study.dashboard.details import Logs, Settings
from mam.study.dashboard.player import Player
from mam.study.dashboard.replay import Players, Replay, load
from mam.study.dashboard.runs import LiveRun
from mam.study.dashboard.style import HEAD
from mam.study.dashboard.table import Table
from mam.study.dashboard.watch import Watcher

_INTERVAL = 1.0  # seconds between two looks at what the watcher found
_KEPT = 4  # replays whose frames are in memory
_ORDER = ("running", "failed", "stopped", "finished")


@dataclass
class Shared:
    """The state that all open pages share."""

    watcher: Watcher
    players: Players
    curves: Curves = field(default_factory=Curves)
    replays: dict[str, Replay] = field(default_factory=dict)  # the newest few, by key

    def replay(self, path: Path) -> tuple[str, Replay]:
        """Return the key to the frames of an episode, and the episode.

        Raises:
            UserError: if it cannot be read.
        """
        try:
            stamp = path.stat().st_mtime_ns
        except OSError:
            stamp = 0
        key = hashlib.sha256(f"{path}\0{stamp}".encode()).hexdigest()[:16]
        if key not in self.replays:
            self.replays[key] = load(path)
            while len(self.replays) > _KEPT:
                self.replays.pop(next(iter(self.replays)))
        return key, self.replays[key]


class Page:
    """One open page."""

    def __init__(self, shared: Shared):
        self._shared, self._watcher = shared, shared.watcher
        self._seen = (-1, (), "")  # version, selection and trouble of what is shown
        self._busy = False

    def build(self) -> None:
        """Lay out the page and keep it up to date."""
        ui.dark_mode(None)
        ui.colors(primary="#0072B2")
        ui.add_head_html(HEAD)
        with ui.column().classes("mam-page"):
            with ui.row().classes("mam-head"):
                ui.label("mam").classes("mam-title")
                ui.label(str(self._watcher.root)).classes("mam-faint mam-path")
                ui.space()
                self._summary = ui.label().classes("mam-faint").mark("summary")
            self._trouble = ui.label().classes("mam-trouble").mark("trouble")
            self._table = Table(self._watcher, self._selected)
            with (
                ui.tabs()
                .props("dense no-caps align=left inline-label")
                .classes("mam-tabs") as self._tabs
            ):
                names = ("Curves", "Speed", "Settings", "Logs", "Replay")
                for name in names:
                    ui.tab(name)
            with ui.tab_panels(self._tabs, value="Curves", animated=False, keep_alive=True).classes(
                "mam-panels"
            ):
                self._views = {}
                curves, everything = self._shared.curves, lambda: list(self._watcher.runs.values())
                with ui.tab_panel("Curves"):
                    self._views["Curves"] = Charts(curves, everything)
                with ui.tab_panel("Speed"):
                    self._views["Speed"] = Speeds(
                        Charts(curves, everything, metric=f"train/{SPEED}")
                    )
                with ui.tab_panel("Settings"):
                    self._views["Settings"] = Settings()
                with ui.tab_panel("Logs"):
                    self._views["Logs"] = Logs()
                with ui.tab_panel("Replay"):
                    self._views["Replay"] = Player(self._shared.replay, self._shared.players)
            self._tabs.on_value_change(self._selected)
        ui.timer(_INTERVAL, self._refresh)

    async def _selected(self) -> None:
        self._seen = (-1, (), "")
        await self._refresh()

    async def _refresh(self) -> None:
        version, view = self._watcher.version, self._tabs.value or "Curves"
        now = (version, self._table.selection, self._watcher.trouble)
        unchanged = self._seen == now
        if self._busy or (unchanged and view != "Logs"):  # what a run prints is no metric
            return
        self._busy = True
        try:
            self._seen = now
            self._table.refresh()
            self._summary.text = self._summarise()
            self._trouble.text = now[-1]
            self._trouble.set_visibility(bool(now[-1]))
            await self._views[view].refresh(self._runs())
        finally:
            self._busy = False

    def _runs(self) -> list[LiveRun]:
        """Return the selected runs; all, if none is."""
        runs = self._watcher.runs
        return [runs[name] for name in self._table.selection if name in runs] or list(runs.values())

    def _summarise(self) -> str:
        progress, states = (
            self._watcher.progress,
            [row["state"] for row in list(self._watcher.table.values())],
        )
        counts = [f"{states.count(state)} {state}" for state in _ORDER if state in states]
        reading = [f"reading {progress.unread} more"] if progress.unread else []
        size = f"{progress.nbytes / 1e6:.0f} MB of numbers" if progress.nbytes >= 1e6 else ""
        return " · ".join(filter(None, [*(counts or ["no runs yet"]), *reading, size]))
