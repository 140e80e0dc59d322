"""Names of a stranger's making in the report: every language shows them, none obeys them."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from mam.cli import main as cli
from mam.errors import UserError, printable
from mam.study.report.escape import markdown, tex
from report_runs import CONFIG, write_run

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
SCRIPT = "<script>document.title='owned'</script>"
NAMES = (
    f"\"' onload='document.title=1'>{SCRIPT}",
    "--></style></title></svg><svg onload=\"document.title='owned'\">{{ 7 * 7 }}",
    "[a](javascript:alert(1)) ![b](x) `c` **d** ~~e~~ | $f$ # g",
    r"\input{/etc/passwd} % & # $x$ _ ^ ~ { } | ` \" \write18",
    "[2pt] *",
    r"$_$ $\frac{$ 100 %",
    "=HYPERLINK(A1)",
    "x" * 300,
)


def test_what_cannot_be_printed_is_escaped_and_stays_different():
    assert printable("\x1b[31m a\nb\x00") == r"\x1b[31m a\nb\x00"
    assert printable("ab\u202e\udcff\udcfe") == r"ab\u202e\udcff\udcfe"
    assert printable("lbf/ä–τ 1\N{NO-BREAK SPACE}2") == "lbf/ä–τ 1\N{NO-BREAK SPACE}2"


@pytest.mark.parametrize("name", NAMES)
def test_markdown_and_latex_have_no_letter_left_that_does_anything(name):
    assert not re.search(r"(?<!\\)(\\\\)*[*_`\[\]|~$#]|[<>]|&(?!lt;|gt;|amp;)", markdown(name))
    words = re.sub(
        r"\\(textbackslash|text\w+|ldots)\{\}|\$[<>]\$|\\[&%$#_{}]|^\{[\[*]\}", "", tex(name)
    )
    assert not re.search(r"[\\&%$#_{}~^]|^[\[*]", words)


@pytest.mark.parametrize("name", ["two\nlines", "\x1b]0;title\x07", "right\u202eleft", "\x00"])
@pytest.mark.parametrize("field", ["env", "policy"])
def test_a_configuration_has_printable_names(field, name):
    with pytest.raises(UserError, match=f"{field} must be one line of printable text"):
        replace(CONFIG, **{field: name})


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report on runs with such names wherever a run has a say."""
    root = tmp_path_factory.mktemp("hostile")
    for name in NAMES:
        folder = root / "runs" / name[:60].replace("/", " ")
        write_run(
            folder,
            replace(CONFIG, num_seeds=1, env=name, policy=name),
            device=f"d\x1b{name}",
            updates=4,
        )
    for name in NAMES[:2]:  # only these are finished, on one task: what sums up has names to show
        write_run(
            root / "runs" / f"{NAMES.index(name)}", replace(CONFIG, env=NAMES[0], policy=name)
        )
    (root / "runs" / "0" / "versions.json").write_text(json.dumps({"device": ["<b>", {}]}))
    (root / "runs" / "broken\x1b").mkdir()
    (root / "runs" / "broken\x1b" / "config.json").write_text(json.dumps({SCRIPT: "\x1b"}))
    assert cli.main(["report", str(root / "runs"), "--out", str(root / "out")]) == 0
    return root / "out"


class Elements(HTMLParser):
    """Names of elements, and of their attributes."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.attributes = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_pages_have_the_elements_of_any_report(report):
    page = Elements((report / "report.html").read_text())
    assert not page.elements & {"script", "img", "b", "iframe"}
    assert not {name for name in page.attributes if name.startswith("on")}
    assert "7 * 7" in (report / "report.html").read_text()
    assert "\x1b" not in "".join(
        (report / name).read_text() for name in ("report.html", "report.md", "tables.tex")
    )
    assert not re.search(r"<\w", (report / "report.md").read_text())


def test_tables_keep_their_columns(report):
    text = (report / "tables.tex").read_text()
    for table in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        rows = [line for line in table[1].splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(table[0])}
        assert not any(row.startswith(("[", "*")) for row in rows)
    for row in re.findall(r"^\|.*$", (report / "report.md").read_text(), re.MULTILINE):
        assert row.endswith("|")


def test_every_task_has_a_picture_and_no_field_computes(report):
    assert len(list((report / "figures").glob("curve_*.png"))) == len(NAMES)
    assert "\n'=HYPERLINK(A1)," in (report / "data" / "scores.csv").read_text()


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_no_script_runs(report):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.goto((report / "report.html").as_uri())
        assert page.title() == f"{len(NAMES)} algorithms on {len(NAMES)} tasks"
        assert page.locator("svg[role=img]").count() > len(NAMES)
        browser.close()
    assert said == []
