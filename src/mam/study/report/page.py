"""The report as a page without outside references, as Markdown, and as LaTeX tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mam.errors import DISTRIBUTION, installed_version, needs_extra, printable
from mam.runs.sinks import write_atomically
from mam.study.report.escape import markdown, tex
from mam.study.report.figures import (
    Figure,
    aggregate_figures,
    comparison_figures,
    render,
    task_figures,
)
from mam.study.report.numbers import csv_files
from mam.study.report.results import Results
from mam.study.report.tables import tables


@dataclass(frozen=True)
class Section:
    """Figures under a heading, and what they show."""

    title: str
    text: str
    figures: Sequence[Figure]


def write_report(out: Path, results: Results, warnings: Sequence[str]) -> None:
    """Write report.html, report.md, tables.tex, figures/*.png and data/*.csv.

    Args:
        out: folder, made if missing; what an earlier report left in it is written over.
        results: what is reported.
        warnings: reasons for doubt, one line each.

    Raises:
        UserError: if Jinja2 is missing.
    """
    templates = {name: _template(name) for name in _WRITTEN}
    for folder in ("figures", "data"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    sections = _sections(results)
    for figure in (figure for section in sections for figure in section.figures):
        (out / "figures" / f"{figure.name}.png").write_bytes(render(figure, "png"))
    for name, text in csv_files(results).items():
        write_atomically(out / "data" / name, text)
    context = {
        "title": f"{_counted(results.algorithms, 'algorithm')} "
        f"on {_counted(results.tasks, 'task')}",
        "facts": _facts(results),
        "warnings": warnings,
        "sections": sections,
        "tables": tables(results),
    }
    for name, template in templates.items():
        write_atomically(out / name, template.render(context))


def _sections(results: Results) -> list[Section]:
    sections = [
        Section(
            "Over all tasks",
            "Means of absolute metrics, normalised per task: 0 and 1 are the worst and the best "
            "mean return that any seed of any algorithm had there. "
            "Bars and bands are 95 % stratified bootstrap intervals.",
            aggregate_figures(results),
        ),
        Section(
            "Comparisons",
            "The share of runs that score above τ; how likely a run of the one beats a run of the "
            "other on the same task, ties counting half; "
            "the IQM of normalised evaluations against environment steps.",
            comparison_figures(results),
        ),
        Section(
            "Learning curves",
            "Mean return of the current weights' evaluations over seeds, "
            "with 95 % bootstrap intervals: against environment steps, and against the time that "
            "whole runs took, all their seeds, compiling and evaluations included.",
            task_figures(results),
        ),
    ]
    return [section for section in sections if section.figures]


def _counted(things: Sequence[str], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _facts(results: Results) -> str:
    runs = {seed.run.path: seed.run for seed in results.seeds}.values()
    finished = sum(run.finished for run in runs)
    steps = sum(run.step_count * run.config.num_seeds for run in runs)
    version = installed_version(DISTRIBUTION) or "(not installed)"
    return (
        f"{', '.join(results.algorithms)} · {len(runs)} runs, {finished} of them finished · "
        f"{len(results.seeds)} seeds in all · {steps:,} environment steps · mam {version}"
    )


def _template(name: str) -> Any:
    """Load a template that escapes every value for its language, except what is Markup."""
    with needs_extra("mam report", "Jinja2", "report"):
        import jinja2
        from markupsafe import Markup
    escape = _WRITTEN[name]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mam.study.report"),
        autoescape=name.endswith(".html"),
        finalize=lambda value: value if isinstance(value, Markup) else escape(value),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = _svg
    return environment.get_template(name)


# What is written, and what escapes its values besides Jinja.
_WRITTEN = {"report.html": printable, "report.md": markdown, "tables.tex": tex}


def _svg(figure: Figure) -> str:
    """Render an image for a page.

    It has no file head, is as wide as there is room, and has a name for screen readers.
    """
    from markupsafe import Markup

    text = render(figure, "svg").decode()
    picture = text[text.index("<svg") + len("<svg") :]
    return Markup('<svg role="img" aria-label="{}"').format(figure.title) + Markup(picture)
