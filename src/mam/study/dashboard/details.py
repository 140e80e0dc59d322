"""What the selected runs were run with, and what they said."""

import asyncio
from collections.abc import Sequence
from html import escape
from typing import Any

from nicegui import ui

from mam.errors import printable
from mam.study.dashboard.runs import LiveRun, differing, tail

_MOST_RUNS = 12  # side by side
_LOG_LINES, _ROWS = 200, 12


def grid(
    header: Sequence[Any],
    rows: Sequence[Sequence[Any]],
    align: str = "",
    *,
    faint: Sequence[bool] = (),
) -> str:
    """Format a table as HTML; every cell is escaped.

    Args:
        header: names of the columns.
        rows: cells, as text.
        align: a letter per column: l for text, r for numbers; all text if empty.
        faint: rows to be shown as less important.
    """

    def line(cells: Sequence[Any], tag: str) -> str:
        letters = align or "l" * len(cells)
        pairs = zip(letters, cells, strict=True)
        return "".join(
            f'<{tag} class="{letter}">{escape(printable(cell))}</{tag}>' for letter, cell in pairs
        )

    head, body = line(header, "th"), ""
    for index, row in enumerate(rows):
        kind = ' class="dead"' if index < len(faint) and faint[index] else ""
        body += f"<tr{kind}>{line(row, 'td')}</tr>"
    return f'<table class="mam-grid"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


class Settings:
    """The settings and versions in which runs differ; of a single run, all of them."""

    def __init__(self):
        self._note = ui.label().classes("mam-faint")
        self._table = ui.html("", sanitize=False).classes("mam-scroll mam-card").mark("settings")
        self._shown = ""

    async def refresh(self, runs: Sequence[LiveRun]) -> None:
        """Show what is new in these runs."""
        text, note = await asyncio.to_thread(self._describe, list(runs)[:_MOST_RUNS])
        more = len(runs) - _MOST_RUNS
        self._note.text = note + (
            f" · {more} more runs are not shown: select some" if more > 0 else ""
        )
        if text != self._shown:
            self._shown = text
            self._table.set_content(text)

    @staticmethod
    def _describe(runs: list[LiveRun]) -> tuple[str, str]:
        if not runs:
            return "", ""
        facts = [
            one.settings() | {f"version: {name}": value for name, value in one.versions().items()}
            for one in runs
        ]
        rows = (
            differing(facts)
            if len(runs) > 1
            else {name: [value] for name, value in facts[0].items()}
        )
        note = (
            "what differs between the runs"
            if len(runs) > 1
            else "select several runs to see what differs"
        )
        if not rows:
            return "", "nothing differs between these runs"
        shown = [
            [name, *("–" if value is None else value for value in values)]
            for name, values in rows.items()
        ]
        return grid(["", *(one.name for one in runs)], shown), note


class Logs:
    """The end of what a run printed and of what it recorded."""

    def __init__(self):
        self._run: LiveRun | None = None
        self._runs: dict[str, LiveRun] = {}
        self._choice = (
            ui.select([], on_change=self._show)
            .props("dense options-dense borderless")
            .mark("log run")
        )
        with ui.element("div").classes("mam-card").style("width: 100%"):
            self._title = ui.label("output.log").classes("mam-card-title")
            self._output = ui.html("", sanitize=False).style("width: 100%")
        with ui.element("div").classes("mam-card").style("width: 100%; margin-top: 12px"):
            ui.label("metrics.jsonl").classes("mam-card-title")
            self._metrics = ui.html("", sanitize=False).style("width: 100%")

    async def refresh(self, runs: Sequence[LiveRun]) -> None:
        """Show what is new in these runs."""
        self._runs = {one.name: one for one in runs}
        names = list(self._runs)
        if names != self._choice.options:
            value = (
                self._choice.value if self._choice.value in names else (names[0] if names else None)
            )
            self._choice.set_options(names, value=value)
        await self._show()

    async def _show(self) -> None:
        one = self._runs.get(str(self._choice.value))
        output, rows = await asyncio.to_thread(self._read, one) if one else ("", "")
        self._output.set_content(_log(output or "(none: `mam experiment` writes one)"))
        self._metrics.set_content(_log(rows or "(none yet)"))

    @staticmethod
    def _read(one: LiveRun) -> tuple[str, str]:
        output = "\n".join(tail(one.path / "output.log").splitlines()[-_LOG_LINES:])
        rows = [
            line if len(line) < 600 else line[:600] + "…"
            for line in tail(one.path / "metrics.jsonl").splitlines()
        ]
        damaged = one.metrics.damaged
        note = f"\n({damaged} lines of the file cannot be read)" if damaged else ""
        return output, "\n".join(rows[-_ROWS:]) + note


def _log(text: str) -> str:
    return f'<pre class="mam-log">{escape(text)}</pre>'
