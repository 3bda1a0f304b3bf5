"""Docstrings as documents, one each, and the source `python_docs`: those of the running interpreter's standard library.

They are found by parsing Python source, never by importing it. Their bytes are the same under every Python version that can
parse the file: signatures are cut from the source text (`ast.unparse` prints values differently between versions) and
docstrings are dedented here.
"""

from __future__ import annotations

import ast
import gc
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.hashing import hash_file, hash_value
from bessemer.core.progress import Progress
from bessemer.data.sources.registry import PythonDocsSource
from bessemer.data.sources.source import Document, PositionedDocument, Tally, Unit, counted, encodable

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

_LONGEST_DEFAULT = 40
_TEST_FOLDERS = {"test", "tests", "_test", "_tests", "testdata", "test_data"}
_VENDORED_FOLDERS = {"vendor", "_vendor", "vendored", "_vendored", "extern", "externals", "third_party", "_third_party"}
_OTHER_FOLDERS = {"locale", "site-packages", "__pycache__", "idlelib", "lib2to3", "ensurepip", "turtledemo", "pydoc_data"}
_SKIPPED_FOLDERS = frozenset(_TEST_FOLDERS | _VENDORED_FOLDERS | _OTHER_FOLDERS)
_SKIPPED_FILES = re.compile(r"(test_.*|.*_test|conftest|.*_pb2|.*_pb2_grpc|_version)\.py")


@dataclass(frozen=True, slots=True)
class Docstring:
    """A docstring and what it describes."""

    # module, class, function or method
    kind: str
    module: str
    # empty for a module
    qualname: str
    # `read(path, *, encoding='utf-8')`; None where nothing is called
    signature: str | None
    text: str
    #: Tells apart definitions that share a name in one file: "", then "2", "3", …
    ordinal: str

    @property
    def heading(self) -> str:
        """The line above the text: the full name, with its parameters where it has any."""
        full_name = f"{self.module}.{self.qualname}" if self.qualname else self.module
        parameters = self.signature[self.signature.index("(") :] if self.signature else ""
        prefix = f"{self.kind} " if self.kind in ("module", "class") else ""
        return f"{prefix}{full_name}{parameters}"

    def document(self, file: str, common: dict[str, str], **fields: Any) -> Document:
        """The document of this docstring; `file` is its file's stable name within the source."""
        described = {"kind": self.kind, "module": self.module, "qualname": self.qualname}
        if self.signature:
            described["signature"] = self.signature
        place = f"{file}#{self.qualname}{self.ordinal and '@' + self.ordinal}"
        return Document(place, self.text, self.heading, metadata=common | described, **fields)


def is_documentation_code(path: str) -> bool:
    """Whether a Python file's docstrings are documentation: not tests, vendored copies, generated code or tables."""
    *folders, name = path.split("/")
    return name.endswith(".py") and not _SKIPPED_FOLDERS.intersection(folders) and not _SKIPPED_FILES.fullmatch(name)


def module_name(path: str) -> str:
    """The dotted name of a module from its file's path below the import root: `json/__init__.py` is `json`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def docstrings(source: bytes, path: str) -> Iterator[Docstring]:
    """The docstrings of a file: of the module, its classes, their methods, and its functions, in file order. What is defined
    inside a function is left out. Raises SyntaxError or ValueError when the file cannot be parsed."""
    # nearly all docstrings have triple quotes; checking saves the parse, which is the cost
    if b'"""' not in source and b"'''" not in source:
        return
    tree = _parse(source)
    # bytes: in a str it would split at form feeds too, which `ast` does not
    lines = source.splitlines(keepends=True)
    module = module_name(path)
    seen: Counter[str] = Counter()
    if text := _docstring(tree):
        yield Docstring("module", module, "", None, text, "")
    for qualname, node, in_class in _definitions(tree.body, "", False):
        seen[qualname] += 1
        if text := _docstring(node):
            kind = "class" if isinstance(node, ast.ClassDef) else "method" if in_class else "function"
            ordinal = str(seen[qualname]) if seen[qualname] > 1 else ""
            yield Docstring(kind, module, qualname, _signature(node, lines), text, ordinal)


def _parse(source: bytes) -> ast.Module:
    """The syntax tree. Python's cycle collector rests meanwhile: a tree has no cycles, and walking over its many new
    nodes again and again would be four fifths of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            # invalid escapes in other people's code
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"nested too deeply to parse ({type(error).__name__})") from None
    finally:
        if was_enabled:
            gc.enable()


def _definitions(body: list[ast.stmt], prefix: str, in_class: bool) -> Iterator[tuple[str, _Definition, bool]]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name, node, in_class
        elif isinstance(node, ast.ClassDef):
            yield prefix + node.name, node, in_class
            yield from _definitions(node.body, f"{prefix}{node.name}.", True)
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            for part in (node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])):
                yield from _definitions(part, prefix, in_class)
            for handler in getattr(node, "handlers", []):
                yield from _definitions(handler.body, prefix, in_class)


def _docstring(node: ast.Module | _Definition) -> str:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return dedent(first.value.value)
    return ""


def dedent(docstring: str) -> str:
    """A docstring without the indentation of its place in the code (PEP 257), trailing spaces and lone surrogates."""
    first, *others = [line.rstrip() for line in encodable(docstring).expandtabs().splitlines()] or [""]
    margin = min((len(line) - len(line.lstrip(" ")) for line in others if line), default=0)
    return "\n".join([first.lstrip(), *(line[margin:] for line in others)]).strip("\n")


def _signature(node: _Definition, lines: list[bytes]) -> str | None:
    """Signature of a definition as in the source, without annotations; None for a property or a class
    that defines no constructor."""
    if isinstance(node, ast.ClassDef):
        constructors = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        constructor = constructors.get("__init__") or constructors.get("__new__")
        return f"{node.name}({_parameters(constructor.args, lines, skip_first=True)})" if constructor else None
    if any(_is_property(decorator) for decorator in node.decorator_list):
        return None
    return f"{node.name}({_parameters(node.args, lines)})"


def _is_property(decorator: ast.expr) -> bool:
    name = decorator.attr if isinstance(decorator, ast.Attribute) else decorator.id if isinstance(decorator, ast.Name) else ""
    return name.endswith("property") or name in ("setter", "getter", "deleter")


def _parameters(arguments: ast.arguments, lines: list[bytes], *, skip_first: bool = False) -> str:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    written = []
    for index, (argument, default) in enumerate(zip(positional, defaults, strict=True), start=1):
        written.append(argument.arg + _default(default, lines))
        if index == len(arguments.posonlyargs):
            written.append("/")
    if skip_first:
        written = written[1:]
        written = written[1:] if written[:1] == ["/"] else written
    if arguments.vararg:
        written.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        written.append("*")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        written.append(argument.arg + _default(default, lines))
    if arguments.kwarg:
        written.append(f"**{arguments.kwarg.arg}")
    return ", ".join(written)


def _default(node: ast.expr | None, lines: list[bytes]) -> str:
    """` =value` as the source has it, on one line; `...` for what is too long to read."""
    if node is None:
        return ""
    assert node.end_lineno is not None and node.end_col_offset is not None
    taken = lines[node.lineno - 1 : node.end_lineno]
    # the end is cut first, since the first line may be the last
    taken[-1] = taken[-1][: node.end_col_offset]
    taken[0] = taken[0][node.col_offset :]
    value = " ".join(b"".join(taken).decode("utf-8", errors="replace").split())
    return f"={value if len(value) <= _LONGEST_DEFAULT else '...'}"


_LICENSE = "PSF-2.0"
_URL = "https://docs.python.org/3/library/"


def read_python_docs(tally: Tally) -> Iterator[Document]:
    """The documents of the standard library. Each top-level module is a group of its own, so that it lies in one split."""
    root = _standard_library()
    for name in _files(root):
        tally.files += 1
        top = name.split("/")[0].removesuffix(".py")
        common = {"package": f"python/{top}", "version": platform.python_version()}
        try:
            source = (root / name).read_bytes()
            tally.bytes += len(source)
            for docstring in docstrings(source, name):
                yield docstring.document(name, common, url=_URL, license=_LICENSE, group=common["package"])
        except (SyntaxError, ValueError) as error:
            tally.counts["unparseable_files"] += 1
            tally.notes.append(f"standard library: {name}: {error}")


@dataclass(frozen=True)
class PythonDocs:
    """The standard library's documents, as one unit."""

    def units(self, progress: Progress | None = None) -> list[Unit]:
        return [Unit("standard library", 0)]

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        yield from counted(read_python_docs, start, tally)

    def fingerprint(self) -> Any:
        return python_docs_fingerprint()


def open_python_docs(settings: PythonDocsSource, folder: Path, cache: Path) -> PythonDocs:
    """The source `python_docs`, which has no settings."""
    return PythonDocs()


def python_docs_fingerprint() -> dict[str, Any]:
    """Fingerprint of the standard library: the interpreter's version and a hash of the files that would be read."""
    root = _standard_library()
    return {"python": platform.python_version(), "files": hash_value([[name, hash_file(root / name)] for name in _files(root)])}


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _files(root: Path) -> list[str]:
    names = (path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return sorted(name for name in names if is_documentation_code(name))
