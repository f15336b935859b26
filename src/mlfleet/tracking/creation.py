"""Creates a run exactly once on a server that knows no idempotency, also when an answer is lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import anyio

from mlfleet.errors import TrackingError
from mlfleet.runs import RunStatus
from mlfleet.tracking.base import RunInfo
from mlfleet.tracking.models import SUBMISSION_TAG, run_info
from mlfleet.tracking.retry import Transient
from mlfleet.tracking.transport import Transport

__all__ = ["Creation", "search_runs"]

log = logging.getLogger("mlfleet.tracking")

_CANCEL_SECONDS = 5.0
_PAGE = 1000


class Creation:
    """The creation of one run.

    Args:
        transport: to the server.
        experiment_id: of its experiment.
        content: of ``runs/create``, with the submission among its tags.
        submission: the value of `SUBMISSION_TAG`.
    """

    def __init__(self, transport: Transport, experiment_id: str, content: bytes | None, submission: str) -> None:
        self._transport = transport
        self._experiment_id = experiment_id
        self._content = content
        self._submission = submission
        self._sent = False

    async def run(self) -> RunInfo:
        """Create it. If the caller is cancelled, what was made is marked KILLED.

        Raises:
            TrackingError: it was refused, or is unclear after all.
        """
        try:
            return await self._create()
        except anyio.get_cancelled_exc_class():
            if self._sent:
                with anyio.move_on_after(_CANCEL_SECONDS, shield=True):
                    await self._kill_unwanted()
            raise

    async def _create(self) -> RunInfo:
        """Ask; whenever it is unclear whether the server did it, look before asking again.

        what happened         the run is made?  next
        ────────────────────  ────────────────  ──────────────────────────────
        no connection, 429    no                ask again
        lost answer, 408, 5xx perhaps           look; if it is not there, ask again
        any other answer      no                that is the error
        """
        begin, patience = time.monotonic(), None
        unclear = False
        while True:
            try:
                run = await self._attempt()
            except Transient as failure:
                patience = patience or self._transport.patience(begin=begin)
                unclear = unclear or failure.executed
                goes_on = await patience.wait(failure)
                if unclear and (made := await self._made()):
                    return made[0]
                if not goes_on:
                    raise patience.verdict(failure) from failure.error.__cause__
            else:
                if unclear:
                    await self._delete_twins(run)
                return run

    async def _attempt(self) -> RunInfo:
        async with self._transport.connections as line:
            self._sent = True
            # A server goes on with a request whose client is gone: the answer tells when it is done.
            answer = await self._transport.exchange(line, "POST", "runs/create", self._content, linger=_CANCEL_SECONDS)
            return run_info(answer.get("run", {}))

    async def _made(self) -> list[RunInfo]:
        wanted = f"tags.`{SUBMISSION_TAG}` = '{self._submission}'"
        return await search_runs(self._transport, [self._experiment_id], wanted)

    async def _delete_twins(self, run: RunInfo) -> None:
        """An earlier request that was thought lost may have been done after we looked."""
        for twin in await self._made():
            if twin.run_id != run.run_id:
                log.warning("the run %s was created twice: %s is deleted", run.run_id, twin.run_id)
                await self._transport.call("POST", "runs/delete", body={"run_id": twin.run_id})

    async def _kill_unwanted(self) -> None:
        try:
            for run in await self._made():
                body = {"run_id": run.run_id, "status": RunStatus.KILLED.value}
                await self._transport.call("POST", "runs/update", body=body)
        except TrackingError as error:
            log.warning(
                "a run whose creation was cancelled may be left RUNNING in experiment %s with the tag %s=%s: %s",
                self._experiment_id,
                SUBMISSION_TAG,
                self._submission,
                error,
            )


async def search_runs(
    transport: Transport, experiment_ids: Sequence[str], filter_string: str, *, max_results: int = _PAGE
) -> list[RunInfo]:
    """The runs that match, page by page."""
    found: list[RunInfo] = []
    body: dict[str, Any] = {"experiment_ids": list(experiment_ids), "filter": filter_string}
    while len(found) < max_results:
        body["max_results"] = min(_PAGE, max_results - len(found))
        answer = await transport.call("POST", "runs/search", body=body)
        found += [run_info(raw) for raw in answer.get("runs") or ()]
        if not answer.get("next_page_token"):
            break
        body["page_token"] = answer["next_page_token"]
    return found[:max_results]
