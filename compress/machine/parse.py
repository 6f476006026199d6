"""What Linux and its tools say of a machine, as text -> numbers. Pure: texts of other machines parse alike.

Sources: proc(5), cgroups(7), the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst, nvidia-smi(1).
What cannot be read is None, never a guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

Read = Callable[[str], str | None]
"""The text of a file by its absolute path, None where there is none."""

UNLIMITED = 1 << 60  # version 1 writes the largest multiple of a page for "no limit"
FEATURES = (
    "avx", "avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""Those that engines have kernels for, of x86 and ARM, as /proc/cpuinfo calls them."""


def meminfo(text: str) -> tuple[int | None, int | None]:
    """Bytes in all and available, of /proc/meminfo."""
    found = {name: int(size) << 10 for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return found.get("MemTotal"), found.get("MemAvailable")


def cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Name of the model, "" where it is not told, and its features of FEATURES, of /proc/cpuinfo."""

    def first(*keys: str) -> str:
        found = (re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE) for key in keys)
        return next((match[1].strip() for match in found if match), "")

    flags = set(first("flags", "Features").split())
    return " ".join(first("model name", "Model").split()), tuple(name for name in FEATURES if name in flags)


def processor_limit(read: Read) -> int | None:
    """Processors that the cgroups of this process let it use, rounded up; None without a limit."""
    found = []
    for version, folder in _folders(read, "cpu"):
        if version == 2:
            quota, _, period = (read(f"{folder}/cpu.max") or "").partition(" ")
        else:
            quota, period = (read(f"{folder}/cpu.cfs_{what}_us") or "" for what in ("quota", "period"))
        share, of = _number(quota), _number(period)
        if share and of:
            found.append(max(1, math.ceil(share / of)))
    return min(found, default=None)


def memory_limit(read: Read) -> tuple[int | None, int | None]:
    """Bytes that the cgroups of this process may hold, and how many of them are left; None without a limit.

    What they hold of files nobody uses counts as left: the kernel drops it first.
    """
    limit = left = None
    for version, folder in _folders(read, "memory"):
        most, now, idle = (
            ("memory.max", "memory.current", "inactive_file")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        most_bytes = _number(read(f"{folder}/{most}"))
        if most_bytes is None or most_bytes >= UNLIMITED:
            continue
        used = _number(read(f"{folder}/{now}")) or 0
        match = re.search(rf"^{idle} (\d+)$", read(f"{folder}/memory.stat") or "", re.MULTILINE)
        free = max(most_bytes - used + min(used, int(match[1]) if match else 0), 0)
        limit = most_bytes if limit is None else min(limit, most_bytes)
        left = free if left is None else min(left, free)
    return limit, left


def _folders(read: Read, controller: str) -> Iterator[tuple[int, str]]:
    """Version and folder of every cgroup of this process that may limit it, the innermost first."""
    for line in (read("/proc/self/cgroup") or "").splitlines():
        number, names, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not names:
            version, root = 2, "/sys/fs/cgroup"
        elif controller in names.split(","):
            version, root = 1, f"/sys/fs/cgroup/{controller}"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        if ".." in parts:  # above what this container sees: its own group is the root
            parts = []
        for end in range(len(parts), -1, -1):
            yield version, "/".join([root, *parts[:end]])


def _number(text: str | None) -> int | None:
    text = (text or "").strip()
    return int(text) if re.fullmatch(r"\d{1,19}", text) else None


NVIDIA = ("nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
"""Prints what `nvidia` reads."""


def nvidia(text: str) -> Iterator[tuple[str, int, int]]:
    """Name, bytes in all and free of every GPU; sizes are printed in MiB. Those that tell none share the machine's."""
    for line in text.splitlines():
        name, *sizes = (part.strip() for part in line.rsplit(",", 2))
        if len(sizes) == 2 and all(re.fullmatch(r"\d+", size) for size in sizes):
            yield name, int(sizes[0]) << 20, int(sizes[1]) << 20


def amd(read: Read, cards: int = 16) -> Iterator[tuple[str, int, int]]:
    """The same of GPUs that the kernel's amdgpu drives, from sysfs."""
    for number in range(cards):
        folder = f"/sys/class/drm/card{number}/device"
        total, used = (_number(read(f"{folder}/mem_info_vram_{what}")) for what in ("total", "used"))
        if total:
            name = (read(f"{folder}/product_name") or "").strip() or f"AMD GPU {number}"
            yield name, total, total - (used or 0)
