"""Imports between the package's files: no circle, not even of imports in functions or for annotations."""

from __future__ import annotations

import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"
IMPORT = re.compile(r"^\s*(?:from (bessemer[\w.]*) import (?:\(([^)]*)\)|(.*))|import (bessemer[\w.]*))", re.MULTILINE)


def imported(text):
    """The modules that a file may import, anywhere in it."""
    for module, several, one, whole in IMPORT.findall(text):
        yield module or whole
        yield from (f"{module}.{name.split()[0]}" for name in (several or one).split(",") if name.strip())


def test_no_file_imports_one_that_imports_it():
    files = {}
    for path in SRC.rglob("*.py"):
        files[".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")] = path.read_text(
            encoding="utf-8"
        )
    graph = {}
    for name, text in files.items():
        modules = {one for one in imported(text) if one in files and one != name}
        # a package's own face is not what is meant where one of its modules is
        graph[name] = {one for one in modules if not any(other.startswith(f"{one}.") for other in modules)}
    assert sum(map(len, graph.values())) > len(files)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {' → '.join(error.args[1])}") from None
