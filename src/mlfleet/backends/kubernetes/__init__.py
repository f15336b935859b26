"""Runs as Jobs of a Kubernetes cluster."""

from mlfleet.backends.kubernetes.backend import KubernetesBackend

__all__ = ["KubernetesBackend"]
