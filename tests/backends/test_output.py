"""The output of handles that know nothing of places in it, as backends of other packages return them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from mlfleet.backends._output import read_lines
from mlfleet.runs import Outcome, RunStatus

LINES = ["one", "zwölf", "", "three"]


class OldRun:
    """A handle whose `logs` has the one argument that it had in the first version."""

    run_id = "1" * 32

    async def started(self) -> None:
        return

    async def wait(self) -> bool:
        return True

    async def outcome(self) -> Outcome:
        return Outcome(RunStatus.FINISHED, 0)

    async def get_status(self) -> RunStatus:
        return RunStatus.FINISHED

    async def cancel(self, *, grace: float | None = None) -> None:
        return

    async def logs(self, *, follow: bool = True) -> AsyncIterator[str]:
        for line in LINES:
            yield line


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize(
    ("tail", "start", "expected"),
    [
        (None, 0, LINES),
        (2, 0, LINES[2:]),
        (9, 0, LINES),
        (10**30, 0, LINES),
        (0, 0, []),
        (None, 4, LINES[1:]),
        (None, 8, ["lf", "", "three"]),
        (3, 11, LINES[2:]),
        (None, 1000, []),
    ],
)
async def test_its_output_is_counted_and_skipped(
    follow: bool, tail: int | None, start: int, expected: list[str]
) -> None:
    lines = [line async for line in read_lines(OldRun(), follow=follow, tail=tail, start=start)]
    assert lines == expected
    assert [line.end for line in lines][-1:] == [18][: len(lines)]
