"""A backend that runs projects as one-time runs of a Databricks workspace."""

from mlfleet.backends.databricks.backend import DatabricksBackend

__all__ = ["DatabricksBackend"]
