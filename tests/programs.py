"""Programs that a test puts on the path."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def write_python_program(path: Path, code: str) -> None:
    """A program that runs Python code, beside it. Its first line is the shell's: it cannot name an interpreter whose path has
    spaces."""
    source = path.with_name(f"{path.name}.py")
    source.write_text(code, encoding="utf-8")
    path.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(source)])} "$@"\n', encoding="utf-8")
    path.chmod(0o755)
