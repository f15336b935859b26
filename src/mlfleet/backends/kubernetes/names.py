"""Names that derive from the run, so that a later process finds the objects of the run. Pure."""

from __future__ import annotations

import hashlib
import re

__all__ = ["LABEL", "NAME", "container_name", "job_name", "label_value"]

NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
"""A DNS-1123 label, the form of the names of containers and volumes."""

_LONGEST_SLUG = 24
_RUN_ID = re.compile(r"[a-z0-9]{1,32}")
LABEL = re.compile(r"[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?", re.A)
"""The value of a label, unless it is empty."""


def _slug(text: str, longest: int = _LONGEST_SLUG) -> str:
    """Return `text` as a DNS-1123 label that begins with a letter; ``run`` if no character is left."""
    made = re.sub(r"[^a-z0-9]+", "-", text.lower()).lstrip("-0123456789")[:longest].strip("-")
    return made or "run"


def job_name(project: str, run_id: str) -> str:
    """Return ``<project>-<run id>``, at most 57 characters: the names of pods are longer, and limited to 63."""
    return f"{_slug(project)}-{_short_id(run_id)}"


def container_name(given: str, project: str) -> str:
    """Return the template's name of the container, unless it is a placeholder as in the reference's example."""
    return given if NAME.fullmatch(given) else _slug(project, 63)


def label_value(text: str) -> str:
    """Return `text` if a label may hold it, else its hash."""
    return text if LABEL.fullmatch(text) else hashlib.sha256(text.encode()).hexdigest()[:32]


def _short_id(run_id: str) -> str:
    # MLflow's ids are 32 hexadecimal digits; another tracking server may have others.
    return run_id if _RUN_ID.fullmatch(run_id) else hashlib.sha256(run_id.encode()).hexdigest()[:32]
