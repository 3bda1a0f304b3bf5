from __future__ import annotations

import hashlib
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

PROSE = (
    "The furnace of the steel works has to be heated with care, and the masters that have seen it burn know of "
    "{n} ways to tell by the colour of the flame when the carbon of the raw iron is gone. With each of the blows "
    "the colour of the light that the melt throws on the walls goes from red to white, and the men have to be quick "
    "to turn the vessel of number {n} before the iron begins to burn."
)


@pytest.fixture(scope="session")
def prose() -> Callable[[int], str]:
    """English that passes Gopher's rules, different for each number."""
    return lambda number: PROSE.format(n=number)


MODULE = '''"""Reading and writing of ingots."""

class Ingot:
    """A block of metal."""

    def __init__(self, mass, *, alloy="steel"):
        """Cast it."""

    @property
    def price(self):
        """What it costs."""

    def melt(self, temperature=1538.0, /, *others, **options):
        """Melt it.

        Slowly:
            with care.
        """

def cast(path, *, mould=("a",
                         "b"), log=None):
    """Cast what `path` describes."""

if True:
    async def cast(path):
        """A second definition."""
'''

METADATA = """Metadata-Version: 2.4
Name: Ingot-Tools
Version: 1.2
License-Expression: MIT
Project-URL: Homepage, https://example.org/ingot
Description-Content-Type: text/markdown

# Ingots

[![badge](https://example.org/b.svg)](https://example.org)

How to cast.
"""


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A small wheel with a module, tests, a page, a file that is not Python, and a README."""
    path = tmp_path / "wheels" / "ingot_tools-1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ingot/__init__.py", '"""Tools for ingots."""\n')
        archive.writestr("ingot/files.py", MODULE)
        archive.writestr("ingot/broken.py", '"""A docstring."""\ndef (:\n')
        archive.writestr("ingot/tests/test_files.py", '"""Not documentation."""\n')
        archive.writestr("ingot/_vendor/six.py", '"""Somebody else\'s."""\n')
        archive.writestr("ingot/guide.rst", "Guide\n=====\n\nRead this.\n")
        archive.writestr("ingot/words.txt", "word\n" * 100)
        archive.writestr("ingot_tools-1.2.dist-info/METADATA", METADATA)
        archive.writestr("ingot_tools-1.2.dist-info/licenses/LICENSE.md", "Do what you like.\n")
        archive.writestr(
            "ingot_tools-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("ingot_tools-1.2.dist-info/RECORD", "")
    return path


class Pip:
    """Answers in place of pip, which takes a second to start, and only where a lock is downloaded."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.has_index = True

    def run(self, command: list[str], **_: object) -> subprocess.CompletedProcess:
        assert command[1:4] == ["-m", "pip", "download"]
        if not self.has_index:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found\n")
        shutil.copy(self.wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    """A package index that holds the wheel, without a process for each download."""
    pip = Pip(wheel)
    monkeypatch.setattr("bessemer.data.sources.docs.subprocess", SimpleNamespace(run=pip.run))
    return pip


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def lock(wheel: Path, tmp_path: Path) -> Path:
    """A lock file that names the wheel."""
    path = tmp_path / "my.lock"
    path.write_text(f"# a comment\ningot-tools==1.2 \\\n    --hash=sha256:{sha256(wheel)}\n", encoding="utf-8")
    return path
