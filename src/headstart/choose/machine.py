"""How fast this machine computes, and how sizes and durations are written."""

from __future__ import annotations

import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from headstart.errors import BadOption

UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}

# What a fine-tuning step reaches of a GPU's published peak, which is assumed, and of a CPU's own products, which is
# measured: 0.65 to 0.72 on a Llama of width 1024, 0.56 to 0.66 on SmolLM2, 0.42 to 0.45 on MiniLM (docs/benchmarks.md).
SHARE_OF_PEAK = 0.35
SHARE_OF_PRODUCTS = 0.6

# A CPU that emulates bfloat16 computes headstart's layers through float32 copies: 12.1 s instead of 7.6 a step. One
# with units for it is assumed to have twice its float32 rate.
EMULATED, NATIVE = 1 / 1.6, 2.0


@dataclass(frozen=True)
class Speed:
    """Operations a second that a training step can count on, and how sure that is.

    Attributes:
        flops: a second.
        factor: times and divided by which the truth lies most of the time.
        reason: where it comes from.
    """

    flops: float
    factor: float
    reason: str


def speed(dtype: str = "float32", tflops: float | None = None, seconds: float = 0.2) -> Speed | None:
    """Of a GPU whose peak is given, or of this machine's CPU, measured now; None where nothing can measure it.

    Raises:
        BadOption: if the peak is no positive number.
    """
    if tflops is not None:
        if not 0 < tflops < math.inf:
            raise BadOption(f"tflops is {tflops!r}: give the device's dense peak, such as 312 for an A100 in bfloat16")
        reason = f"{SHARE_OF_PEAK:.0%} of a stated peak of {tflops:g} TFLOPS"
        return Speed(tflops * 1e12 * SHARE_OF_PEAK, 2.0, reason)
    try:
        import numpy as np
    except ImportError:
        return None
    a = np.full((512, 512), 0.5, dtype=np.float32)
    a @ a
    began, shortest = time.perf_counter(), math.inf
    while time.perf_counter() - began < seconds:
        one = time.perf_counter()
        a @ a
        shortest = min(shortest, time.perf_counter() - one)  # Whatever else runs here only makes it longer.
    measured = 2.0 * 512**3 / shortest
    rate = measured * SHARE_OF_PRODUCTS * (1.0 if dtype == "float32" else NATIVE if _has_bfloat16() else EMULATED)
    reason = f"this CPU's float32 products run at {measured / 1e9:.0f} GFLOPS, measured now"
    return Speed(rate, 1.5 if dtype == "float32" else 2.0, reason)


def _has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def memory_here() -> int | None:
    """Bytes of this machine's memory that are free, as the container sees them; None where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, AttributeError):
            return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            free = min(free, int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return free


def bytes_of(text: str | int | float) -> int:
    """A size as people write it: 16GB, 80GiB, 900 MB, 16 (which are GB).

    Raises:
        BadOption: if it is none.

    Example:
        >>> bytes_of("16GB"), bytes_of("1.5GiB"), bytes_of("24")
        (16000000000, 1610612736, 24000000000)
    """
    written = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]I?)?B?\s*", str(text).upper())
    try:
        value = float(written[1]) if written else 0.0
    except ValueError:
        value = 0.0
    if written is None or not value > 0:
        raise BadOption(f"memory is {text!r}: write a size such as 16GB, 80GiB or 900MB")
    unit = written[2] or ("G" if "B" not in str(text).upper() and value < 10**5 else "")
    return int(value * {**UNITS, "TI": 2**40}[unit])


def size(count: float) -> str:
    """Bytes, for people."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= 0.995 * factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def duration(seconds: float) -> str:
    """Seconds, for people, and no more exact than they are."""
    for unit, factor in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * factor:
            return f"{seconds / factor:.2g} {unit}"
    return f"{seconds:.2g} s" if seconds >= 1 else "under a second"
