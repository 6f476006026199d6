"""What a machine has: processor, memory, GPUs, disk; limits of containers respected."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compress.machine import parse

DEVICE = "COMPRESS_DEVICE"
"""The environment's name for the device that runs compute on."""
SMI_SECONDS = 5  # a driver that hangs must not hold up a plan


@dataclass(frozen=True)
class Cpu:
    """model: its name, "" where nothing tells it; features: of parse.FEATURES; cores: that this process may use."""

    model: str
    features: tuple[str, ...]
    cores: int


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory, None where nothing tells them. available: what programs can have without swapping; limited: a
    container's limit is less than the machine has."""

    total: int | None
    available: int | None
    limited: bool = False

    @property
    def there(self) -> int | None:
        """What a program can have, as far as that is known."""
        return self.total if self.available is None else self.available

    @property
    def words(self) -> str:
        """What these bytes are."""
        if self.limited:
            return "that this container may take"
        return "that this machine has" if self.available is None else "that are free"


@dataclass(frozen=True)
class Gpu:
    """One GPU with memory of its own, in bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Machine:
    """A machine as this process sees it."""

    cpu: Cpu
    memory: Memory
    gpus: tuple[Gpu, ...] = ()

    @property
    def vram(self) -> int:
        """Bytes free on all GPUs together."""
        return sum(gpu.free for gpu in self.gpus)

    def given(self, memory: int | None = None, vram: int | None = None) -> Machine:
        """The same with so many bytes of main memory, or one GPU with so many (0: none), instead of what is there."""
        changed = self
        if memory is not None:
            changed = replace(changed, memory=Memory(memory, memory))
        if vram is not None:
            changed = replace(changed, gpus=(Gpu("a GPU", vram, vram),) if vram else ())
        return changed

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def look(
    read: parse.Read | None = None,
    ask: Callable[[Sequence[str]], str | None] | None = None,
    cores: int | None = None,
) -> Machine:
    """This machine; or the one whose files `read` gives, whose commands `ask` answers, and whose system lets us use `cores`."""
    here = read is None
    read, ask = read or _file, ask or _answer
    model, features = parse.cpuinfo(read("/proc/cpuinfo") or "")
    if here and sys.platform == "darwin" and platform.machine() == "arm64":
        features = ("asimddp",)  # every processor of Apple's has them
    quota = parse.processor_limit(read)
    own = cores or _cores()
    total, available = parse.meminfo(read("/proc/meminfo") or "")
    if here and total is None:
        total = _physical()
    limit, left = parse.memory_limit(read)
    limited = limit is not None and (total is None or limit < total)
    if limited:
        total = limit
    if left is not None:
        available = left if available is None else min(available, left)
    gpus = (*parse.nvidia(ask(parse.NVIDIA) or ""), *parse.amd(read))
    return Machine(
        Cpu(model or (platform.processor() or platform.machine() if here else ""), features, min(own, quota or own)),
        Memory(total, available, limited),
        tuple(Gpu(*gpu) for gpu in gpus),
    )


def threads(environment: str | None = None, cores: int | None = None) -> int:
    """Threads that computing libraries start here: the cores we may use, or fewer where OMP_NUM_THREADS says so."""
    wanted = os.environ.get("OMP_NUM_THREADS", "") if environment is None else environment
    cores = cores or _cores()
    return min(int(wanted), cores) if wanted.isdigit() and int(wanted) > 0 else cores


def free_disk(folder: Path) -> int | None:
    """Bytes free where `folder` is, or would be made; None where nothing tells."""
    there = next((f for f in (folder.absolute(), *folder.absolute().parents) if f.exists()), None)
    try:
        return None if there is None else shutil.disk_usage(there).free
    except OSError:
        return None


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _physical() -> int | None:
    """Where there is no /proc: bytes of memory as POSIX tells them, macOS too."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _file(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _answer(command: Sequence[str]) -> str | None:
    """What a program prints, None where there is no such program or it fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SMI_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
