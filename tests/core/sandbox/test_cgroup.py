"""The control group of a run, in folders that look like cgroup v2."""

from __future__ import annotations

import errno
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest

from bessemer.core.errors import ConfigError
from bessemer.core.sandbox import resources
from bessemer.core.sandbox.resources import (
    ControlGroup,
    Limits,
    folder_bytes,
    memory_of,
    own_parent_group,
    parent_group,
    threads_of,
)


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


def test_a_group_that_does_nothing_else_is_enough_where_it_may_be_written(tmp_path, monkeypatch):
    make_group(tmp_path / "cgroup", "memory pids")
    assert parent_group(tmp_path / "cgroup", "/") == tmp_path / "cgroup"
    for denied in (tmp_path / "cgroup", tmp_path / "cgroup" / "cgroup.procs"):
        monkeypatch.setattr(os, "access", lambda path, mode, denied=denied: path != denied)
        assert parent_group(tmp_path / "cgroup", "/") is None


def test_the_own_group_is_that_of_the_second_version(monkeypatch):
    monkeypatch.setattr(resources, "parent_group", lambda root, own: root / own.lstrip("/"))
    for text, found in (("1:memory:/a\n0::/b/c\n", Path("/sys/fs/cgroup/b/c")), ("1:memory:/a\n", None)):
        monkeypatch.setattr(Path, "read_text", lambda path, text=text, **_: text)
        assert own_parent_group() == found


def test_a_group_swaps_nothing_and_is_removed_within_its_time(tmp_path, monkeypatch):
    make = Path.mkdir

    def with_swap(folder):
        make(folder)
        (folder / "memory.swap.max").write_text("max", encoding="utf-8")

    monkeypatch.setattr(Path, "mkdir", with_swap)
    monkeypatch.setattr(resources, "_SECONDS_TO_EMPTY", 0.02)
    group = ControlGroup(tmp_path, "run", memory=1, processes=1)
    assert (group.folder / "memory.swap.max").read_text(encoding="utf-8") == "0"
    for events in ("low 0\noom 2\n", "oom_kill 0\n"):
        (group.folder / "memory.events").write_text(events, encoding="utf-8")
        assert not group.ran_out_of_memory()
    (group.folder / "cgroup.kill").write_text("", encoding="utf-8")
    group.remove()
    assert (group.folder / "cgroup.kill").read_text(encoding="utf-8") == "1"
    for path in group.folder.iterdir():
        path.unlink()
    group.remove()
    assert not group.folder.exists()


def test_each_limit_is_above_zero_and_has_its_usual_value():
    usual = Limits(10.0, 10.0, 1 << 30, 64 << 20, 1 << 20, 32, 64)
    assert Limits() == usual
    for field in fields(Limits):
        assert getattr(replace(usual, **{field.name: 1}), field.name) == 1
        with pytest.raises(ConfigError, match=f"{field.name} is 0, and must be above 0"):
            replace(usual, **{field.name: 0})


def test_memory_that_is_shared_with_files_and_processes_that_ended_count_nothing(monkeypatch):
    held = {1: "900 50 20 1 0 3 0", 2: "900 7 6 1 0 3 0", 3: "900 5 9 1 0 3 0", 4: ""}

    def read(path, **_):
        if int(path.parts[2]) not in held:
            raise FileNotFoundError(path)
        return held[int(path.parts[2])]

    monkeypatch.setattr(Path, "read_text", read)
    assert memory_of([1, 2, 3, 4, 5]) == 31 * os.sysconf("SC_PAGE_SIZE")
    assert memory_of([]) == 0


def test_threads_are_counted_of_the_processes_that_there_are(monkeypatch):
    monkeypatch.setattr(os, "listdir", {"/proc/1/task": ["1", "5"], "/proc/2/task": ["2"]}.__getitem__)
    assert (threads_of([1, 2]), threads_of([2]), threads_of([])) == (3, 1, 0)


def test_a_folder_that_cannot_be_counted_is_more_than_is_allowed(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(resources, "MAX_ENTRIES", 2)
    assert folder_bytes(tmp_path, 7) == 0
    (tmp_path / "three").mkdir()
    assert folder_bytes(tmp_path, 7) == 8
    for error, found in ((errno.ENAMETOOLONG, 8), (errno.EACCES, 0), (errno.ENOENT, 0)):

        def refuse(path, error=error):
            raise OSError(error, "")

        monkeypatch.setattr(os, "scandir", refuse)
        assert folder_bytes(tmp_path, 7) == found
