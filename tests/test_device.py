"""What makes a device faster, and what happens where it is not to be had."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from charseq2seq import device
from encoder_decoder_transformer import Kernels
from tests.push_client import ROOT

CGROUPS = Path("/sys/fs/cgroup")

WITHOUT_VARIABLE = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}

# Takes and frees 80 MiB six times, in larger and larger blocks, so that what the C library learns of its own accord is
# of no help; prints the page faults of the last four times, and a number too small to matter.
FAULTS = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: every page is small
import torch

torch.set_num_threads(1)
for turn, mebibytes in enumerate((4, 5, 8, 10, 16, 20)):
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(mebibytes << 18) for _ in range(80 // mebibytes)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print((torch.tensor([2.0**-126]) / 2).item())
"""
TUNED = "from charseq2seq.device import tune; tune()\n"


def printed(program: str, **options: Any) -> list[str]:
    """The lines that a program prints."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, **options)
    return done.stdout.splitlines()


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)
def test_memory_that_was_freed_is_not_fetched_anew_and_tiny_numbers_are_zero() -> None:
    usual, small = map(float, printed(FAULTS))
    assert usual > 3 * (80 << 20) / mmap.PAGESIZE and small > 0, "what this test is for"
    faults, zero = map(float, printed(TUNED + FAULTS))
    assert faults < usual / 5 and zero == 0


def test_a_gpu_without_a_working_triton_uses_the_slower_operations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    found, module = object(), types.ModuleType("charseq2seq.gpu_kernels")
    module.__dict__["KERNELS"] = Kernels(normalize_and_rotate=cast("Any", broken))
    monkeypatch.setattr("charseq2seq.device.find_spec", lambda name: found)
    monkeypatch.setitem(sys.modules, "charseq2seq.gpu_kernels", module)
    monkeypatch.setattr("torch.ones", lambda *shape, device: shape)  # there is no GPU here
    assert device.suitable_kernels.__wrapped__("cuda") == Kernels()
    assert "Triton does not work here (Failed to find C compiler.)" in capsys.readouterr().err


# --- as many threads as there are CPUs for us

GIB = 1 << 30
# The file of a process that names its groups, what lies in them, and the CPUs and bytes that are left of this machine.
HIERARCHIES: dict[str, tuple[str, dict[str, str], float, int]] = {
    "version 2, a group within a smaller one": (
        "0::/user.slice/job",
        {"user.slice/job/cpu.max": "max 100000", "user.slice/cpu.max": "50000 100000", "user.slice/memory.max": "4096"},
        0.5,
        4096,
    ),
    "version 1 in a container that sees the machine's path": (
        "5:memory:/docker/0123\n4:cpu,cpuacct:/docker/0123\n0::/",
        {
            "cpu,cpuacct/cpu.cfs_quota_us": "20000",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
            "memory/docker/0123/memory.limit_in_bytes": "8192",
        },
        0.2,
        8192,
    ),
    "no limit": (
        "4:cpu:/\n0::/",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu.max": "max 100000", "memory.max": "max"},
        3.0,
        64 * GIB,
    ),
    "more than there is": ("0::/", {"cpu.max": "800000 100000", "memory.max": f"{128 * GIB}"}, 3.0, 64 * GIB),
    "nothing to read": ("not what was expected", {}, 3.0, 64 * GIB),
}


@pytest.mark.parametrize("case", HIERARCHIES)
def test_the_limits_of_a_cgroup_are_read(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, files, cpus, memory = HIERARCHIES[case]
    for name, content in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{n}": c for n, c in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    monkeypatch.setattr(device, "_ROOT", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 64 * GIB >> 12, "SC_PAGE_SIZE": 4096}[name])
    assert (device.available_cpus()[0], device.available_memory()) == (cpus, memory)


@pytest.fixture
def group() -> Iterator[list[Path]]:
    """A real cgroup with a limit of half a CPU and 3 GiB: its folders."""
    name, version_2 = f"charseq2seq-test-{os.getpid()}", (CGROUPS / "cgroup.controllers").exists()
    limits = {"cpu": {"cpu.cfs_quota_us": "50000"}, "memory": {"memory.limit_in_bytes": f"{3 * GIB}"}}
    if version_2:
        limits = {"": {"cpu.max": "50000 100000", "memory.max": f"{3 * GIB}"}}
    folders = [CGROUPS / controller / name for controller in limits]
    try:
        for folder, files in zip(folders, limits.values(), strict=True):
            folder.mkdir()
            for file, limit in files.items():
                (folder / file).write_text(limit)
    except OSError as error:
        pytest.skip(f"no cgroup may be made here: {error}")
    else:
        yield folders
    finally:
        for folder in filter(Path.exists, folders):
            folder.rmdir()


def test_the_limits_of_a_real_cgroup_are_read(group: list[Path]) -> None:
    def enter() -> None:
        for folder in group:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

    program = "from charseq2seq.device import *\nprint(available_cpus()[0], available_memory(), *choose_threads(None))"
    (line,) = printed(program, env=WITHOUT_VARIABLE, preexec_fn=enter)
    assert line == f"0.5 {3 * GIB} 1 threads 1: the limit of this container or job is 0.5 CPUs"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_the_affinity_counts_unless_somebody_asks_for_more() -> None:
    program = "from charseq2seq.device import *\nprint(*available_cpus(), choose_threads(None), choose_threads(3))"

    def bind() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    variables = WITHOUT_VARIABLE | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    (line,) = printed(program, env=variables, preexec_fn=bind)
    machine = os.cpu_count()
    ours = f"this process may use 1 of {machine} CPUs" if machine != 1 else "1 CPUs"
    assert line == f"1 {ours} (2, 'threads 2: OMP_NUM_THREADS') (3, 'threads 3: asked for')"


# --- what else runs decides how threads wait

WAIT = """
import os
from charseq2seq.device import choose_threads
print(choose_threads(2)[1], flush=True)
os.environ["OMP_DISPLAY_ENV"] = "verbose"  # read when libgomp is loaded, with all the others
import torch
"""


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc here")
def test_beside_busy_programs_threads_sleep_while_they_wait() -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        said, *settings = printed(WAIT, env=WITHOUT_VARIABLE, stderr=subprocess.STDOUT)
    finally:
        for neighbour in busy:
            neighbour.kill()
            neighbour.wait()
    assert re.match(r"threads 2: asked for; they sleep while they wait, .*\(\d", said)
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", "\n".join(settings)) == ["1000"]


@pytest.mark.parametrize(("threads", "running", "sleep"), [(2, 1, False), (2, 3, True), (4, 1, True), (1, 9, False)])
def test_threads_spin_where_there_are_cpus_enough(
    threads: int, running: int, sleep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "stat").write_text(f"cpu 1 2 3\nprocs_running {running}\nprocs_blocked 7\n")
    monkeypatch.setattr(device, "_ROOT", tmp_path)
    monkeypatch.setattr(device, "available_cpus", lambda: (3, ""))
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    usual = f"threads {threads}: asked for"
    monkeypatch.setenv("GOMP_SPINCOUNT", "4321")
    assert device.choose_threads(threads) == (threads, usual), "what a user has set stays"
    assert os.environ["GOMP_SPINCOUNT"] == "4321"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    _, said = device.choose_threads(threads)
    assert said.partition(", because")[0] == usual + "; they sleep while they wait" * sleep
    assert os.environ.get("GOMP_SPINCOUNT") == ("1000" if sleep else None)
