"""What the documents say is true: snippets run, commands parse, files and scores exist."""

import pkgutil
import re
import runpy
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from mam.cli.arguments import known_flags
from mam.cli.main import COMMANDS, read_options
from mam.config import Config
from mam.presets import PRESETS
from named_tests import check_named_tests
from report_runs import CONFIG as RUN
from report_runs import write_run
from small_run import CONFIG

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "native/README.md")
]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
COMMAND_TEXTS = [*DOCUMENTS, ROOT / "src/mam/presets.py"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def relative(path):
    return str(path.relative_to(ROOT))


def prose(path):
    """The text without its code in Python."""
    return FENCED.sub(
        lambda block: "" if block[1] == "python" else block[0], path.read_text(encoding="utf-8")
    )


SNIPPETS = [
    pytest.param(code, id=f"{relative(path)}-{number}")
    for path in DOCUMENTS
    for number, (language, code) in enumerate(FENCED.findall(path.read_text(encoding="utf-8")))
    if language == "python" and path.parent.name != "tutorials"  # tests/test_tutorials.py
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_run(code, tmp_path, monkeypatch):
    """To the letter, but that the probe's preset is a smaller run: compiling is what takes time."""
    monkeypatch.setitem(
        PRESETS, "probe", lambda: replace(CONFIG, env="probe/identity", policy="ippo")
    )
    monkeypatch.chdir(tmp_path)
    for policy in ("mam", "mat"):
        write_run(tmp_path / "runs" / policy, replace(RUN, policy=policy))
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


def commands(text):
    """Every `mam …` of a text, on lines of its own or within backticks, as arguments."""
    lines = re.findall(r"^ {4}.*$", text, re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    for line in (*lines, *spans):
        for part in re.split(r"[;&|]|\bthen\b|\belse\b", line.partition(" #")[0]):
            found = re.match(
                r"(?:XLA_FLAGS=\S+ )?(?:\.venv/bin/)?mam((?: .*)?)$",
                part.strip().replace("\\|", "|"),
            )
            if found and re.match(r" [-a-z]+(?: |$)", found[1]):
                yield [word for word in shlex.split(found[1]) if "…" not in word]


WRITTEN = sorted(
    {(relative(path), " ".join(args)) for path in COMMAND_TEXTS for args in commands(prose(path))}
)


@pytest.mark.parametrize(("path", "line"), WRITTEN)
def test_commands_can_be_given(path, line, tmp_path, monkeypatch):
    """The parser takes it, where runs and environments have the names of the documents."""
    name, *args = line.replace("NAME", "probe/identity").split()
    if name in ("COMMAND", "--version", "--help"):
        return
    assert name in COMMANDS
    if not args:  # the command itself is meant
        return
    monkeypatch.chdir(tmp_path)
    for flag, value in pairwise(args):
        if flag in ("--resume", "--config"):
            write_run(tmp_path / value, Config())
    if name == "distill":
        write_run(tmp_path / args[0], Config())
    if "--help" in args:
        with pytest.raises(SystemExit) as stop:
            read_options(name, args)
        assert stop.value.code == 0
    else:
        read_options(name, args)


def test_there_are_commands_to_check():
    assert len(WRITTEN) > 50
    assert {line.split()[0] for _, line in WRITTEN} >= COMMANDS.keys()


OTHERS = re.compile(r"#SBATCH.*|--xla_\w+")  # options that are not of `mam`


@pytest.mark.parametrize("path", [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")], ids=relative)
def test_options_exist(path):
    known = {flag for kind, _ in COMMANDS.values() for flag in known_flags(kind)} | {
        "--help",
        "--version",
    }
    for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", OTHERS.sub("", prose(path))):
        assert flag in known or any(name.startswith(f"{flag}.") for name in known), flag


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", path.read_text(encoding="utf-8")):
        assert target.startswith("http") or (path.parent / target).exists(), target


SOURCES = [
    path for path in sorted((ROOT / "src/mam").rglob("*.py")) if path.parent.name != "dashboard"
]  # JavaScript


@pytest.mark.parametrize("path", [*DOCUMENTS, *SOURCES], ids=relative)
def test_dotted_names_lead_somewhere(path):
    """Also those in docstrings."""
    for name in re.findall(
        r"(?<![\w./-])mam(?:\.[A-Za-z_]\w*)+(?![\w/:(]*:)", path.read_text(encoding="utf-8")
    ):
        if name not in ("mam.sinks", "mam.mixers"):  # groups of entry points
            pkgutil.resolve_name(name)


def rooms(text):
    """The list of files in ARCHITECTURE.md: room → names."""
    block = text.partition("## The rooms")[2].partition("\n## ")[0]
    found, room = {}, ""
    for line in re.findall(r"^ {4}.*$", block, re.MULTILINE):
        if head := re.match(r" {4}(mam/[\w/]*)", line):
            room = head[1]
            found[room] = ""
        elif room and line.startswith(" " * 8):
            found[room] += line
    names = {room: re.sub(r"\([^)]*\)", "", entries) for room, entries in found.items()}
    return {
        room: sorted(filter(None, re.split(r"[\s,·]+", entries))) for room, entries in names.items()
    }


def test_every_file_is_in_the_list_of_rooms():
    tree = {}
    for path in (ROOT / "src/mam").rglob("*.py"):
        names = tree.setdefault(f"{path.parent.relative_to(ROOT / 'src')}/", [])
        names += [path.stem] * (path.stem != "__init__")
    assert rooms((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")) == {
        room: sorted(tree[room]) for room in tree
    }


def test_every_invariant_names_tests_that_exist():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.partition("## What always holds")[2].partition("\n## ")[0]
    _, *invariants = re.split(r"^\d+\. ", section, flags=re.MULTILINE)
    assert len(invariants) > 8
    assert all(check_named_tests(invariant) for invariant in invariants)
    check_named_tests(text)


@pytest.mark.parametrize("make", PRESETS.values(), ids=PRESETS)
def test_scores_of_presets_were_measured(make):
    """Whatever looks like a score stands in the file of results that the same docstring names."""
    scores = re.findall(r"\b\d+\.\d{2,}", make.__doc__)
    named = re.findall(r"results/[\w/.]+\w", make.__doc__)
    measured = "".join((ROOT / name).read_text(encoding="utf-8") for name in named)
    for score in scores:
        assert re.search(rf"(?<![\d.]){re.escape(score)}(?!\d)", measured), (
            f"{score} is not in {named}"
        )


def test_estimates_of_the_readme_were_measured():
    """Each with its interval stands in a file of results that the README names."""
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    quoted = re.findall(r"\d\.\d+ \[\d\.\d+, \d\.\d+\]", text)
    named = set(re.findall(r"results/[\w/]+\.md", text))
    measured = "".join((ROOT / name).read_text(encoding="utf-8") for name in named)
    assert len(quoted) > 12
    assert not [estimate for estimate in quoted if estimate not in measured]


SCRIPTS = [
    path
    for room in ("benchmarks", "soak", "scripts")
    for path in sorted((ROOT / room).glob("*.py"))
    if not path.stem.startswith("make_golden")  # in an environment of their own, with PyTorch
]


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_scripts_find_what_they_need(path):
    """Nothing that a script imports or refers to at its top was renamed."""
    runpy.run_path(str(path))
