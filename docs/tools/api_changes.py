"""What of the stable Python API broke since a tag, by griffe: `python docs/tools/api_changes.py [TAG]`, without one the last.

Stable are the names of `bessemer.__all__`, wherever they are loaded from, and those that plugins implement (`PLUGIN_NAMES`). A
name that is gone, a parameter that is gone, moved, or newly required, a default that changed, a method that is gone: each is a
line, and the exit code is 1.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import griffe

ROOT = Path(__file__).resolve().parents[2]
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
#: What other packages implement and register.
PLUGIN_NAMES = {
    "Plugin": "bessemer.core.registry",
    "Registry": "bessemer.core.registry",
    "StageSpec": "bessemer.core.stage",
}


def last_tag(root: Path = ROOT) -> str | None:
    """The newest release that the checkout comes after; None without one."""
    command = ["git", "-C", str(root), "describe", "--tags", "--abbrev=0", "--match", "v[0-9]*"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def stable_names(root: Path) -> dict[str, str]:
    """Each stable name, and the module that it is loaded from, as the sources of a checkout say."""
    tree = ast.parse((root / "src" / "bessemer" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_PUBLIC":
            public: Mapping[str, tuple[str, str]] = ast.literal_eval(node.value)
            return {name: module for name, (module, _) in public.items()} | PLUGIN_NAMES
    raise ValueError(f"{root}: no _PUBLIC in bessemer/__init__.py")


def breaking(root: Path, tag: str) -> list[str]:
    """A line for each change since the tag that breaks somebody's program."""
    import griffe

    with sources_of(root, tag) as before:
        old, new = stable_api(before), stable_api(root)
        found = [one.explain(griffe.ExplanationStyle.ONE_LINE) for one in griffe.find_breaking_changes(old, new)]
    return sorted({_COLOUR.sub("", line).replace(f"{before}/", "").replace(f"{root}/", "") for line in found})


@contextmanager
def sources_of(root: Path, tag: str) -> Iterator[Path]:
    """The sources at a tag, in a folder of their own."""
    with TemporaryDirectory() as folder:
        packed = Path(folder) / "a.tar"
        subprocess.run(["git", "-C", str(root), "archive", "--output", str(packed), tag, "src"], check=True)
        subprocess.run(["tar", "-xf", str(packed), "-C", folder], check=True)
        yield Path(folder)


def stable_api(root: Path) -> griffe.Module:
    """A module that holds the stable names alone."""
    import griffe

    loader = griffe.GriffeLoader(search_paths=[root / "src"], allow_inspection=False)
    package = loader.load("bessemer", try_relative_path=False)
    api = griffe.Module("bessemer", filepath=root / "src" / "bessemer" / "__init__.py")
    names = stable_names(root)
    api.exports = list(names)
    for name, module in names.items():
        found = package[f"{module}.{name}".partition(".")[2]]
        # a name may be imported into the module that it is loaded from
        if found.is_alias:
            found = found.final_target
        api.set_member(name, griffe.Alias(name, target=found))
    return api


def main() -> int:
    """Print what broke."""
    tag = sys.argv[1] if len(sys.argv) > 1 else last_tag()
    if tag is None:
        print("no tag to compare with")
        return 0
    lines = breaking(ROOT, tag)
    print(*lines or [f"nothing of the stable API broke since {tag}"], sep="\n")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
