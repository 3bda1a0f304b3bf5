"""The control group of a run, in folders that look like cgroup v2."""

from __future__ import annotations

from pathlib import Path

import pytest

from bessemer.core.sandbox.resources import ControlGroup, own_parent_group, parent_group


def make_group(folder: Path, controllers: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cgroup.subtree_control").write_text(controllers, encoding="utf-8")
    (folder / "cgroup.procs").write_text("", encoding="utf-8")


def test_the_nearest_group_that_hands_on_memory_and_pids_is_taken(tmp_path):
    root = tmp_path / "cgroup"
    make_group(root, "cpu memory pids")
    make_group(root / "user.slice", "cpu pids memory")
    make_group(root / "user.slice" / "session", "")
    assert parent_group(root, "/user.slice/session") == root / "user.slice"
    (root / "user.slice" / "cgroup.subtree_control").write_text("pids", encoding="utf-8")
    assert parent_group(root, "/user.slice/session") == root
    (root / "cgroup.subtree_control").write_text("memory", encoding="utf-8")
    assert parent_group(root, "/user.slice/session") is None


def test_a_group_holds_the_limits_and_says_when_memory_ran_out(tmp_path):
    group = ControlGroup(tmp_path, "run", memory=1 << 20, processes=7)
    group.add_process(123)
    values = {path.name: path.read_text(encoding="utf-8") for path in group.folder.iterdir()}
    assert values == {"memory.max": "1048576", "pids.max": "7", "cgroup.procs": "123"}
    assert not group.ran_out_of_memory()
    (group.folder / "memory.events").write_text("low 0\noom 2\noom_kill 1\n", encoding="utf-8")
    assert group.ran_out_of_memory()


def test_the_kernel_ends_a_group_that_is_removed():
    import subprocess

    parent = own_parent_group()
    if parent is None:
        pytest.skip("no cgroup v2 with memory and pids that can be written to")
    group = ControlGroup(parent, "bessemer-test", memory=64 << 20, processes=4)
    process = subprocess.Popen(["sleep", "60"])
    group.add_process(process.pid)
    group.remove()
    assert process.wait(5) == -9
    assert not group.folder.exists()
