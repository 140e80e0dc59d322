"""`mam report RUNS…`: runs compared, as a page."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from mam.errors import printable
from mam.runs.files import writing


@dataclass(frozen=True)
class Report:
    """Compare runs: curves, statistics with intervals and tables as a page that needs nothing else.

    Writes report.html, report.md, tables.tex, figures/*.png and data/*.csv.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or folders that contain them."""
    out: Path = Path("report")
    """Folder of the report, which is written over."""
    by: tuple[str, ...] = ()
    """Settings, such as ppo.lr, that make algorithms of their own out of runs of one."""


def report(args: Report) -> None:
    """Write the report."""
    from mam.study.report.checks import load
    from mam.study.report.page import write_report

    results, warnings = load(args.runs, args.by)
    with writing(args.out):
        write_report(args.out, results, warnings)
    for warning in warnings:
        print(f"warning: {printable(warning)}")
    print(f"in {args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")
