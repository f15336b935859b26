"""Builds a conda environment with py-rattler: ``python -P rattler.py request.json``.

`CondaManager` runs this program in a process of its own, so that py-rattler's threads end with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]

# Without channels, conda asks those that it is configured for; py-rattler has no such configuration.
_DEFAULT_CHANNELS = ("conda-forge",)
_ANACONDA = ("https://repo.anaconda.com/pkgs/main", "https://repo.anaconda.com/pkgs/r")


def main(argv: Sequence[str] | None = None) -> int:
    """Build what the request file asks for. Return the exit code: 1 if it fails, with the reason on stderr."""
    (path,) = sys.argv[1:] if argv is None else argv
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        asyncio.run(_build(request))
    except Exception as error:  # its errors have no common base
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201 - this is a program
        return 1
    return 0


async def _build(request: dict[str, Any]) -> None:
    import rattler

    cache = Path(request["cache"])
    records = await rattler.solve(
        sources=_channels(request["channels"]),
        # As strings they would be parsed strictly, which refuses what `conda env export` writes: "name=1.0=build".
        specs=[rattler.MatchSpec(spec, strict=False) for spec in request["specs"]],
        gateway=rattler.Gateway(cache_dir=cache / "repodata"),
        virtual_packages=rattler.VirtualPackage.detect(),
    )
    print(f"{len(records)} packages", flush=True)  # noqa: T201
    for record in records:
        print(f"  {record.name.normalized} {record.version}", flush=True)  # noqa: T201
    await rattler.install(
        records=records,
        target_prefix=request["prefix"],
        cache_dir=cache / "pkgs",
        execute_link_scripts=True,
        show_progress=False,
    )


def _channels(names: Sequence[str]) -> list[str]:
    channels: list[str] = []
    for name in names or _DEFAULT_CHANNELS:
        if name == "defaults":
            channels += _ANACONDA
        elif name != "nodefaults":
            channels.append(name)
    return channels


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Its threads may still be at work when Python tears itself down, which then aborts the process after all was done.
    os._exit(code)
