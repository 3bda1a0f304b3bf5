"""Programs that try to get out: every tier holds them back, but for what its gaps name, as root and as another user."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import bessemer
from bessemer.core.sandbox import Tier
from bessemer.core.sandbox.execution import base_executable, closed_to_others

from . import hostile

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no sandbox on Windows")
NOBODY = 65534
CALLERS = ("this user", "nobody")
#: The others are like these, with less.
QUICK = {("this user", Tier.NAMESPACES), ("this user", Tier.LANDLOCK)}


@pytest.fixture
def world() -> Iterator[Path]:
    """A folder that every user can enter, with what the programs read and the package that runs them."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="bessemer-hostile-"))
    folder.chmod(0o755)
    (folder / "public").write_text("public", encoding="utf-8")
    (folder / "tools").mkdir()
    package = Path(bessemer.__file__).parent
    shutil.copytree(package / "core", folder / "bessemer" / "core", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(package / "__init__.py", folder / "bessemer")
    shutil.copy(hostile.__file__, folder / "hostile.py")
    for path in [folder / "public", *(folder / "bessemer").rglob("*"), folder / "hostile.py"]:
        path.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def python_for(caller: str, tier: Tier) -> str:
    """A Python that the programs' user can run."""
    own = base_executable()
    root_sees_it = caller == "this user" and tier in (Tier.NAMESPACES, Tier.LANDLOCK)
    if os.geteuid() != 0 or root_sees_it or not closed_to_others([own]):
        return own
    for path in ("/usr/bin/python3", "/usr/local/bin/python3"):
        check = [path, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        if Path(path).exists() and subprocess.run(check, check=False).returncode == 0:
            return path
    pytest.skip("no Python 3.11 that other users can run")


@pytest.mark.parametrize(
    ("caller", "tier"),
    [
        pytest.param(caller, tier, marks=[] if (caller, tier) in QUICK else pytest.mark.slow, id=f"{caller}-{tier.value}")
        for caller in CALLERS
        for tier in Tier
    ],
)
def test_hostile_programs_do_what_the_gaps_of_the_tier_name_and_nothing_else(caller, tier, world):
    if caller == "nobody" and os.geteuid() != 0:
        pytest.skip("only root can become nobody")
    if os.geteuid() == 0:
        # user 0 for those who run it, wherever setuid works
        shutil.copy(shutil.which("id"), world / "tools")
        (world / "tools" / "id").chmod(0o4755)
    if caller == "nobody":
        os.chown(world, NOBODY, NOBODY)
    done = subprocess.run(
        [python_for(caller, tier), "-B", "hostile.py", tier, str(world)],
        cwd=world,
        env={"PATH": os.defpath, "HOSTILE": hostile.SECRET},
        user=NOBODY if caller == "nobody" else None,
        group=NOBODY if caller == "nobody" else None,
        extra_groups=[] if caller == "nobody" else None,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, *outcomes = map(json.loads, done.stdout.splitlines())
    if "refused" in first:
        pytest.skip(first["refused"])
    assert len(outcomes) >= len(hostile.CASES) - 1
    surprises = {one["case"]: one["signs"] for one in outcomes if bool(one["signs"]) != (one["hazard"] in first["gaps"])}
    assert surprises == {}
