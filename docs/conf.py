"""The documentation site: `make site`, by Sphinx with MyST, from the pages beside this file."""

import os
import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

ROOT = Path(__file__).parent.parent

project = "mam"
author = "the authors of mam"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "mam: Multi-Agent Mamba"
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# Whatever is referred to has to be there. Types of other packages are named, not linked: the site
# is built, and read, without a network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(jax|jaxtyping|numpy|np|pandas|matplotlib|collections|typing|pathlib|equinox)\b.*"),
    ("py:.*", r"(Array|Key|Float|Int|Bool|Shaped|PyTree|DataFrame|Figure|Path|T|optional)\b.*"),
    ("py:.*", r"(\W|\d|N|O|A|G|B).*"),  # axes
    ("py:class", r"mam\.(?!types\.|config\.).*"),  # rooms without a page of their own
]

default_role = "code"  # docstrings have single backticks
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"
autodoc_class_signature = "separated"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
suppress_warnings = ["myst.header"]  # README begins with its own title


COLON = "\N{RATIO}"  # looks like one, and Napoleon takes nothing before it for a type


def _without_markup(app, what, name, obj, options, lines):
    """Take what is markup to Sphinx, and plain text in our docstrings, for itself."""
    returns = False
    for number, line in enumerate(lines):
        if "::" in line or line.startswith("        "):
            continue
        parts = re.split(r"(`+[^`]*`+)", line)  # code stays as it is
        parts[::2] = [re.sub(r"([*|](?=\S)|(?<=\w)_(?=\W|$))", r"\\\1", x) for x in parts[::2]]
        if returns or what in ("attribute", "property", "data"):
            parts[::2] = [text.replace(":", COLON) for text in parts[::2]]
        lines[number] = "".join(parts)
        returns = line.strip() in ("Returns:", "Yields:")


PAGES = {"ARCHITECTURE": "architecture", "CONTRIBUTING": "contributing", "CHANGELOG": "changelog"}
COPIED = "_repository"  # files that pages link to and that are no pages


def _link_the_repository(app, doctree):
    """Let links to other files of the repository lead to their pages, or to copies of them."""
    here = Path(app.env.docname).parent
    for node in list(doctree.findall(addnodes.pending_xref)):
        if node.get("reftype") != "myst":
            continue
        target = node["reftarget"]
        path = Path(target) if target.startswith("/") else ROOT / target
        path = path if path.is_file() else path.with_name(f"{path.name}.md")
        if not path.is_file() or ROOT / "docs" in path.parents:
            continue
        name = path.relative_to(ROOT)
        if name.stem in PAGES and name.parent == Path("."):
            uri = app.builder.get_relative_uri(app.env.docname, PAGES[name.stem])
        else:
            app.env.mam_copied = {*getattr(app.env, "mam_copied", ()), str(name)}
            uri = os.path.relpath(Path(COPIED) / name, here)
        link = nodes.reference("", "", internal=True, refuri=uri)
        link += node.children
        node.replace_self(link)


def _copy_the_repository(app, error):
    for name in getattr(app.env, "mam_copied", ()):
        place = Path(app.outdir) / COPIED / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, place)


def setup(app):
    app.connect("autodoc-process-docstring", _without_markup, priority=400)
    app.connect("doctree-read", _link_the_repository)
    app.connect("build-finished", _copy_the_repository)
