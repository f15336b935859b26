"""The backend for clusters with Slurm."""

from mlfleet.backends.slurm.backend import SlurmBackend

__all__ = ["SlurmBackend"]
