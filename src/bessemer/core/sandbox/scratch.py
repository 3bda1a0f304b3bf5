"""The scratch folder of a run without a root of its own: made, and removed whatever the program left in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder with `work` and `tmp` in it."""
    folder = Path(tempfile.mkdtemp(prefix="bessemer-sandbox-")).resolve()
    try:
        for name in ("work", "tmp"):
            (folder / name).mkdir()
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a tree; by `rm` where it is closed or too deep for a recursion in Python."""
    try:
        shutil.rmtree(folder)
        return
    except (OSError, RecursionError):
        pass
    environment = {"PATH": os.defpath, "LC_ALL": "C"}
    for command in (["rm", "-rf", "--"], ["chmod", "-R", "u+rwX", "--"], ["rm", "-rf", "--"]):
        done = subprocess.run([*command, str(folder)], env=environment, stderr=subprocess.DEVNULL, check=False)
        if done.returncode == 0 and command[0] == "rm":
            return
