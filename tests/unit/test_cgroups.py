"""The limits of control groups, read from a folder like /sys/fs/cgroup."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest

from sage.common import cgroups
from sage.common.cgroups import MemoryLimit, available_cores, memory_limits

Tree = Callable[[str, Mapping[str, str]], None]
V2 = "0::/pod/container\n"
V1 = "4:memory:/pod/container\n3:cpu,cpuacct:/pod/container\n1:name=systemd:/\n0::/\n"
UNLIMITED = str(2**63 - 4096)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Return a function that writes the groups of this process and the files of the groups."""

    def write(own: str, files: Mapping[str, str]) -> None:
        (tmp_path / "self").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    monkeypatch.setattr(cgroups, "_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "_OWN", tmp_path / "self")
    monkeypatch.setattr(cgroups, "_CPUS", tmp_path / "cgroup" / "cpus")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return write


def test_a_system_without_control_groups_has_no_limits(tree: Tree) -> None:
    assert memory_limits() == []
    assert available_cores() == 8


@pytest.mark.parametrize(
    ("own", "files", "limits"),
    [
        (V2, {"pod/container/memory.max": "max", "pod/container/memory.stat": "anon 5"}, []),
        (V2, {"pod/container/memory.max": "100", "pod/container/memory.stat": "anon 5\nfile 50"}, [MemoryLimit(100, 5)]),
        (
            V2,
            {
                "pod/container/memory.max": "100", "pod/container/memory.stat": "anon 5",
                "pod/memory.max": "90", "pod/memory.stat": "anon 40",
            },
            [MemoryLimit(100, 5), MemoryLimit(90, 40)],
        ),
        (
            V1,
            {
                "memory/pod/container/memory.limit_in_bytes": "100", "memory/pod/container/memory.stat": "total_rss 5",
                "memory/memory.limit_in_bytes": UNLIMITED, "memory/memory.stat": "total_rss 60",
            },
            [MemoryLimit(100, 5), MemoryLimit(int(UNLIMITED), 60)],
        ),
        # In a container, the container's group is mounted as the root, but /proc contains the path of the group on the host.
        (V1, {"memory/memory.limit_in_bytes": "100", "memory/memory.stat": "total_rss 5"}, [MemoryLimit(100, 5)]),
        (V2, {"pod/container/memory.max": "100"}, []),
    ],
    ids=["none", "v2", "v2 nested", "v1 nested", "v1 in a container", "without the used memory"],
)  # fmt: skip
def test_the_memory_limits_of_all_enclosing_groups_are_found(
    tree: Tree, own: str, files: Mapping[str, str], limits: list[MemoryLimit]
) -> None:
    tree(own, files)
    assert memory_limits() == limits


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        (V2, {"pod/container/cpu.max": "max 100000"}, 8),
        (V2, {"pod/container/cpu.max": "250000 100000"}, 2),
        (V2, {"pod/container/cpu.max": "600000 100000", "pod/cpu.max": "300000 100000"}, 3),
        (V2, {"pod/container/cpu.max": "50000 100000"}, 1),
        (V2, {"pod/container/cpu.max": "1600000 100000"}, 8),
        (V1, {"cpu/pod/container/cpu.cfs_quota_us": "-1", "cpu/pod/container/cpu.cfs_period_us": "100000"}, 8),
        (V1, {"cpu/pod/cpu.cfs_quota_us": "400000", "cpu/pod/cpu.cfs_period_us": "100000"}, 4),
    ],
    ids=["v2 unlimited", "v2", "v2 nested", "less than a core", "more than the affinity", "v1 unlimited", "v1 nested"],
)
def test_the_smallest_limit_and_the_affinity_set_the_number_of_cores(
    tree: Tree, own: str, files: Mapping[str, str], cores: int
) -> None:
    tree(own, files)
    assert available_cores() == cores


def test_the_logical_cpus_of_one_core_count_once(tree: Tree) -> None:
    tree(V2, {f"cpus/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)})
    assert available_cores() == 4


def test_on_a_system_without_affinity_all_cores_are_available(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)
    assert available_cores() == 1
