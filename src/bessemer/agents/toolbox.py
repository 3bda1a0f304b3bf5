"""Tools of an agent: Python in the sandbox, files of one folder, documents of an index, pages of the web.

Files are read and written below one folder, links that lead out of it included in what is refused. Appending notes the file's
length before, so that a killed call is finished or found done: every effect of these tools happens once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer.agents.loop import AgentTool
from bessemer.assistant.tools import Tool, ToolResult, failed
from bessemer.core.errors import ArtefactError, ConfigError, RequestError, as_storage_error, ending_of_process
from bessemer.core.hashing import hash_bytes
from bessemer.core.sandbox import Limits, Result, Sandbox
from bessemer.core.store import write_text

if TYPE_CHECKING:
    from bessemer.retrieval.index import OpenIndex

#: Names of tools that `bessemer agent --tools` takes.
KINDS = ("python", "files", "search", "fetch")
_LARGEST_FILE = 10 << 20
_MOST_ENTRIES = 1_000


def _schema(required: tuple[str, ...] = (), **properties: Mapping[str, Any]) -> dict[str, Any]:
    names = list(required or properties)
    return {"type": "object", "properties": dict(properties), "required": names, "additionalProperties": False}


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


# ------------------------------------------------------------------------------------------------------------ Python


def python_tool(sandbox: Sandbox) -> AgentTool:
    """A tool that runs Python in the sandbox: no network, no files but its own, which are gone afterwards, so it is
    repeatable."""

    def run(code: str) -> ToolResult:
        return printed(sandbox.run(code))

    description = (
        "Run a Python program and read what it prints. Each run starts in an empty folder, without network; print what you "
        "want to know."
    )
    seconds = sandbox.limits.seconds
    return AgentTool(
        Tool("python", description, _schema(code=_text("the whole program")), run, time_limit=seconds + 20), is_repeatable=True
    )


def printed(result: Result) -> ToolResult:
    """What a program printed; of one that failed also its errors and how it ended."""
    parts = [result.stdout.rstrip("\n")]
    if not result.ok:
        ending = f"the limit on {result.limit}" if result.limit else ending_of_process(result.exit_code or 1)
        parts += [result.stderr.rstrip("\n"), f"[ended by {ending}]"]
    return ToolResult("\n".join(part for part in parts if part) or "(it printed nothing)", is_error=not result.ok)


def open_sandbox(seconds: float = 20.0) -> Sandbox:
    """The sandbox of an agent's programs. Raises SandboxError where this machine offers none that is strong enough."""
    return Sandbox(Limits(seconds=seconds, cpu_seconds=seconds))


# ------------------------------------------------------------------------------------------------------------- files


class Folder:
    """The one folder whose files an agent reads and writes."""

    def __init__(self, root: Path) -> None:
        """Raises ArtefactError where there is no such folder."""
        if not root.is_dir():
            raise ArtefactError(f"{root}: there is no such folder")
        self.root = root.resolve()

    def place(self, name: str) -> Path:
        """The file of a name. Raises RequestError for one outside the folder, also by a link."""
        if "\0" in name:
            raise RequestError("a name has no NUL")
        path = (self.root / name).resolve()
        if path != self.root and self.root not in path.parents:
            raise RequestError(f"{name!r} lies outside the folder, whose files alone may be used")
        return path

    def list_files(self, folder: str = ".") -> str:
        """The files below a folder, a line each, with their sizes in bytes."""
        place = self.place(folder)
        if not place.is_dir():
            raise RequestError(f"there is no folder {folder!r}")
        lines = []
        for current, folders, names in os.walk(place):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = Path(current) / name
                if self.root not in path.resolve().parents:
                    # a link that leads out
                    continue
                lines.append(f"{path.relative_to(self.root).as_posix()} ({path.lstat().st_size:,} bytes)")
                if len(lines) > _MOST_ENTRIES:
                    return "\n".join([*lines[:_MOST_ENTRIES], "… and more"])
        return "\n".join(lines) or "(no files)"

    def read_file(self, name: str) -> str:
        """A file as text."""
        return self._content(name).decode("utf-8", "replace")

    def write_file(self, name: str, text: str) -> str:
        """Replace a file, whole or not at all."""
        place = self.place(name)
        if place.is_dir():
            raise RequestError(f"{name!r} is a folder")
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, _encodable(text))
        return f"wrote {len(text):,} characters to {name}"

    def edit_file(self, name: str, old: str, new: str) -> str:
        """Replace the one occurrence of a text in a file."""
        text = self.read_file(name)
        if (count := text.count(old) if old else 0) != 1:
            raise RequestError(f"{name!r} holds the old text {count} times; give a text that it holds once")
        write_text(self.place(name), _encodable(text.replace(old, new)))
        return f"changed {name}"

    def append_file(self, name: str, text: str) -> str:
        """Add a text to a file, which is made if need be."""
        place = self.place(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("ab") as file:
            file.write(_encodable(text).encode())
            file.flush()
            os.fsync(file.fileno())
        return f"added {len(text):,} characters to {name}"

    def _content(self, name: str) -> bytes:
        place = self.place(name)
        if not place.is_file():
            raise RequestError(f"there is no file {name!r}")
        if (size := place.stat().st_size) > _LARGEST_FILE:
            raise RequestError(f"{name!r} has {size:,} bytes, and at most {_LARGEST_FILE:,} are read")
        return place.read_bytes()

    # -- after a kill

    def _size(self, arguments: Mapping[str, Any]) -> int:
        place = self.place(arguments["name"])
        return place.stat().st_size if place.is_file() else 0

    def _appended(self, arguments: Mapping[str, Any], size: int | None) -> ToolResult | None:
        """Whether a text was added to a file that had `size` bytes. One that was added in part is taken away again."""
        added = _encodable(arguments["text"]).encode()
        place = self.place(arguments["name"])
        if size is None or not place.is_file() or (now := place.stat().st_size) <= size:
            return None
        with place.open("r+b") as file:
            file.seek(size)
            tail = file.read(len(added))
            if tail == added:
                return ToolResult(f"added {len(arguments['text']):,} characters to {arguments['name']}")
            if now < size + len(added) and added.startswith(tail):
                file.truncate(size)
                return None
        return failed(f"{arguments['name']} was changed by somebody else meanwhile; look at it before you add anything")

    def _before_edit(self, arguments: Mapping[str, Any]) -> str:
        return hash_bytes(self._content(arguments["name"]))

    def _edited(self, arguments: Mapping[str, Any], before: str | None) -> ToolResult | None:
        """Whether a file is another one than before an edit."""
        try:
            if before is None or hash_bytes(self._content(arguments["name"])) == before:
                return None
        except RequestError:
            return None
        return ToolResult(f"changed {arguments['name']}")

    def tools(self) -> list[AgentTool]:
        """The tools of the folder. Listing, reading and replacing are repeatable; adding and editing notice what was done."""
        name = _text("path of the file within the folder")
        return [
            AgentTool(
                Tool(
                    "list_files",
                    "List the files of the folder.",
                    {"type": "object", "properties": {"folder": _text("a folder within it")}, "additionalProperties": False},
                    _checked(self.list_files),
                ),
                is_repeatable=True,
            ),
            AgentTool(Tool("read_file", "Read a file.", _schema(name=name), _checked(self.read_file)), is_repeatable=True),
            AgentTool(
                Tool(
                    "write_file",
                    "Write a file, in place of what it held.",
                    _schema(name=name, text=_text("all that it holds")),
                    _checked(self.write_file),
                ),
                is_repeatable=True,
            ),
            AgentTool(
                Tool(
                    "edit_file",
                    "Replace a text that a file holds once.",
                    _schema(name=name, old=_text("the text to replace"), new=_text("the text in its place")),
                    _checked(self.edit_file),
                ),
                note=self._before_edit,
                recover=self._edited,
            ),
            AgentTool(
                Tool(
                    "append_file",
                    "Add a text at the end of a file.",
                    _schema(name=name, text=_text("what is added")),
                    _checked(self.append_file),
                ),
                note=self._size,
                recover=self._appended,
            ),
        ]


def _checked(function: Any) -> Any:
    """The function with its errors of files and its refusals as failed results."""

    def call(**arguments: Any) -> ToolResult | str:
        try:
            return function(**arguments)
        except RequestError as error:
            return failed(str(error))
        except OSError as error:
            return failed(str(as_storage_error(error) or error.strerror or error))

    return call


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


# --------------------------------------------------------------------------------------------------------- documents


def search_tool(index: OpenIndex, name: str = "search") -> AgentTool:
    """A tool that finds passages in an index."""
    from bessemer.retrieval.search import search

    def find(query: str, count: int = 5) -> str:
        hits = search(index, query, count)
        return "\n\n".join(f"[{hit.passage.document}]\n{hit.passage.shown}" for hit in hits) or "(nothing was found)"

    schema = _schema(
        ("query",),
        query=_text("what to look for"),
        count={"type": "integer", "minimum": 1, "maximum": 20, "description": "how many passages"},
    )
    return AgentTool(Tool(name, "Find passages in the user's documents.", schema, _checked(find)), is_repeatable=True)


# --------------------------------------------------------------------------------------------------------------- web


def fetch_tool(user_agent: str, *, allow_private: bool = False, delay_seconds: float = 1.0) -> AgentTool:
    """A tool that reads a page under the collector's rules: robots.txt, a pause between visits of a host, limits on time and
    size, public addresses alone. user_agent: as sites are told; its first word is looked for in robots.txt."""
    from bessemer.data.sources.io.fetch import FetchError, Politeness, fetch
    from bessemer.data.sources.io.fetch import Limits as FetchLimits

    limits = FetchLimits(user_agent, seconds=20.0, max_bytes=5 << 20, retries=1, allow_private=allow_private)
    politeness = Politeness(limits, delay_seconds)

    def read(url: str) -> ToolResult:
        try:
            response = fetch(url, limits, may_visit=politeness.may_visit)
        except FetchError as error:
            return failed(f"{url}: {error}")
        return ToolResult(_page_text(response.body, response.header("Content-Type") or "", response.url))

    description = "Read a page of the web as text. robots.txt is obeyed."
    return AgentTool(
        Tool("fetch", description, _schema(url=_text("address of the page")), read, time_limit=60.0), is_repeatable=True
    )


def _page_text(body: bytes, content_type: str, url: str) -> str:
    if "html" not in content_type.lower():
        if b"\0" in body[:1000]:
            return f"({content_type or 'not text'}, {len(body):,} bytes)"
        return body.decode("utf-8", "replace")
    from bessemer.data.extraction.extract import extract

    return extract(body, url=url) or "(the page has no main text)"


def check_kinds(kinds: list[str], *, has_folder: bool, has_index: bool) -> None:
    """Raises ConfigError for a kind of tool that is none, or lacks its folder or index."""
    for kind in kinds:
        if kind not in KINDS:
            from bessemer.core.config import nearest

            raise ConfigError(f"--tools: there is no {kind!r}{nearest(kind, list(KINDS))}")
    if "files" in kinds and not has_folder:
        raise ConfigError("--tools files: name the folder with --files FOLDER")
    if "search" in kinds and not has_index:
        raise ConfigError("--tools search: name the index with --index FOLDER")
