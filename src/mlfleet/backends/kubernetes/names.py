"""Names that derive from the run, so that whoever comes later finds what was made for it. Pure."""

from __future__ import annotations

import hashlib
import re

__all__ = ["NAME", "container_name", "job_name", "label_value", "slug"]

NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
"""A DNS-1123 label: what containers and volumes may be called."""

_LONGEST_SLUG = 24
_RUN_ID = re.compile(r"[a-z0-9]{1,32}")
_LABEL = re.compile(r"[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?", re.A)


def slug(text: str, longest: int = _LONGEST_SLUG) -> str:
    """`text` as a DNS-1123 label that begins with a letter; ``run`` if nothing of it is left."""
    made = re.sub(r"[^a-z0-9]+", "-", text.lower()).lstrip("-0123456789")[:longest].strip("-")
    return made or "run"


def job_name(project: str, run_id: str) -> str:
    """``<project>-<run id>``, at most 57 characters: pods and the names that Kubernetes derives need some, too."""
    return f"{slug(project)}-{_short_id(run_id)}"


def container_name(given: str, project: str) -> str:
    """The template's name of the container, unless it is only a placeholder as in the reference's example."""
    return given if NAME.fullmatch(given) else slug(project, 63)


def label_value(text: str) -> str:
    """`text` if a label may hold it, else its hash."""
    return text if _LABEL.fullmatch(text) else hashlib.sha256(text.encode()).hexdigest()[:32]


def _short_id(run_id: str) -> str:
    # MLflow's ids are 32 hexadecimal digits; another tracking server may have others.
    return run_id if _RUN_ID.fullmatch(run_id) else hashlib.sha256(run_id.encode()).hexdigest()[:32]
