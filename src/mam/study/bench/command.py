"""`mam bench`: implementations, mixers and policies side by side, in one process."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mam.config import Config, NetworkConfig, to_json
from mam.errors import UserError, unknown_name

if TYPE_CHECKING:
    from mam.study.bench.measure import Case, Cell


@dataclass(frozen=True)
class Bench:
    """Time implementations, mixers and policies side by side, against the number of agents.

    Programs are compiled ahead, then timed in turn, round by round. Results are a table per number
    of agents, a CSV file and a plot; times are to be compared within one bench only.
    """

    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WHAT")]
    """scan: the selective scan, forward and backward, in every implementation;
    block: one mixer of every family in every role, forward and backward;
    image: what agents see as an image, read by each encoder, forward and backward;
    act: one joint action per environment;
    decode: the same without the encoder;
    update: one gradient step of a whole policy;
    serve: one joint action as `mam.load` makes it and as exports do, every call by itself;
    train: whole train steps on a probe environment, and acting and the update apart."""
    num_agents: tuple[int, ...] = ()
    """Numbers of agents N; several of the bench's own unless given."""
    batch: int | None = None
    """Environments, the same at every N; 64 for act, decode and train, 1 for serve."""
    tokens: int | None = None
    """Agents in all environments together, in place of --batch; 16384 for scan, 8192 for block
    and update, 1024 for image."""
    candidates: tuple[str, ...] = ()
    """Who takes part; all unless given."""
    rounds: int | None = None
    """Samples of each candidate; as many as take a few seconds if None."""
    max_seconds: float = 60.0
    """Candidates that would take longer than this at one N, compiling apart, are left out there."""
    max_memory: float = 8.0
    """Candidates that need more temporary memory than this, in GB, are left out there."""
    out: Path | None = None
    """Folder of the results, which are written over; bench/<what> if None."""
    network: NetworkConfig = field(default_factory=NetworkConfig)

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not number > 0:
                    raise UserError(
                        f"--{item.name.replace('_', '-')} must be positive, got {number}"
                    )
        if self.batch and self.tokens:
            raise UserError(
                "--tokens decides the batch at every N: drop one of --batch and --tokens"
            )
        Config(network=self.network)  # refuses sizes that no network could have


def run_bench(options: Bench) -> None:
    """Time the candidates, printing as it goes; leave results.csv, plot.png and options.json.

    Raises:
        UserError: for a bench or a candidate that does not exist.
    """
    from rich.console import Console

    from mam.runs import process
    from mam.study.bench.cases import cases
    from mam.study.bench.measure import Limits, measure
    from mam.study.bench.results import CsvFile, Row, cell_report, plot, slope_table

    process.configure(keep_programs=False)  # how long compiling takes is one of the results
    benches = cases()
    if options.what not in benches:
        raise unknown_name("bench", options.what, benches, see="mam bench --help")
    case = benches[options.what]
    names, cells = _candidates(options, case), list(_cells(options, case))
    limits = Limits(options.rounds, options.max_seconds, options.max_memory)
    out, rows = options.out or Path("bench") / options.what, list[Row]()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)

    def written(measured: Iterable[Row]) -> Iterator[Row]:
        for row in measured:
            file.write(row)
            rows.append(row)
            yield row

    def tell(text: str) -> None:
        status.update(text)
        if text:
            status.start()
        else:
            status.stop()

    with CsvFile(out / "results.csv") as file, console.status("starting") as status:
        (out / "options.json").write_text(
            json.dumps(to_json(options), default=str, indent=1) + "\n"
        )
        measured = measure(options.what, case, cells, names, limits, tell=tell)
        try:
            for _, cell_rows in groupby(written(measured), key=lambda row: row.num_agents):
                console.print(cell_report(list(cell_rows)))
        except KeyboardInterrupt:
            console.print("interrupted: here is what there is")
    if any(row.median_ms is not None for row in rows):
        plot(out / "plot.png", rows)
        if slopes := slope_table(rows):
            console.print(slopes)
    console.print(
        f"in {out}: {', '.join(sorted(path.name for path in out.iterdir()))}", soft_wrap=True
    )


def _candidates(options: Bench, case: "Case") -> list[str]:
    """List the candidates asked for, in the bench's own order."""
    for name in options.candidates:
        if name not in case.candidates:
            raise UserError(
                f"unknown candidate '{name}': {options.what} has {', '.join(case.candidates)}"
            )
    return [
        name for name in case.candidates if name in options.candidates or not options.candidates
    ]


def _cells(options: Bench, case: "Case") -> Iterator["Cell"]:
    """Yield the sizes, fewest agents first."""
    from mam.study.bench.measure import Cell

    for num_agents in sorted(set(options.num_agents or case.num_agents)):
        tokens = options.tokens or (None if options.batch else case.tokens)
        batch = max(1, tokens // num_agents) if tokens else options.batch or case.batch
        assert batch is not None
        yield Cell(num_agents, batch, options.network)
