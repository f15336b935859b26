"""The backends that run jobs, and the contract for writing others."""

from mlfleet.backends.base import Backend, BackendRun, DockerRequest, Job, ListedRun, ProjectCall

__all__ = ["Backend", "BackendRun", "DockerRequest", "Job", "ListedRun", "ProjectCall"]
