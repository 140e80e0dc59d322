"""Files, tables and plots."""

import csv
import io
from dataclasses import replace

import pytest
from rich.console import Console

from mam.study.bench.results import CsvFile, Row, cell_report, plot, slope_table

PNG = b"\x89PNG\r\n\x1a\n"
ROWS = [
    Row(
        "act",
        name,
        n,
        64,
        median_ms=cost * n**power,
        ratio=1.0,
        temp_mb=float(n),
        extrapolated=n == 64,
        device="cpu",
    )
    for name, cost, power in (("mam", 0.5, 1.0), ("mat", 0.01, 2.0))
    for n in (4, 16, 64)
]


def shown(renderable):
    console = Console(width=120, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path):
    with CsvFile(tmp_path / "new" / "results.csv") as file:
        file.write(replace(ROWS[0], note="a, b"))
        (row,) = csv.DictReader((tmp_path / "new" / "results.csv").read_text().splitlines())
    assert (row["candidate"], row["num_agents"], row["median_ms"], row["note"]) == (
        "mam",
        "4",
        "2",
        "a, b",
    )
    assert (row["extrapolated"], row["compile_s"]) == ("False", "")


def test_a_table_shows_what_was_measured_and_notes_below():
    left_out = Row("act", "other", 4, 64, note="skipped: too slow")
    text = shown(cell_report([ROWS[0], left_out]))
    assert "act · N = 4 · batch 64" in text
    assert "median ms" in text
    assert "parameters" not in text
    assert text.count("other") == 1
    assert "other: skipped: too slow" in text


def test_slopes():
    text = shown(slope_table(ROWS))
    assert "batch 64" in text
    assert [line.split() for line in text.splitlines() if line.strip().startswith("ma")] == [
        ["mam", "1.00", "1.00"],
        ["mat", "2.00", "2.00"],
    ]
    assert "batch × N = 256" in shown(
        slope_table([replace(row, batch=256 // row.num_agents) for row in ROWS])
    )
    assert slope_table(ROWS[:1]) is None


@pytest.mark.parametrize(
    "rows", [ROWS, ROWS[:1], [*ROWS, Row("act", "x/y", 4, 64, note="skipped")]], ids=len
)
def test_plot(rows, tmp_path):
    plot(tmp_path / "plot.png", rows)
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
