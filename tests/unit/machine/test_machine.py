"""What is read of a machine, from texts of several: a workstation, containers of both cgroup versions, an ARM board, a Mac."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from compress.machine import Cpu, Gpu, Machine, Memory, free_disk, look, parse, threads

GIB = 2**30
MEMINFO = """MemTotal:       65843028 kB
MemFree:         2200000 kB
MemAvailable:   41943040 kB
Buffers:          100000 kB
"""
CPUINFO = """processor	: 0
vendor_id	: AuthenticAMD
model name	: AMD Ryzen 9 7950X 16-Core Processor
flags		: fpu vme sse4_2 avx f16c avx2 fma avx512f avx512_vnni avx512_bf16 avx512dq
bugs		: spectre_v1

processor	: 1
model name	: AMD Ryzen 9 7950X 16-Core Processor
flags		: fpu vme
"""
ARM = """processor	: 0
BogoMIPS	: 108.00
Features	: fp asimd evtstrm aes asimddp i8mm bf16
CPU implementer	: 0x41

Model		: Raspberry Pi 5 Model B Rev 1.0
"""
SMI = """NVIDIA GeForce RTX 4090, 24564, 23010
NVIDIA H100 80GB HBM3, 81559, 80994
NVIDIA GB10, [N/A], [N/A]
"""
BASE = {"/proc/meminfo": MEMINFO, "/proc/cpuinfo": CPUINFO}


def machine(files: Mapping[str, str], smi: str | None = None, cores: int = 8) -> Machine:
    return look(files.get, lambda command: smi if command == parse.NVIDIA else None, cores)


def test_a_workstation() -> None:
    found = machine({**BASE, "/proc/self/cgroup": "0::/user.slice\n"}, SMI)
    features = ("avx", "avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx512_bf16")
    assert found.cpu == Cpu("AMD Ryzen 9 7950X 16-Core Processor", features, 8)
    assert found.memory == Memory(65843028 * 1024, 40 * GIB)
    assert found.gpus == (
        Gpu("NVIDIA GeForce RTX 4090", 24564 << 20, 23010 << 20),
        Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, 80994 << 20),
    )
    assert found.vram == (23010 + 80994) << 20


def test_a_container_of_version_2() -> None:
    """Limits hold on the way up; files that nobody uses count as free."""
    group = "/sys/fs/cgroup/kubepods/pod1"
    files = {
        **BASE,
        "/proc/self/cgroup": "0::/kubepods/pod1\n",
        f"{group}/memory.max": "max\n",
        "/sys/fs/cgroup/kubepods/memory.max": f"{8 * GIB}\n",
        "/sys/fs/cgroup/kubepods/memory.current": f"{3 * GIB}\n",
        "/sys/fs/cgroup/kubepods/memory.stat": f"anon 12\nfile 34\ninactive_file {GIB}\nactive_file 5\n",
        f"{group}/cpu.max": "250000 100000\n",
        "/sys/fs/cgroup/kubepods/cpu.max": "max 100000\n",
    }
    found = machine(files)
    assert found.memory == Memory(8 * GIB, 6 * GIB, limited=True)
    assert found.cpu.cores == 3 and found.gpus == ()


def test_a_container_of_version_1_that_sees_its_own_group_as_the_root() -> None:
    files = {
        **BASE,
        "/proc/self/cgroup": "9:name=systemd:/\n5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB),
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 * GIB // 2),
        "/sys/fs/cgroup/memory/memory.stat": "cache 1\ntotal_inactive_file 536870912\n",
        "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
        "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    found = machine(files)
    assert found.memory == Memory(2 * GIB, GIB, limited=True)
    assert found.cpu.cores == 8


@pytest.mark.parametrize("most", ["9223372036854771712", "max", "", "nonsense", str(128 * GIB)])
def test_no_limit_is_none(most: str) -> None:
    """The largest number of version 1, and a limit above what there is."""
    files = {**BASE, "/proc/self/cgroup": "5:memory:/\n", "/sys/fs/cgroup/memory/memory.limit_in_bytes": most}
    assert machine(files).memory == Memory(65843028 * 1024, 40 * GIB)


def test_a_board_and_a_mac() -> None:
    assert machine({"/proc/cpuinfo": ARM}).cpu == Cpu("Raspberry Pi 5 Model B Rev 1.0", ("asimddp", "i8mm", "bf16"), 8)
    nothing = machine({})
    assert nothing == Machine(Cpu("", (), 8), Memory(None, None)) and nothing.memory.there is None


def test_a_gpu_that_the_kernel_tells_of() -> None:
    folder = "/sys/class/drm/card1/device"
    files = {f"{folder}/mem_info_vram_total": str(16 * GIB), f"{folder}/mem_info_vram_used": str(GIB)}
    assert machine(files).gpus == (Gpu("AMD GPU 1", 16 * GIB, 15 * GIB),)


@pytest.mark.parametrize(
    "text", ["", "NVIDIA-SMI has failed because it couldn't communicate\n", "No devices were found"]
)
def test_tools_that_fail_find_nothing(text: str) -> None:
    assert machine(BASE, text).gpus == ()


def test_what_is_given_stands_for_what_is_there() -> None:
    found = machine(BASE, SMI)
    assert found.given(8 * GIB, 0) == Machine(found.cpu, Memory(8 * GIB, 8 * GIB))
    assert found.given(vram=6 * GIB).vram == 6 * GIB and found.given(vram=6 * GIB).memory == found.memory
    assert found.given() == found


def test_this_machine_tells_what_the_system_does(tmp_path: Path) -> None:
    import os

    import psutil

    found = look()
    assert found.cpu.cores >= 1 and found.cpu.cores <= len(os.sched_getaffinity(0))
    assert found.memory.total is not None and found.memory.total <= psutil.virtual_memory().total
    assert found.memory.available is not None and 0 < found.memory.available <= found.memory.total
    free = free_disk(tmp_path / "not" / "there" / "yet")
    assert free is not None and abs(free - psutil.disk_usage(str(tmp_path)).free) < GIB


@pytest.mark.parametrize(
    ("said", "cores", "expected"), [("", 8, 8), ("2", 8, 2), ("64", 8, 8), ("0", 8, 8), ("x", 3, 3)]
)
def test_threads(said: str, cores: int, expected: int) -> None:
    assert threads(said, cores) == expected
