"""Runs projects as one-time jobs of a Databricks workspace."""

from mlfleet.backends.databricks.backend import DatabricksBackend

__all__ = ["DatabricksBackend"]
