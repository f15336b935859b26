"""mlfleet as a backend of mlflow: ``mlflow run -b mlfleet --backend-config '{"backend": "docker"}'``.

mlflow finds it by the entry-point group ``mlflow.project_backend``, and asks for no base class.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from mlfleet.errors import MlfleetError
from mlfleet.sync import BlockingRun, run

__all__ = ["MlfleetBackend"]

_RUN_ID = "_mlflow_local_backend_run_id"


class MlfleetBackend:
    """Takes what ``mlflow.projects.run`` hands to a plugin, and passes it on to `mlfleet.run`."""

    def run(
        self,
        project_uri: str,
        entry_point: str,
        params: Mapping[str, Any] | None,
        version: str | None,
        backend_config: Mapping[str, Any],
        tracking_uri: str,
        experiment_id: str,
    ) -> BlockingRun:
        """Submit the run, and return its handle as soon as its MLflow run exists.

        Args:
            project_uri: of the project.
            entry_point: its name.
            params: of the entry point.
            version: of a Git project.
            backend_config: ``backend`` names the backend of mlfleet, by default ``local``; the rest is that backend's
                own, but for the keys of mlflow itself.
            tracking_uri: of the tracking server or store.
            experiment_id: of the experiment.

        Raises:
            mlflow.exceptions.ExecutionException: no run was made; what mlflow's command line knows how to tell.
        """
        config = dict(backend_config)
        config.pop("SYNCHRONOUS", None)  # mlflow waits for the handle, or does not
        try:
            return run(
                project_uri,
                entry_point,
                version,
                params,
                config.pop("DOCKER_ARGS", None),
                experiment_id=experiment_id,
                env_manager=config.pop("ENV_MANAGER", None),
                storage_dir=config.pop("STORAGE_DIR", None),
                build_image=bool(config.pop("build_image", False)),
                docker_auth=config.pop("docker_auth", None),
                run_id=config.pop(_RUN_ID, None),
                backend=config.pop("backend", "local"),
                backend_config=config,
                synchronous=False,
                tracking_uri=tracking_uri,
                output="inherit",
            )
        except MlfleetError as error:
            # Whoever calls us has imported it; mlfleet itself needs no mlflow.
            failure: type[Exception] = importlib.import_module("mlflow.exceptions").ExecutionException
            raise failure(str(error)) from error
