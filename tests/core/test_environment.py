import ast
from pathlib import Path

import pytest

import bessemer
from bessemer.core import environment


def test_no_duration_is_a_difference_of_times_of_day():
    """A clock that is set meanwhile would make it negative, or hours: `time.time` says when, and never how long."""
    texts = ((path, path.read_text(encoding="utf-8")) for path in Path(bessemer.__file__).parent.rglob("*.py"))
    sums = [
        f"{path.name}:{node.lineno}"
        for path, text in texts
        # few files ask for the time of day at all
        if "time.time" in text or "datetime.now" in text
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.BinOp, ast.Compare)) and any(map(_is_time_of_day, ast.iter_child_nodes(node)))
    ]
    # a Retry-After that names a time of day, and states that clients save until one
    assert sorted(place.split(":")[0] for place in sums) == ["fetch.py", "service.py", "states.py"]


def _is_time_of_day(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.time", "time.time_ns", "datetime.now")


@pytest.mark.parametrize(
    ("limit", "stat", "left"),
    [
        ("1000", "anon 300\nactive_file 100\ninactive_file 200\n", 700),
        ("1000", "anon 600\n", 400),
        ("500", "anon 600\n", 0),
        ("max", "anon 600\n", None),
    ],
)
def test_a_containers_limit_leaves_what_is_neither_used_nor_cached(limit, stat, left, tmp_path):
    for name, text in (("max", limit), ("current", "600\n"), ("stat", stat)):
        (tmp_path / f"memory.{name}").write_text(text, encoding="utf-8")
    assert environment._left_in_group(tmp_path) == left


def test_without_a_group_there_is_no_limit(tmp_path):
    assert environment._left_in_group(tmp_path) is None and environment._limit_of_group(tmp_path) is None


@pytest.mark.parametrize(("limit", "most"), [("1000\n", 1000), ("max\n", None), ("nonsense", None)])
def test_a_container_has_a_limit_whatever_is_used(limit, most, tmp_path):
    (tmp_path / "memory.max").write_text(limit, encoding="utf-8")
    assert environment._limit_of_group(tmp_path) == most


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("cpu_max", "quota"),
    [("50000 100000\n", 0.5), ("150000 100000\n", 1.5), ("max 100000\n", None), ("nonsense", None)],
)
def test_a_containers_quota_is_read(cpu_max, quota, tmp_path):
    group(tmp_path / "root", cpu__max=cpu_max)
    (tmp_path / "cgroup").write_text("0::/\n", encoding="utf-8")
    assert environment._quota(tmp_path / "root", tmp_path / "cgroup") == quota


def test_the_smallest_quota_of_the_groups_above_counts(tmp_path):
    group(tmp_path / "root/slice", cpu__max="200000 100000")
    group(tmp_path / "root/slice/job", cpu__max="300000 100000")
    (tmp_path / "cgroup").write_text("0::/slice/job\n", encoding="utf-8")
    assert environment._quota(tmp_path / "root", tmp_path / "cgroup") == 2.0


def test_a_quota_of_the_older_groups_is_read(tmp_path):
    group(tmp_path / "root/cpu,cpuacct/docker", cpu__cfs_quota_us="25000\n", cpu__cfs_period_us="100000\n")
    group(tmp_path / "root/cpu,cpuacct", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    (tmp_path / "cgroup").write_text("4:memory:/docker\n3:cpu,cpuacct:/docker\n", encoding="utf-8")
    assert environment._quota(tmp_path / "root", tmp_path / "cgroup") == 0.25


def test_the_memory_of_the_groups_above_counts_of_either_version(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/slice/job\n4:memory:/docker\n", encoding="utf-8")
    for path, limit in (("slice/job/memory.max", "max"), ("slice/memory.max", "3000"), ("memory.max", "9000")):
        group(tmp_path / "root" / Path(path).parent)
        (tmp_path / "root" / path).write_text(limit, encoding="utf-8")
    group(tmp_path / "root/memory/docker")
    (tmp_path / "root/memory/docker/memory.limit_in_bytes").write_text("2000\n", encoding="utf-8")
    (tmp_path / "root/memory/docker/memory.usage_in_bytes").write_text("700\n", encoding="utf-8")
    (tmp_path / "root/memory/docker/memory.stat").write_text("inactive_file 300\n", encoding="utf-8")
    group(tmp_path / "root/memory")
    (tmp_path / "root/memory/memory.limit_in_bytes").write_text("9223372036854771712\n", encoding="utf-8")
    groups = list(environment._groups("memory", tmp_path / "root", membership))
    assert [limit for limit in map(environment._limit_of_group, groups) if limit] == [3000, 9000, 2000]
    assert environment._left_in_group(tmp_path / "root/memory/docker") == 1600


def test_without_groups_there_is_no_quota(tmp_path):
    assert environment._quota(tmp_path / "root", tmp_path / "cgroup") is None


@pytest.mark.parametrize(("quota", "cores"), [(None, 4), (0.5, 1), (1.5, 2), (3.0, 3), (9.0, 4)])
def test_a_part_of_a_core_is_one(quota, cores, monkeypatch):
    monkeypatch.setattr(environment, "affine_cores", lambda: 4)
    monkeypatch.setattr(environment, "cpu_quota", lambda: quota)
    assert environment.usable_cores() == cores


def test_libraries_are_told_of_a_quota_and_the_users_own_setting_stays(monkeypatch):
    monkeypatch.setattr(environment, "affine_cores", lambda: 4)
    monkeypatch.setattr(environment, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(environment.os, "environ", variables := {"MKL_NUM_THREADS": "3"})
    environment.set_environment()
    assert [variables[f"{library}_NUM_THREADS"] for library in ("OMP", "NUMBA", "OPENBLAS", "MKL")] == ["2", "2", "2", "3"]


def test_a_folder_below_one_that_may_be_written_to_can_be_made(tmp_path):
    assert environment.can_write_below(tmp_path / "not" / "yet")
    (tmp_path / "file").touch()
    assert not environment.can_write_below(tmp_path / "file" / "below")


def test_what_may_not_be_looked_into_cannot_be_written_to(monkeypatch):
    def refused(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(environment.Path, "exists", refused)
    assert not environment.can_write_below(environment.Path("/root/.cache"))


def test_a_user_without_a_home_has_no_cache_there(monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(environment.Path, "home", unknown)
    assert not environment._home_can_be_written()


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(environment.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / f"bessemer-{environment.os.getuid()}"


def test_what_is_compiled_goes_to_a_temporary_folder_that_is_the_users_alone(temporary):
    assert environment.own_temporary_folder() == temporary and temporary.stat().st_mode & 0o777 == 0o700
    assert environment.own_temporary_folder() == temporary
    temporary.chmod(0o777)
    with pytest.raises(PermissionError, match="not this user's alone"):
        environment.own_temporary_folder()


def test_a_link_that_somebody_has_laid_there_is_not_followed(temporary, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    temporary.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError):
        environment.own_temporary_folder()


@pytest.mark.parametrize("writable", [True, False])
def test_caches_are_kept_elsewhere_when_neither_package_nor_home_can_be_written_to(writable, temporary, monkeypatch):
    monkeypatch.setattr(environment, "can_write_below", lambda folder: writable)
    monkeypatch.setattr(environment.os, "environ", variables := {"HOME": "/nowhere"})
    environment.set_environment()
    for name in ("NUMBA_CACHE_DIR", "HF_HOME"):
        assert variables.get(name) == (None if writable else str(temporary / name.lower()))
