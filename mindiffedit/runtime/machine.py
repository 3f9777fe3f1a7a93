"""What is known of the machine and of what is installed on it, without importing any of that."""

from __future__ import annotations

import functools
import os
import platform
from importlib import metadata


@functools.cache
def version_of(package: str) -> str | None:
    """The version of a package, as it was installed; None for one that is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """Cores of the processor that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name, as far as the system says it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:  # no Linux
        names = []
    return names[0] if names else platform.processor()
