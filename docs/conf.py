"""Settings of the documentation site: `python -m sphinx -W --keep-going docs build/site` (extra `docs`).

Sphinx with MyST and Furo: all three are kept up (MkDocs 1.x is not, and Material for MkDocs ends in 2027), broken links
are warnings, `-W` makes them errors, and a built site asks no other host for anything.
"""

from __future__ import annotations

import re
from importlib import import_module
from inspect import isclass
from pkgutil import iter_modules
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import visadapt

project = "visadapt"
version = release = visadapt.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["**/.ipynb_checkpoints"]
suppress_warnings = ["toc.no_title"]  # a table of results may be a file without a heading

smartquotes = False  # W' is an equation
html_theme = "furo"
html_title = "visadapt"
html_copy_source = False
html_show_copyright = html_show_sphinx = False

myst_heading_anchors = 3  # links to headings, as GitHub makes them

default_role = "code"  # docstrings write names in single backticks
autoclass_content = "both"  # "class" alone leaves the types of arguments out
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True

_CODE = re.compile(r"(`+[^`]*`+)")


class Reference(SphinxDirective):
    """``reference:: PACKAGE`` with ``:of: BASE``: the public classes of its modules that derive from one class."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {"of": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """What autodoc makes of each class, in the order of the modules' names."""
        home, _, name = self.options["of"].rpartition(".")
        base = getattr(import_module(home), name)
        lines = []
        for path, cls in classes(self.arguments[0]):
            if issubclass(cls, base) and cls is not base:
                lines += [f".. autoclass:: {path}", ""]
        return self.parse_text_to_nodes("\n".join(lines))


def classes(package: str) -> list[tuple[str, type]]:
    """Path and class of each public class that the modules of a package define."""
    found = []
    for entry in iter_modules(import_module(package).__path__):
        module = import_module(f"{package}.{entry.name}")
        for name, value in vars(module).items():
            if isclass(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                found.append((f"{module.__name__}.{name}", value))
    return found


def plain(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with names in backticks: `|B A|`, `*`, `x_` mean themselves there."""
    for i, line in enumerate(lines):
        parts = _CODE.split(line)
        parts[::2] = [re.sub(r"([|*]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
        lines[i] = "".join(parts)


def setup(app: Sphinx) -> None:
    """Register the directive, and `plain` ahead of Napoleon."""
    app.add_directive("reference", Reference)
    app.connect("autodoc-process-docstring", plain, priority=100)
