"""The resources that a run needs, and those that this machine has."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mlfleet.errors import UsageError

__all__ = ["Machine", "Resources", "memory_text", "this_machine"]

_UNITS = {
    "": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15,
    "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40, "PI": 2**50,
}  # fmt: skip
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kKMGTP]i?)?[bB]?\s*")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """The resources of one run.

    On this machine a run waits until they are free, and sees only its own GPUs (``CUDA_VISIBLE_DEVICES``); it is not
    kept from using more CPU or memory. In containers they are limits.

    Attributes:
        cpus: The number of CPUs; fractions are allowed.
        gpus: The number of whole GPUs.
        memory: The memory in bytes, or with a unit as Kubernetes writes it: ``"512Mi"``, ``"4Gi"``, ``"4G"``. None if
            memory is not counted.
    """

    cpus: float = 1.0
    gpus: int = 0
    memory: int | str | None = None

    def __post_init__(self) -> None:
        if type(self.cpus) not in (int, float) or not 0 <= self.cpus < math.inf:
            raise UsageError(f"Resources: cpus is {self.cpus!r}: give a number that is not negative")
        if type(self.gpus) is not int or self.gpus < 0:
            raise UsageError(f"Resources: gpus is {self.gpus!r}: give a whole number that is not negative")
        _parse(self.memory)

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes; None if it is not counted."""
        return _parse(self.memory)

    def __str__(self) -> str:
        parts = [f"cpus={self.cpus:g}"]
        parts += [f"gpus={self.gpus}"] if self.gpus else []
        parts += [f"memory={self.memory}"] if self.memory is not None else []
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The resources of a machine.

    Attributes:
        cpus: The number of CPUs.
        gpus: The names of the GPUs, as ``CUDA_VISIBLE_DEVICES`` takes them.
        memory: The memory in bytes; None if it is unknown, and then not counted.
    """

    cpus: float
    gpus: tuple[str, ...] = ()
    memory: int | None = None

    def lacks(self, needed: Resources) -> str | None:
        """Return why a run could never start on this machine; None if it could."""
        wanted = needed.memory_bytes
        if needed.cpus > self.cpus:
            return f"{needed.cpus:g} CPUs are requested and the machine has {self.cpus:g}"
        if needed.gpus > len(self.gpus):
            return f"{needed.gpus} GPUs are requested and the machine has {len(self.gpus)}"
        if wanted is not None and self.memory is not None and wanted > self.memory:
            return f"{needed.memory} of memory are requested and the machine has {self.memory / 2**30:.1f}Gi"
        return None

    def fits(self, needed: Resources) -> int:
        """Return how many such runs fit at the same time; at least 1."""
        counts = [self.cpus / needed.cpus] if needed.cpus else []
        counts += [len(self.gpus) / needed.gpus] if needed.gpus else []
        if needed.memory_bytes and self.memory is not None:
            counts.append(self.memory / needed.memory_bytes)
        # 0.3 is not exactly three times 0.1.
        return max(1, int(min(counts) + 1e-9)) if counts else 2**31


def this_machine(given: Resources | None = None) -> Machine:
    """Return the resources that this process may use, within the limits of its container. Blocking, but quick.

    Args:
        given: The resources to use instead of those found; of the GPUs the first ones.

    Raises:
        UsageError: `given` has more GPUs than there are.
    """
    gpus = _gpus()
    if given is None:
        return Machine(cpus=_cpus(), gpus=gpus, memory=_memory())
    if given.gpus > len(gpus) and gpus:
        raise UsageError(
            f"resources: the Fleet is given {given.gpus} GPUs, and there are {len(gpus)}: {', '.join(gpus)}"
        )
    named = gpus or tuple(str(number) for number in range(given.gpus))
    memory = given.memory_bytes
    return Machine(cpus=given.cpus, gpus=named[: given.gpus], memory=_memory() if memory is None else memory)


def _cpus() -> float:
    import psutil

    # A process's affinity is known on Linux only: https://psutil.readthedocs.io/en/latest/#psutil.Process.cpu_affinity.
    count = len(psutil.Process().cpu_affinity() or ()) if hasattr(psutil.Process, "cpu_affinity") else 0
    count = count or psutil.cpu_count() or 1
    # psutil does not know control groups: https://docs.kernel.org/admin-guide/cgroup-v2.html, ``cpu.max``.
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(_CGROUP / "cpu/cpu.cfs_quota_us"), _read(_CGROUP / "cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        # At least 1, so that a run can start in a container with less than one CPU.
        return max(1.0, min(float(count), int(quota) / int(period)))
    return float(count)


def _memory() -> int:
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = _read(_CGROUP / "memory.max") or _read(_CGROUP / "memory/memory.limit_in_bytes")
    return min(total, int(limit)) if limit.isdigit() else total


def _gpus() -> tuple[str, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        # CUDA ignores everything from the first invalid name on; -1 is the customary way to hide all GPUs.
        end = next((at for at, name in enumerate(names) if not name or name == "-1"), len(names))
        return tuple(names[:end])
    # CUDA numbers the devices that it can open from 0, whatever the numbers of their files are.
    return tuple(str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*")))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def memory_text(size: int) -> str:
    """Return a size of memory in bytes with the largest unit that has no fraction, as people ask for it: ``512Mi``."""
    for base, units in ((1024, ("Ti", "Gi", "Mi", "Ki")), (1000, ("T", "G", "M", "k"))):
        for power, unit in zip((4, 3, 2, 1), units, strict=True):
            if size and size % base**power == 0:
                return f"{size // base**power}{unit}"
    return str(size)


def _parse(memory: int | str | None) -> int | None:
    if memory is None:
        return None
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    match = _QUANTITY.fullmatch(memory) if isinstance(memory, str) else None
    number = 0.0 if match is None else float(match[1]) * _UNITS[(match[2] or "").upper()]
    if not 1 <= number < math.inf:
        raise UsageError(f"Resources: memory is {memory!r}: give bytes, or a text like '512Mi' or '4Gi'")
    return int(number)
