"""Pages that are run: their files are written, their commands and their Python executed, from top to bottom.

A block of `yaml title="NAME"` is a file. Of a `console` block the lines behind `$ ` are commands, of a `sh` block all lines. A
`python` block is executed; all of a page share one namespace. A block below a comment `<!-- not run: REASON -->` is left out,
and so is one below `<!-- needs: WHAT -->` where that is not there: in tests it never is, `tests/follow.py` has some of it.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import bessemer

_BLOCK = re.compile(
    r"(?:^<!-- (not run|needs): ([^>]*?) -->\n+)?^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```", re.DOTALL | re.MULTILINE
)


class Block(NamedTuple):
    """A block of code of a page: its language, the file that it is, its text, the line where that begins, and its mark."""

    language: str
    title: str | None
    text: str
    line: int = 0
    mark: str | None = None
    reason: str = ""


def marked_blocks(page: Path) -> Iterator[Block]:
    """All blocks of a page. mark: `not run` or `needs`, with its reason; None where there is no such comment above it."""
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start(5)) + 1
        yield Block(found[3], found[4], found[5], line, found[1], found[2] or "")


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page that are run anywhere."""
    return (block for block in marked_blocks(page) if block.mark is None)


def commands(block: Block) -> list[str]:
    """The commands of a block of shell, lines that end in a backslash joined, without comments behind them."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [command for line in lines if (command := re.sub(r"(?:^|\s+)#\s.*", "", line).strip())]


def follow_page(page: Path, capsys: pytest.CaptureFixture[str], replace: dict[str, str] | None = None) -> None:
    """Do in the current folder what a page says. replace: words of the page that are others here, such as a port."""
    namespace: dict[str, object] = {"__name__": "__docs__"}
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for block in blocks(page):
            for old, new in (replace or {}).items():
                block = block._replace(text=block.text.replace(old, new))
            if block.title is not None:
                Path(block.title).parent.mkdir(parents=True, exist_ok=True)
                Path(block.title).write_text(block.text, encoding="utf-8")
            elif block.language == "python":
                exec(compile(block.text, page.name, "exec"), namespace)
            elif block.language in ("console", "sh"):
                for command in commands(block):
                    _run(command, capsys, servers)
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def _run(command: str, capsys: pytest.CaptureFixture[str], servers: list[subprocess.Popen[bytes]]) -> None:
    """A plain `bessemer` command in this process, which has loaded what it needs; anything else by the shell."""
    if command.endswith("&"):
        servers.append(_serve(shlex.split(command.removesuffix("&"))))
    elif command.startswith("bessemer ") and not re.search(r" [|<>&] ?", command):
        from bessemer.cli.main import main

        with pytest.raises(SystemExit) as stop:
            main(shlex.split(command)[1:])
        assert not stop.value.code, f"{command}\n{capsys.readouterr().err}"
    else:
        command = re.sub(r"\bbessemer ", f"{shlex.quote(sys.executable)} -m bessemer ", command)
        done = subprocess.run(command, shell=True, capture_output=True, encoding="utf-8", env=_environment(), check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def _serve(words: list[str]) -> subprocess.Popen[bytes]:
    server = subprocess.Popen([sys.executable, "-m", *words], env=_environment(), stdout=subprocess.DEVNULL)
    port = int(words[words.index("--port") + 1])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server
        assert server.poll() is None, f"{shlex.join(words)} ended"
        time.sleep(0.1)
    raise AssertionError(f"{shlex.join(words)} does not listen")


def _environment() -> dict[str, str]:
    source = str(Path(bessemer.__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])}


def free_port() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
