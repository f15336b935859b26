"""The configuration of Sphinx: ``sphinx-build -W docs site``."""

from __future__ import annotations

import inspect
import re
from typing import Any

from sphinx.domains.python import PyObject
from sphinx.pycode import ModuleAnalyzer

import mlfleet
from mlfleet._engine.options import OPTIONS

project = "mlfleet"
author = "The mlfleet developers"
copyright = author  # noqa: A001 - Sphinx's name
release = version = mlfleet.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["images"]
html_theme = "furo"
html_title = f"mlfleet {release}"
html_static_path: list[str] = []

# Links between pages are checked, down to their headings.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

# `text` in a docstring is code, as in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# The signatures have the types, by the names that are public.
napoleon_attr_annotations = False

_MADE_BY_MLFLEET = {
    "BlockingRun",
    "EnvironmentFileKind",
    "FleetRun",
    "Presence",
    "RunStatus",
    "Stage",
    "SubmittedRun",
    "Subscription",
    "Sweep",
    "TrackedRun",
}
"""Classes whose constructors are not for callers."""


def describe_options(_app: Any, _what: str, name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Describe the keys of `RunOptions` by the texts of the command line, those of `SweepOptions` by `Fleet.sweep`."""
    if name == "mlfleet.SweepOptions":
        text = (inspect.getdoc(mlfleet.Fleet.sweep) or "").partition("Args:\n")[2].partition("\n\n")[0]
        arguments = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE))
        keys = mlfleet.SweepOptions.__annotations__.keys() - mlfleet.RunOptions.__annotations__.keys()
        lines += ["", "The keys of `RunOptions`, and these:", ""]
        lines += [f":ivar {key}: {' '.join(arguments[key].split())}" for key in arguments if key in keys]
    if name == "mlfleet.RunOptions":
        texts = {option.name.partition(".")[0]: option.in_python or option.text for option in reversed(OPTIONS)}
        keys = mlfleet.RunOptions.__annotations__
        lines += ["", *(f":ivar {key}: {texts[key]}" for key in keys)]


def describe_alias(_app: Any, what: str, name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Describe an alias of a type by the text below it, where autodoc takes that of the type itself."""
    if what == "data":
        for module in (
            "mlfleet._engine.options",
            "mlfleet._sweeps.settings",
            "mlfleet.spaces",
            "mlfleet.backends.base",
        ):
            texts = ModuleAnalyzer.for_module(module).find_attr_docs()
            lines[:] = texts.get(("", name.rpartition(".")[2]), lines)


def tidy_signature(
    _app: Any, _what: str, name: str, _obj: Any, _options: Any, signature: str | None, returned: str | None
) -> tuple[str, str | None] | None:
    """Return a signature without private arguments and modules; none for classes whose instances mlfleet makes."""
    if name.rpartition(".")[2] in _MADE_BY_MLFLEET:
        return "", None
    return (re.sub(r", _\w+: .+ = None|~(\w+\.)+", "", signature), returned) if signature else None


def mark_options(_app: Any, _context: Any, lines: list[str]) -> None:
    """Write the options in the texts of ``--help`` as code, whose two hyphens stay."""
    lines[:] = [
        each if each.startswith("..") else re.sub(r"(?<![\w`-])--[a-z][\w-]*", r"``\g<0>``", each) for each in lines
    ]


def setup(app: Any) -> None:
    """Connect what this page adds to Sphinx."""
    app.connect("autodoc-process-docstring", describe_options)
    app.connect("autodoc-process-docstring", describe_alias)
    app.connect("autodoc-process-signature", tidy_signature)
    for part in ("description", "options"):
        app.connect(f"sphinx-click-process-{part}", mark_options)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Fields"
