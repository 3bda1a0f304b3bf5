"""Source `code`: git checkouts and archives, file by file, without generated and vendored files; languages by file name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar

from bessemer.data.sources.io.archives import Entry
from bessemer.data.sources.io.file_source import SettingsFormat, parse_json
from bessemer.data.sources.registry import CodeSource
from bessemer.data.sources.source import Document, PositionedDocument, Tally, encodable, stated_license

_SUFFIXES = {
    "Ada": "adb ads",
    "Assembly": "asm s",
    "Astro": "astro",
    "Awk": "awk",
    "Batchfile": "bat cmd",
    "C": "c h",
    "C#": "cs",
    "C++": "cc cpp cxx hh hpp hxx ipp tpp inl",
    "CMake": "cmake",
    "COBOL": "cob cbl",
    "CSS": "css",
    "CUDA": "cu cuh",
    "Clojure": "clj cljs cljc",
    "CoffeeScript": "coffee",
    "Common Lisp": "lisp cl",
    "Coq": "coq",
    "Crystal": "cr",
    "Cython": "pyx pxd",
    "D": "d",
    "Dart": "dart",
    "Elixir": "ex exs",
    "Elm": "elm",
    "Emacs Lisp": "el",
    "Erlang": "erl hrl",
    "F#": "fs fsx fsi",
    "Fortran": "f f90 f95 f03 f08 for",
    "GLSL": "glsl vert frag comp geom",
    "Go": "go",
    "GraphQL": "graphql gql",
    "Groovy": "groovy gradle",
    "HCL": "tf hcl",
    "HTML": "html htm",
    "Haskell": "hs lhs",
    "Idris": "idr",
    "Java": "java",
    "JavaScript": "js mjs cjs jsx",
    "Julia": "jl",
    "Jupyter Notebook": "ipynb",
    "Kotlin": "kt kts",
    "Lean": "lean",
    "Less": "less",
    "Lua": "lua",
    "MATLAB": "m",
    "Makefile": "mk mak",
    "Markdown": "md markdown",
    "Meson": "",
    "Nim": "nim",
    "Nix": "nix",
    "OCaml": "ml mli",
    "Objective-C++": "mm",
    "OpenCL": "opencl",
    "PHP": "php",
    "Pascal": "pas pp dpr",
    "Perl": "pl pm",
    "PowerShell": "ps1 psm1 psd1",
    "Prolog": "pro",
    "Protocol Buffer": "proto",
    "PureScript": "purs",
    "Python": "py pyi pyw",
    "R": "r",
    "Racket": "rkt",
    "reStructuredText": "rst",
    "Ruby": "rb rake gemspec",
    "Rust": "rs",
    "SCSS": "scss",
    "SQL": "sql",
    "Sass": "sass",
    "Scala": "scala sc",
    "Scheme": "scm ss",
    "Shell": "sh bash zsh fish ksh",
    "Solidity": "sol",
    "Stan": "stan",
    "Starlark": "bzl",
    "Svelte": "svelte",
    "Swift": "swift",
    "SystemVerilog": "sv svh",
    "TOML": "toml",
    "Tcl": "tcl",
    "Thrift": "thrift",
    "TypeScript": "ts tsx mts cts",
    "VHDL": "vhd vhdl",
    "Verilog": "v vh",
    "Vim Script": "vim",
    "Visual Basic": "vb bas",
    "Vue": "vue",
    "WebAssembly": "wat",
    "YAML": "yaml yml",
    "Zig": "zig",
}
_NAMES = {
    "Dockerfile": "Dockerfile",
    "Containerfile": "Dockerfile",
    "Makefile": "Makefile",
    "GNUmakefile": "Makefile",
    "makefile": "Makefile",
    "CMakeLists.txt": "CMake",
    "meson.build": "Meson",
    "Rakefile": "Ruby",
    "Gemfile": "Ruby",
    "Vagrantfile": "Ruby",
    "Jenkinsfile": "Groovy",
    "BUILD": "Starlark",
    "BUILD.bazel": "Starlark",
    "WORKSPACE": "Starlark",
    "Justfile": "Just",
    "justfile": "Just",
    ".bashrc": "Shell",
    ".vimrc": "Vim Script",
}
_BY_SUFFIX = {f".{suffix}": language for language, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
LANGUAGES = tuple(sorted({*_SUFFIXES, *_NAMES.values()}))


def language_of(name: str) -> str | None:
    """The language that a file is written in, by its name; None where the name does not tell."""
    file = PurePosixPath(name)
    return _NAMES.get(file.name) or _BY_SUFFIX.get(file.suffix.lower())


_VENDORED = frozenset(
    {"node_modules", "bower_components", "vendor", "_vendor", "vendored", "_vendored", "third_party", "thirdparty", "3rdparty"}
    | {"external", "externals", "extern", "site-packages", "Pods", "Carthage", "jspm_packages"}
)
_WORKING = frozenset(
    {".git", ".hg", ".svn", ".tox", ".venv", "venv", "__pycache__", ".mypy_cache", ".pytest_cache", ".idea", ".eggs", ".cargo"}
)
_GENERATED_NAMES = re.compile(
    r".*(?:\.min\.(?:js|css|mjs)|[-.]bundle\.js|_pb2(?:_grpc)?\.pyi?|\.pb\.(?:go|cc|h)|\.pb\.gw\.go|_generated\.\w+|\.g\.dart"
    r"|\.freezed\.dart|\.designer\.cs|\.generated\.\w+|-lock\.(?:json|yaml)|\.lock|zz_generated.*\.go|_string\.go"
    r"|pnpm-lock\.yaml|versioneer\.py|\.snap)",
    re.I,
)
#: What generators write at the head of what they make, in lower case. That something "is generated from" something else
#: is also said in good prose, so the words count at the beginning of a comment, or beside a warning.
_COMMENT_BEGINS = rb"(?:^|\n)[ \t]*(?:#|//|/\*|\*|--|;|%|<!--|!|\"\"\")[ \t#*/;%-]*"
_GENERATED_HEADS = re.compile(
    rb"generated\b.{0,200}?\bdo not (?:edit|modify|change)|do not (?:edit|modify|change).{0,200}?generated|@generated\b"
    rb"|" + _COMMENT_BEGINS + rb"(?:this|the) (?:\w+ ){0,2}?(?:is|was|has been) (?:auto[- ]?(?:matically[- ])?)?generated\b"
    rb"|" + _COMMENT_BEGINS + rb"(?:file |code |auto[- ]?(?:matically[- ])?)?generated (?:by|from|with|using|on|at)\b"
    rb"|generated by (?:the protocol buffer|protoc|swig|bison|flex|cython|autoconf|cmake|antlr|thrift)",
    re.S,
)
_HEAD_BYTES = 1500
_LONGEST_LINE, _LONGEST_MEAN_LINE = 10_000, 250
#: Languages whose long lines are prose or values, not machine's work.
_PROSE = frozenset({"Markdown", "reStructuredText", "HTML", "Jupyter Notebook"})


@dataclass(frozen=True)
class Code(SettingsFormat):
    """One document a file. `languages` empty reads all that are known by their names."""

    settings: CodeSource
    known: ClassVar[str] = "files of known programming languages"
    small: ClassVar[bool] = True

    def reads(self, name: str) -> bool:
        language = language_of(name)
        wanted = language is not None and (not self.settings.languages or language in self.settings.languages)
        return wanted and not _WORKING.intersection(PurePosixPath(name).parts)

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        if start:
            return
        if kind := "links" if entry.is_link else _kind_by_name(entry.name):
            tally.counts[kind] += 1
            return
        # `__init__.py` and the like: nothing to name
        if entry.size_bytes == 0:
            tally.counts["empty_files"] += 1
            return
        data = entry.content(self.settings.max_document_bytes, tally)
        if data is None:
            return
        language = language_of(entry.name)
        assert language is not None, "only files of known languages are read"
        if kind := _kind_by_content(data, language):
            tally.counts[kind] += 1
            return
        try:
            text = _text(data, language)
        except ValueError as error:
            tally.set_aside("bad_records", entry.place, str(error))
            return
        license = stated_license(data[:_HEAD_BYTES]) or entry.license_nearby()
        if license is None:
            tally.counts["files_without_license"] += 1
        metadata = {"file": entry.name, "programming_language": language}
        yield 1, Document(entry.name, text, license=license, group=repository_of(entry), metadata=metadata)


open_code = Code.open


def _kind_by_name(name: str) -> str | None:
    *folders, file = name.split("/")
    if _VENDORED.intersection(folders):
        return "vendored_files"
    return "generated_files" if _GENERATED_NAMES.fullmatch(file) else None


def _kind_by_content(data: bytes, language: str) -> str | None:
    """What a file is that is left out: binary, generated or minified; None for one that a person wrote."""
    if b"\0" in data[:8192]:
        return "binary_files"
    if language not in _PROSE:
        head = data[:_HEAD_BYTES].lower()
        if b"generated" in head and _GENERATED_HEADS.search(head):
            return "generated_files"
        lines = data.split(b"\n")
        if max(map(len, lines)) > _LONGEST_LINE or len(data) / len(lines) > _LONGEST_MEAN_LINE:
            return "minified_files"
    return None


def _text(data: bytes, language: str) -> str:
    """A file's text; of a notebook its cells, prose as comments."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _notebook_text(parse_json(text)) if language == "Jupyter Notebook" else text.strip("\n")


def _notebook_text(notebook: Any) -> str:
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list):
        raise ValueError("a notebook without cells")
    texts = []
    for cell in cells:
        source = cell.get("source", "") if isinstance(cell, dict) else ""
        text = "".join(map(str, source)) if isinstance(source, list) else str(source)
        if text.strip():
            is_code = cell.get("cell_type") == "code"
            texts.append(text.rstrip() if is_code else "\n".join(f"# {line}".rstrip() for line in text.rstrip().split("\n")))
    return encodable("\n\n".join(texts))


def repository_of(entry: Entry) -> str:
    """What a file's split is decided by: its archive, the checkout in which it lies, or its topmost folder."""
    if entry.path is None:
        return entry.around.archive
    known = entry.around.checkouts
    for above in range(entry.name.count("/") + 1):
        folder = entry.path.parents[above]
        if folder not in known:
            known[folder] = (folder / ".git").exists()
        if known[folder]:
            return "/".join(entry.name.split("/")[: entry.name.count("/") - above]) or folder.name
    return entry.name.split("/")[0]
