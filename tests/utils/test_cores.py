"""The number of cores by affinity and by the limits of control groups, from files made here."""

import os
import sys

import pytest

from vim_ssl.utils import cores as module
from vim_ssl.utils.cores import cores, quota

GROUP = "proc/self/cgroup"
TOP = "sys/fs/cgroup"
V1 = "4:memory:/docker/1\n3:cpuset:/\n2:cpu,cpuacct:/docker/1\n0::/\n"
CASES = {
    "v2 container": ({GROUP: "0::/\n", f"{TOP}/cpu.max": "200000 100000\n"}, 2),
    "v2, no limit": ({GROUP: "0::/\n", f"{TOP}/cpu.max": "max 100000\n"}, 16),
    "v2, of a group above": (
        {GROUP: "0::/slice/unit/run\n", f"{TOP}/slice/unit/run/cpu.max": "800000 100000\n",
         f"{TOP}/slice/cpu.max": "300000 100000\n"}, 3),
    "v2, the host's path": ({GROUP: "0::/docker/1\n", f"{TOP}/cpu.max": "400000 100000\n"}, 4),
    "v1 container": (
        {GROUP: V1, f"{TOP}/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "50000\n",
         f"{TOP}/cpu,cpuacct/docker/1/cpu.cfs_period_us": "10000\n"}, 5),
    "v1, the host's path, linked": (
        {GROUP: V1, f"{TOP}/cpu/cpu.cfs_quota_us": "600000\n",
         f"{TOP}/cpu/cpu.cfs_period_us": "100000\n"}, 6),
    "v1, no limit": (
        {GROUP: V1, f"{TOP}/cpu/cpu.cfs_quota_us": "-1\n",
         f"{TOP}/cpu/cpu.cfs_period_us": "100000\n"}, 16),
    "v1, another controller's": (
        {GROUP: "3:cpuset:/docker/1\n", f"{TOP}/cpuset/docker/1/cpu.cfs_quota_us": "100000\n",
         f"{TOP}/cpuset/docker/1/cpu.cfs_period_us": "100000\n"}, 16),
    "v2 beside v1": (
        {GROUP: "4:memory:/unit\n0::/unit\n", f"{TOP}/unified/unit/cpu.max": "700000 100000\n"}, 7),
    "malformed lines": (
        {GROUP: "\n0\n0:cpu\n0::/\n", f"{TOP}/cpu.max": "200000 100000\n"}, 2),
    "a name with a separator of lines": (
        {GROUP: "0::/a\u2028\x0b\x85\n", f"{TOP}/a\u2028\x0b\x85/cpu.max": "200000 100000\n"}, 2),
    "half a core": ({GROUP: "0::/\n", f"{TOP}/cpu.max": "50000 100000\n"}, 1),
    "a core and a half": ({GROUP: "0::/\n", f"{TOP}/cpu.max": "150000 100000\n"}, 2),
    "more than the machine": ({GROUP: "0::/\n", f"{TOP}/cpu.max": "6400000 100000\n"}, 16),
    "digits without end": ({GROUP: "0::/\n", f"{TOP}/cpu.max": f"{'9' * 5000} 100000\n"}, 16),
    "no control groups": ({}, 16),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_cores_of_a_container(case, tmp_path, monkeypatch):
    files, expected = CASES[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(module, "affinity", lambda: 16)
    assert cores(tmp_path) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="file names are not any bytes there")
def test_a_group_whose_name_is_not_utf8(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / GROUP).write_bytes(b"0::/\xe9t\xe9\n")
    group = tmp_path / TOP / os.fsdecode(b"\xe9t\xe9")
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("200000 100000\n")
    assert quota(tmp_path) == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="not on this system")
def test_the_cores_of_the_affinity():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_this_machine_has_at_least_one():
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert quota() > 0
