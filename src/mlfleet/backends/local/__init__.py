"""Runs on this machine."""

from mlfleet.backends.local.backend import LocalBackend

__all__ = ["LocalBackend"]
