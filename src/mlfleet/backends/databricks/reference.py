"""The facts in the reference to a run. It is a tag of the MLflow run, which others may have written."""

from __future__ import annotations

from mlfleet.backends.databricks.config import Upload, UploadKind
from mlfleet.backends.databricks.secret_scopes import secret_key
from mlfleet.errors import SpecError
from mlfleet.runs import JobRef

__all__ = ["NUMBER_TAG", "output_folder", "secret_of", "submitted_at", "upload_of"]

NUMBER_TAG = "mlflow.databricks.shellJobRunID"
"""The tag of the MLflow run with the run's id in Databricks."""


def upload_of(ref: JobRef) -> Upload:
    """Return the place of the output.

    Raises:
        SpecError: It is not such a place.
    """
    kind, attempt = str(ref.data.get("upload") or "workspace"), str(ref.data.get("attempt"))
    if kind not in {each.value for each in UploadKind} or not attempt.isalnum():
        raise SpecError(
            f"the tag {JobRef.TAG} of the run {ref.run_id} is damaged: upload {kind!r}, attempt {attempt!r}"
        )
    return Upload(UploadKind(kind), str(ref.data.get("path") or ""))


def output_folder(ref: JobRef) -> str:
    """Return the folder of the output, below the root of the storage."""
    return f"output/{ref.run_id}-{ref.data.get('attempt')}"


def secret_of(ref: JobRef) -> tuple[str, str] | None:
    """Return the scope and the key of the run's secret variables; None if it has none."""
    scope = ref.data.get("secret_scope")
    return (str(scope), secret_key(ref.run_id)) if scope else None


def submitted_at(ref: JobRef) -> int:
    """Return the time of the submission in milliseconds since the epoch; 0 for references of earlier versions."""
    since = ref.data.get("since")
    return since if isinstance(since, int) else 0
