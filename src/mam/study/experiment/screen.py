"""The matrix on the terminal: a live table, or plain lines where there is no terminal."""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mam.study.experiment.matrix import Row

_STYLES = {
    "waiting": "dim",
    "running": "bold",
    "finished": "green",
    "stopped": "yellow",
    "pruned": "yellow",
    "failed": "red",
}
# What is shown first if not all rows fit.
_URGENCY = ("failed", "running", "stopped", "waiting", "pruned", "finished")


class Screen:
    """Standard output; a context manager, so that the terminal is itself again whatever happens."""

    def __init__(self, console: Console | None = None):
        # FORCE_COLOR, usual in CI, makes rich take a file for a terminal; a file cannot be redrawn.
        self._console = console or Console(
            highlight=False, force_interactive=None if sys.stdout.isatty() else False
        )
        self._tenths: dict[str, int] = {}  # of each run's steps, as last said
        self._live = Live(console=self._console, transient=True, refresh_per_second=4)

    def __enter__(self) -> "Screen":
        if self._console.is_interactive:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def log(self, text: str) -> None:
        """Print a line, above the table where there is one."""
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, rows: Sequence["Row"]) -> None:
        """Redraw the table; without a terminal, say which runs have got a tenth further."""
        if self._live.is_started:
            self._live.update(self.table(rows, limit=max(self._console.height - 8, 3)))
            return
        for row in rows:
            tenths = 10 * row.progress.step_count // row.job.budget
            if row.status == "running" and tenths > self._tenths.get(row.job.name, 0):
                self._tenths[row.job.name] = tenths
                self.log(f"{row.job.name}: {10 * tenths} %, return {self.returns(row)}")

    def conclude(self, rows: Sequence["Row"]) -> None:
        """Leave the whole table behind."""
        self._live.stop()
        self._console.print(self.table(rows))

    def table(self, rows: Sequence["Row"], *, limit: int | None = None) -> Table:
        """Tabulate the runs in their order, the most urgent ones if there are more than `limit`."""
        shown = sorted(rows, key=lambda row: _URGENCY.index(row.status))[:limit]
        counts = Counter(row.status for row in rows)
        summary = ", ".join(f"{counts[status]} {status}" for status in _URGENCY if counts[status])
        hidden = f"; {len(rows) - len(shown)} not shown" if len(shown) < len(rows) else ""
        table = Table(
            caption=f"{len(rows)} runs: {summary}{hidden}", caption_justify="left", box=SIMPLE_HEAD
        )
        table.add_column("run", overflow="fold")
        for header in ("status", "done", "return", "steps/s"):
            table.add_column(header, justify="right", no_wrap=True)
        for row in rows:
            if row in shown:
                done = min(row.progress.step_count / row.job.budget, 1.0)
                speed = row.progress.speed * row.job.config.num_seeds
                table.add_row(
                    Text(row.job.name),  # which is made of settings, brackets included
                    Text(row.status, _STYLES[row.status]),
                    f"{100 * done:.0f} %",
                    self.returns(row),
                    f"{speed:,.0f}" if np.isfinite(speed) else "–",
                )
        return table

    @staticmethod
    def returns(row: "Row") -> str:
        """Format mean ± standard deviation over seeds of the last evaluation or absolute metric."""
        from mam.runs.sinks import mean_and_spread

        return mean_and_spread(row.progress.returns) if len(row.progress.returns) else "–"
