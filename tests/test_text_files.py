"""Text is read and written as UTF-8, whatever the system's own encoding is: every call says so."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_LIKELY = re.compile(r"read_text|write_text|open\(|subprocess|TextIOWrapper")
#: Writes to `core.object_storage.Place`, which is UTF-8 by itself.
_OWN = {("core/store.py", "path.write_text(text)")}


def without_encoding(source: str) -> Iterator[ast.Call]:
    """Calls that read or write text in the system's encoding, as far as they can be told by how they are written."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        match node.func:
            case ast.Attribute(attr="read_text") if not node.args:
                yield node
            case ast.Attribute(attr="write_text") if len(node.args) == 1:
                yield node
            case ast.Name(id="open") if len(node.args) < 4:
                if "b" not in _mode(keywords.get("mode", node.args[1] if len(node.args) > 1 else None), "r"):
                    yield node
            case ast.Attribute(attr="open", value=ast.Name(id="tarfile" | "zipfile")):
                # bytes in either mode
                continue
            case ast.Attribute(attr="open"):
                mode = _mode(keywords.get("mode", node.args[0] if node.args else None), "")
                if mode and set(mode) <= set("rwaxt+"):
                    yield node
            case ast.Attribute(attr="run" | "Popen" | "check_output", value=ast.Name(id="subprocess")):
                if {"text", "universal_newlines"} & keywords.keys():
                    yield node
            case ast.Attribute(attr="TextIOWrapper") if len(node.args) < 2:
                yield node


def _mode(node: ast.expr | None, otherwise: str) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else otherwise


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("path.read_text()", True),
        ("path.read_text(encoding='utf-8')", False),
        ("path.write_text(json.dumps(value))", True),
        ("open(name)", True),
        ("open(name, 'rb')", False),
        ("path.open('a')", True),
        ("path.open('wb')", False),
        ("tarfile.open(path)", False),
        ("tarfile.open(fileobj=stream, mode='w')", False),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command)", False),
        ("subprocess.run(command, encoding='utf-8')", False),
        ("io.TextIOWrapper(stream)", True),
        ("io.TextIOWrapper(stream, 'utf-8')", False),
    ],
)
def test_calls_without_an_encoding_are_found(source, found):
    assert bool(list(without_encoding(source))) == found


@pytest.mark.parametrize("folder", ["src/bessemer", "tests", "benchmarks", "docs", "examples", "kernels", "requirements"])
def test_text_is_read_and_written_as_utf_8(folder):
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        short, source = path.relative_to(ROOT / folder).as_posix(), path.read_text(encoding="utf-8")
        if _LIKELY.search(source):
            calls = (ast.unparse(call) for call in without_encoding(source))
            found += [f"{path}: {call}" for call in calls if (short, call) not in _OWN]
    assert found == []
