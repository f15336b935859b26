"""Runs in containers of a Docker engine, for projects with ``docker_env``."""

from mlfleet.backends.docker.backend import DockerBackend

__all__ = ["DockerBackend"]
