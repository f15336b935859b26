"""mlfleet as a backend of mlflow: ``mlflow run -b mlfleet --backend-config '{"backend": "docker"}'``.

mlflow finds it by the entry-point group ``mlflow.project_backend``, and does not require a base class.
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
    """A project backend of mlflow that passes its arguments on to `mlfleet.run`."""

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
        """Submit a run, and return its handle as soon as its MLflow run exists.

        Args:
            project_uri: The URI of the project.
            entry_point: The name of the entry point.
            params: The parameters of the entry point.
            version: The commit, branch or tag of a Git project.
            backend_config: The name of mlfleet's backend under the key ``backend`` (default: ``local``), environment
                variables for the command under ``env`` and ``inherit_env``, the settings of that backend, and the keys
                that mlflow adds.
            tracking_uri: The URI of the tracking server or store.
            experiment_id: The id of the experiment.

        Raises:
            mlflow.exceptions.ExecutionException: The run was not made. mlflow's command line shows the message.
        """
        config = dict(backend_config)
        config.pop("SYNCHRONOUS", None)  # mlflow itself decides whether to wait for the handle
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
                env=config.pop("env", None),
                inherit_env=config.pop("inherit_env", None),
                backend_config=config,
                synchronous=False,
                tracking_uri=tracking_uri,
                output="inherit",
            )
        except MlfleetError as error:
            # The caller has imported mlflow; mlfleet itself works without it.
            failure: type[Exception] = importlib.import_module("mlflow.exceptions").ExecutionException
            raise failure(str(error)) from error
