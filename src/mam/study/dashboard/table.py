"""The table of runs."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

from nicegui import ui
from nicegui.events import GenericEventArguments

from mam.study.dashboard.style import STATES
from mam.study.dashboard.watch import Watcher

_ROW_HEIGHT, _HEAD_HEIGHT = 32, 38  # pixels, with borders
_NARROW = 700  # pixels below which only the most important columns are shown
# Columns for wide windows only; in narrow ones the state is a dot in the progress.
_WIDE_ONLY = ("task", "algorithm", "seeds", "state", "speed", "last")

_DOT = f"p => ({{'--dot': ({STATES})[p.data.state]}})"
_BAR = """p => {
  const done = p.data.budget ? Math.min(100 * p.data.steps / p.data.budget, 100) : 0;
  const colour = (STATES)[p.data.state];
  return {'--dot': colour, backgroundImage:\
 `linear-gradient(90deg, ${colour} ${done}%, transparent ${done}%)`};
}""".replace("STATES", str(STATES))
_WRAPPED: dict[str, Any] = {"wrapText": True, "autoHeight": True, "cellClass": "mam-wrap"}
_COLUMNS: list[dict[str, Any]] = [
    _WRAPPED | {"headerName": "run", "field": "id", "flex": 3, "minWidth": 110},
    _WRAPPED | {"headerName": "task", "field": "task", "flex": 2, "minWidth": 110},
    _WRAPPED | {"headerName": "algorithm", "field": "algorithm", "flex": 1, "minWidth": 84},
    {"headerName": "seeds", "field": "seeds", "width": 74, "type": "rightAligned"},
    {
        "headerName": "state",
        "field": "state",
        "width": 106,
        "cellClass": "mam-state",
        ":cellStyle": _DOT,
        "tooltipField": "why",
    },
    {
        "headerName": "progress",
        "field": "steps",
        "minWidth": 88,
        "flex": 1,
        "type": "rightAligned",
        "cellClass": "mam-progress ag-right-aligned-cell",
        ":cellStyle": _BAR,
        ":valueFormatter": "p => p.data.budget ? "
        "Math.floor(100 * Math.min(p.value / p.data.budget, 1)) + ' %' : '–'",
        ":tooltipValueGetter": "p => mam.short(p.data.steps) + ' of ' + "
        "mam.short(p.data.budget) + ' steps per seed'",
    },
    {
        "headerName": "return",
        "field": "mean",
        "minWidth": 118,
        "wrapText": True,
        "autoHeight": True,
        "cellClass": "mam-wrap ag-right-aligned-cell",
        "flex": 1.5,
        "type": "rightAligned",
        ":valueFormatter": "p => p.data.returns",
        "headerTooltip": "last evaluation, or the absolute metric of a finished run: "
        "mean ± deviation over seeds",
    },
    {
        "headerName": "steps/s",
        "field": "speed",
        "width": 90,
        "type": "rightAligned",
        ":valueFormatter": "p => p.value == null ? '–' : mam.short(p.value)",
        "headerTooltip": "environment steps of all seeds together",
    },
    {
        "headerName": "last row",
        "field": "last",
        "width": 96,
        "type": "rightAligned",
        ":valueFormatter": "p => mam.age(p.value)",
    },
]

_OPTIONS: dict[str, Any] = {
    "columnDefs": _COLUMNS,
    "defaultColDef": {"resizable": True, "sortable": True, "suppressHeaderMenuButton": True},
    ":getRowId": "p => p.data.id",
    "rowSelection": {
        "mode": "multiRow",
        "enableClickSelection": True,
        "enableSelectionWithoutKeys": True,
    },
    "selectionColumnDef": {"width": 40, "pinned": "left"},
    "rowHeight": _ROW_HEIGHT,
    "headerHeight": 34,
    "animateRows": False,
    "tooltipShowDelay": 400,
    "suppressCellFocus": True,
    "suppressColumnMoveAnimation": True,
    "overlayNoRowsTemplate": "no runs yet: a run is a folder with a config.json",
    ":onGridSizeChanged": f"e => e.api.setColumnsVisible({list(_WIDE_ONLY)}, "
    f"e.clientWidth > {_NARROW})",
}


class Table:
    """Runs, one per row.

    Args:
        watcher: of the runs.
        on_select: called when other rows are selected.

    Attributes:
        selection: names of the selected runs.
    """

    def __init__(self, watcher: Watcher, on_select: Callable[[], Awaitable[None]]):
        self._watcher, self._on_select = watcher, on_select
        self._shown = dict(watcher.table)
        self.selection: tuple[str, ...] = ()
        self._frame = ui.element("div").classes("mam-table-frame")
        # The frame has the height: a change of the grid's own style would make the grid anew.
        with self._frame:
            rows = {"rowData": list(self._shown.values())}
            self._grid = ui.aggrid(_OPTIONS | rows, auto_size_columns=False).classes("mam-table")
        rows = max(len(self._shown), 2)  # whose height the browser knows better in a moment
        self._frame.style(f"height: min({_HEAD_HEIGHT + _ROW_HEIGHT * rows}px, 42vh)")
        selected = (
            f"() => emit(getElement({self._grid.id}).api.getSelectedRows().map(row => row.id))"
        )
        self._grid.on("selectionChanged", self._take, js_handler=selected)
        ui.run_javascript(f"""
            mam.skew = {time.time():.1f} - Date.now() / 1000;
            setInterval(() => {{
                const grid = getElement({self._grid.id});
                if (grid?.api && !document.hidden)\
 grid.api.refreshCells({{columns: ["last"], force: true}});
            }}, 5000);
            setInterval(() => {{
                const grid = getElement({self._grid.id}), frame = getHtmlElement({self._frame.id});
                if (grid?.api && !document.hidden)\
 mam.fit(grid.api, frame, {_HEAD_HEIGHT}, {_ROW_HEIGHT});
            }}, 300);
        """)

    def refresh(self) -> None:
        """Send the rows that changed."""
        now, before = dict(self._watcher.table), self._shown
        self._shown = now
        change = {
            "add": [row for name, row in now.items() if name not in before],
            "update": [
                row for name, row in now.items() if name in before and before[name] is not row
            ],
            "remove": [{"id": name} for name in before if name not in now],
        }
        if any(change.values()):
            self._grid.run_grid_method("applyTransaction", change)
            # The state colours this cell, whose own value may not have changed.
            self._grid.run_grid_method("refreshCells", {"columns": ["steps"], "force": True})

    async def _take(self, event: GenericEventArguments) -> None:
        self.selection = tuple(sorted(event.args))
        await self._on_select()
