"""A Ray cluster as it stands elsewhere: `bessemer[data,ray,s3]` is all that its Python has, and no disk is shared with it."""

from __future__ import annotations

import importlib.metadata
import os
import secrets
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bessemer
from tests.data.test_object_storage import files_of, local, records, stored  # noqa: F401

pytest.importorskip("ray")

#: Runs in every process of the cluster: nothing of a run's folder is opened, listed or made.
GUARD = """
import os, sys

def refuse(event, arguments):
    if event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove") and arguments:
        if str(arguments[0]).startswith(os.environ["REFUSED"]):
            raise PermissionError(f"{event} of {arguments[0]}: this disk is not shared")

sys.addaudithook(refuse)
"""

DRIVER = """
import json, sys
from pathlib import Path
from tests.data.test_object_storage import run_stages

root, sources, where = sys.argv[1:]
run_stages(Path(root), json.loads(sources), **json.loads(where))
"""

PROBE = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False, logging_level=40)

@ray.remote
def probe(folder):
    import importlib.util, os, sys
    heavy = [name for name in ("torch", "tokenizers", "transformers", "fastokens") if importlib.util.find_spec(name)]
    try:
        open(os.path.join(folder, "select.partial", "documents", "objects.json"))
    except PermissionError:
        return sys.prefix, heavy, "refused"
    return sys.prefix, heavy, "opened"

print(ray.get(probe.remote(sys.argv[2])))
"""


def needed(*extras):
    """The installed distributions that bessemer with these extras needs, and what those need."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [line for extra in extras for line in project["optional-dependencies"][extra] if not line.startswith("bessemer")]
    waiting, found = [Requirement(line) for line in [*project["dependencies"], *listed]], {}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(requirement.name)
        for line in found[name].requires or []:
            further = Requirement(line)
            extras_asked = {"", *requirement.extras}
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras_asked):
                waiting.append(further)
    return found


@pytest.fixture(scope="module")
def worker_python(tmp_path_factory):
    """A virtual environment of those distributions alone, each a link to the installed one."""
    folder = tmp_path_factory.mktemp("worker") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    found = needed("data", "ray", "s3")
    assert {"daft", "ray", "s3fs"} < found.keys() and not {"torch", "tokenizers"} & found.keys()
    for distribution in found.values():
        for name in {Path(file).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(distribution.locate_file(name))
    (site / "bessemer").symlink_to(Path(bessemer.__file__).parent)
    (site / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
    return folder / "bin" / "python"


@pytest.fixture
def cluster(worker_python, bucket, tmp_path, monkeypatch):
    """The address of a cluster that the environment's Python runs in a folder of its own."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # else a token that any run of Ray has left in the home folder decides
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"REFUSED": str(tmp_path / "runs"), "TMPDIR": str(elsewhere), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [worker_python, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    command += ["--include-dashboard=false", "--object-store-memory=100000000", "--temp-dir=/tmp/ray-bessemer"]
    with (tmp_path / "cluster.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=elsewhere, env=environment, stdout=log, stderr=log)
        for _ in range(600):
            if "Ray runtime started" in (tmp_path / "cluster.log").read_text(encoding="utf-8") or process.poll() is not None:
                break
            time.sleep(0.1)
        assert process.poll() is None, (tmp_path / "cluster.log").read_text(encoding="utf-8")
        yield f"127.0.0.1:{port}"
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.slow
def test_workers_with_the_data_extra_alone_and_no_shared_disk_give_the_same_bytes(
    cluster,
    worker_python,
    bucket,
    stored,  # noqa: F811
    local,  # noqa: F811
    tmp_path,
):
    import json

    where = {"engine": "ray", "ray_address": cluster, "storage": f"{bucket.address}/corpus"}
    runs = tmp_path / "runs"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", DRIVER, runs, json.dumps(stored), json.dumps(where)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=500)
    here, _, _ = local
    assert bucket.objects("corpus/") == files_of(here)
    assert not list(runs.rglob("*.parquet"))

    command = [sys.executable, "-c", PROBE, cluster, runs]
    told = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", env=environment, timeout=200).stdout
    assert told.strip().splitlines()[-1] == str((str(worker_python.parents[1]), [], "refused"))
