"""The configuration of Sphinx: ``sphinx-build -W docs site``."""

from __future__ import annotations

from typing import Any

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
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def describe_options(_app: Any, _what: str, name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Describe the keys of `RunOptions`, whose texts are those of the command line."""
    if name == "mlfleet.RunOptions":
        texts = {option.name.partition(".")[0]: option.in_python or option.text for option in reversed(OPTIONS)}
        keys = mlfleet.RunOptions.__annotations__
        lines += ["", *(f":ivar {key}: {texts[key]}" for key in keys)]


def setup(app: Any) -> None:
    """Connect what this page adds to Sphinx."""
    app.connect("autodoc-process-docstring", describe_options)
