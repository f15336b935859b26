"""Reads the YAML and JSON files that people write, and says where a mistake in them is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["Node", "read_json", "read_yaml"]


class Node:
    """A value in a YAML document that knows its place. (To be filled in by project/spec's author.)"""


def read_yaml(path: Path) -> Any:
    """The plain data of a YAML file (safe types only). Raises SpecError with line and column."""
    raise NotImplementedError


def read_json(path: Path) -> Any:
    """The data of a JSON file. Raises SpecError with line and column."""
    raise NotImplementedError
