"""Sources of documentation: `wheels` (inside pinned packages) and `docs` (Markdown, reStructuredText, built HTML).

Wheels are read from their zip, never installed, never imported. A lock is a requirements file in which each line pins a
package and the hashes of its wheel, so that the same files, byte for byte, are read on every machine. pip downloads them.
"""

from __future__ import annotations

import email.message
import email.parser
import email.policy
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from bessemer.core.config import nearest
from bessemer.core.environment import has_pip
from bessemer.core.errors import ConfigError, SourceError, as_storage_error
from bessemer.core.hashing import hash_file
from bessemer.core.progress import Progress, Silent
from bessemer.data.sources.code import repository_of
from bessemer.data.sources.html import PageFormat
from bessemer.data.sources.io.archives import Entry
from bessemer.data.sources.python_docs import docstrings, is_documentation_code
from bessemer.data.sources.registry import DocsSource, WheelsSource
from bessemer.data.sources.source import Document, PositionedDocument, Tally, Unit, counted

_SHIPPED = Path(__file__).parents[1] / "locks"
_PINNED = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[^\s;]+)(?P<hashes>(\s+--hash=sha256:[0-9a-f]{64})+)")


class DownloadError(SourceError):
    """A wheel that is not in the cache and could not be fetched."""


@dataclass(frozen=True)
class Pin:
    """One package of a lock: exactly this version, and a file with one of these hashes."""

    name: str
    version: str
    sha256: frozenset[str]

    @property
    def requirement(self) -> str:
        """The line that pip reads."""
        return " ".join([f"{self.name}=={self.version}", *(f"--hash=sha256:{digest}" for digest in sorted(self.sha256))])

    @property
    def file_prefix(self) -> str:
        """The beginning of the wheel's file name, in the normal form of names."""
        return f"{_normal(self.name)}-{self.version}-"


def lock_path(lock: str, folder: Path) -> Path:
    """The file of a lock: the name of one that ships with the package, or a path relative to `folder`. Raises ConfigError when
    there is neither."""
    shipped = {path.stem: path for path in _SHIPPED.glob("*.lock")}
    if lock in shipped:
        return shipped[lock]
    if (path := folder / lock).is_file():
        return path
    raise ConfigError(f"lock {lock!r}: no such file, and no lock of this name ships with bessemer{nearest(lock, [*shipped])}")


def read_lock(path: Path) -> list[Pin]:
    """The pins of a lock file, sorted by name. Raises SourceError naming the first line that is not a pin with hashes."""
    lines = re.sub(r"\\\r?\n", " ", path.read_text(encoding="utf-8")).splitlines()
    pins = []
    for line in lines:
        content = re.sub(r"(^|\s)#.*", "", line).strip()
        if not content:
            continue
        match = _PINNED.fullmatch(content)
        if match is None:
            raise SourceError(f"{path}: {content.split()[0]!r} is not pinned as NAME==VERSION --hash=sha256:…")
        pins.append(Pin(match["name"], match["version"], frozenset(re.findall(r"sha256:([0-9a-f]{64})", match["hashes"]))))
    if not pins:
        raise SourceError(f"{path}: this lock names no packages")
    return sorted(pins, key=lambda pin: _normal(pin.name))


def fetch_wheels(pins: list[Pin], cache: Path, progress: Progress | None = None) -> list[Path]:
    """The wheels of a lock, in its order, from `cache`; what is missing or damaged there is downloaded first. Raises
    DownloadError when the package index cannot be reached, or has no such file."""
    wheel_of = {pin.name: cached_wheel(pin, cache) for pin in pins}
    missing = [pin for pin in pins if wheel_of[pin.name] is None]
    if missing:
        (progress or Silent()).say(f"  downloading {len(missing)} of {len(pins)} packages with pip")
        _download(missing, cache)
        wheel_of.update({pin.name: cached_wheel(pin, cache) for pin in missing})
    wheels = [wheel_of[pin.name] for pin in pins]
    assert all(wheels), "pip reported success without every wheel"
    return [wheel for wheel in wheels if wheel is not None]


def cached_wheel(pin: Pin, cache: Path) -> Path | None:
    """The wheel of a pin in the cache, its hash checked; None when it is not there whole."""
    for path in sorted(cache.glob("*.whl")):
        if _normal(path.name).startswith(pin.file_prefix) and _sha256(path) in pin.sha256:
            return path
    return None


def _download(pins: list[Pin], cache: Path) -> None:
    """Fetch into a scratch folder and move in what is whole, so that a killed download leaves no half wheel."""
    if not has_pip():
        raise DownloadError("source wheels: this Python has no pip to download with; install pip, or drop the source")
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".download-", dir=cache))
    try:
        requirements = scratch / "requirements.txt"
        requirements.write_text("".join(f"{pin.requirement}\n" for pin in pins), encoding="utf-8")
        # `--platform any`: without it pip prefers a wheel built for this machine where there is one.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--platform", "any"]
        command += ["--retries", "2", "--timeout", "20"]
        done = subprocess.run(
            [*command, "--dest", str(scratch), "--requirement", str(requirements)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            if full := as_storage_error(RuntimeError(done.stderr), cache):
                raise full
            raise DownloadError(f"source wheels: pip could not download {_summary(pins)}: {_reason(done.stderr)}")
        for wheel in scratch.glob("*.whl"):
            wheel.replace(cache / wheel.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _reason(stderr: str) -> str:
    """The line of pip's complaint that says why, and what to do about it."""
    if any(sign in stderr for sign in ("NewConnectionError", "ConnectTimeout", "Name or service not known", "ProxyError")):
        return "the package index cannot be reached; check the network, or use the source python_docs"
    if "DO NOT MATCH THE HASHES" in stderr:
        return "the index serves a file with another hash than the lock's"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["pip failed without saying why"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ") and "Exception:" not in line]
    return (errors or lines)[-1]


def _summary(pins: list[Pin]) -> str:
    names = [f"{pin.name} {pin.version}" for pin in pins]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _normal(name: str) -> str:
    """A package's name in a form in which `Django`, `my.package` and `my_package` compare equal; versions keep dots."""
    head, dash, rest = name.partition("-") if name.endswith(".whl") else (name, "", "")
    return re.sub(r"[-_.]+", "_", head).lower() + dash + rest


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_PAGE_SUFFIXES = (".md", ".rst")
_NOT_PROSE = re.compile(r"licen[cs]e|copying|notice|authors|contributors|changelog|changes|history|security|codeowners", re.I)
#: A line that is only badges, images with their options, or HTML tags: the decoration of a README.
_DECORATION = re.compile(
    r"\s*(?:(?:\[?!\[[^\]]*\]\([^)]*\)(?:\]\([^)]*\))?\s*)+"
    r"|\.\. (?:image|figure|\|[^|]*\| image)::.*"
    r"|:(?:target|alt|align|width|height): .*"
    r"|(?:</?[a-z][^>]*>\s*)+)"
)
_LONGEST_LICENSE_NAME = 60


@dataclass(frozen=True)
class Wheels:
    """The wheels of a lock file, each a unit."""

    lock: Path
    cache: Path

    def units(self, progress: Progress | None = None) -> list[Unit]:
        """The wheels; raises DownloadError, too, when one that is not in the cache cannot be fetched."""
        wheels = fetch_wheels(read_lock(self.lock), self.cache, progress)
        return [Unit(wheel.name, wheel.stat().st_size, ((wheel.name, wheel),)) for wheel in wheels]

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        ((_, wheel),) = unit.files
        assert isinstance(wheel, Path), "wheels lie in the cache"
        if start == 0:
            tally.bytes += unit.size_bytes
        yield from counted(lambda met: read_wheel(wheel, met), start, tally)

    def fingerprint(self) -> Any:
        return {"lock": hash_file(self.lock)}


def open_wheels(settings: WheelsSource, folder: Path, cache: Path) -> Wheels:
    """The source `wheels` of a lock, whose downloads lie in `cache`."""
    return Wheels(lock_path(settings.lock, folder), cache)


def wheels_fingerprint(
    settings: WheelsSource, folder: Path, cache: Path, fetch: bool, progress: Progress | None = None
) -> dict[str, str | None]:
    """The hash of the lock; None for an optional source that cannot be fetched. Whether it can be decides what is collected, so
    that it is fetched here; with `fetch` false only the cache is looked at."""
    path = lock_path(settings.lock, folder)
    if settings.optional and not _available(read_lock(path), cache, fetch, progress):
        return {"lock": None}
    return {"lock": hash_file(path)}


def _available(pins: list[Pin], cache: Path, fetch: bool, progress: Progress | None) -> bool:
    if not fetch:
        return all(cached_wheel(pin, cache) for pin in pins)
    try:
        return bool(fetch_wheels(pins, cache, progress))
    except DownloadError:
        return False


def read_wheel(wheel: Path, tally: Tally) -> Iterator[Document]:
    """The documents of one wheel: docstrings, README pages, and the description in its metadata. Raises SourceError when the
    file is not a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(info.filename for info in archive.infolist() if not info.is_dir())
            metadata = _metadata(archive, names, wheel)
            package = str(metadata["Name"])
            common = {"package": package, "version": str(metadata["Version"])}
            fields: dict[str, Any] = {"url": _homepage(metadata), "license": license_of(metadata), "group": package}
            for name in filter(is_documentation_code, names):
                tally.files += 1
                try:
                    for docstring in docstrings(archive.read(name), name):
                        yield docstring.document(f"{package}/{name}", common, **fields)
                except (SyntaxError, ValueError) as error:
                    tally.counts["unparseable_files"] += 1
                    tally.notes.append(f"{wheel.name}: {name}: {error}")
            for name, page in _pages(archive, names, metadata):
                described = {"kind": "page", "module": "", "qualname": PurePosixPath(name).name}
                yield Document(f"{package}/{name}", readable_page(page), metadata=common | described, **fields)
    except (zipfile.BadZipFile, NotImplementedError, zlib.error) as error:
        raise SourceError(f"{wheel}: this is not a readable wheel ({error})") from None


def _pages(archive: zipfile.ZipFile, names: list[str], metadata: email.message.Message) -> Iterator[tuple[str, str]]:
    description = metadata.get_payload()
    if isinstance(description, str):
        yield f"{metadata['Name']}.md", description
    for name in names:
        if name.endswith(_PAGE_SUFFIXES) and is_prose_page(name):
            yield name, archive.read(name).decode("utf-8", errors="replace")


def is_prose_page(name: str) -> bool:
    """Whether a page of a package is documentation, by its name: no licence, list of changes or of authors."""
    return ".dist-info/" not in name and not _NOT_PROSE.search(name)


def _metadata(archive: zipfile.ZipFile, names: list[str], wheel: Path) -> email.message.Message:
    for name in names:
        if name.endswith(".dist-info/METADATA") and name.count("/") == 1:
            text = archive.read(name).decode("utf-8", errors="replace")
            metadata = email.parser.Parser(policy=email.policy.compat32).parsestr(text)
            if metadata["Name"] and metadata["Version"]:
                return metadata
    raise SourceError(f"{wheel}: this is not a wheel: it has no METADATA with a name and a version")


def license_of(metadata: email.message.Message) -> str | None:
    """A package's licence as its metadata names it: the SPDX expression, else a short `License`, else the classifier."""
    if expression := metadata.get("License-Expression"):
        return str(expression)
    stated = str(metadata.get("License") or "").strip()
    if stated and "\n" not in stated and len(stated) <= _LONGEST_LICENSE_NAME:
        return stated
    classifiers = [str(value) for value in metadata.get_all("Classifier", []) if str(value).startswith("License ::")]
    return classifiers[0].split(" :: ")[-1] if classifiers else None


def _homepage(metadata: email.message.Message) -> str | None:
    if home := metadata.get("Home-page"):
        return str(home)
    links = dict(str(value).split(", ", 1) for value in metadata.get_all("Project-URL", []) if ", " in str(value))
    for label in ("Homepage", "homepage", "Documentation", "Source", "Repository"):
        if label in links:
            return links[label]
    return next(iter(links.values()), None)


def readable_page(text: str) -> str:
    """A README or page without badges, images and raw HTML tags on lines of their own, and without blank runs."""
    lines = [line.rstrip() for line in text.splitlines()]
    kept = [line for line in lines if not line or not _DECORATION.fullmatch(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")


_MARKUP = (".md", ".markdown", ".mdx", ".rst")
_HTML = (".html", ".htm")
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n.{0,20000}?\n(?:---|\.\.\.)[ \t]*\n", re.S)
_FRONT_TITLE = re.compile(r"^title:[ \t]*[\"']?(.+?)[\"']?[ \t]*$", re.M)
_HEADING = re.compile(r"^#{1,2}[ \t]+(.{1,200})$|^(.{1,200})\n(?:=+|-+|~+|\*+)[ \t]*$", re.M)
#: Lines of a page that are for Sphinx or MDX, not for a reader; a directive's options and body follow indented.
_MACHINERY = re.compile(
    r"^\.\. (?:toctree|contents|meta|index|highlight|currentmodule|module|automodule|autoclass|autofunction|autosummary"
    r"|include|literalinclude|raw|only|rst-class|_[^:\n]+):.*\n(?:[ \t]+.*\n|[ \t]*\n(?=[ \t]))*"
    r"|^(?:import|export) .+ from ['\"].+['\"];?[ \t]*\n",
    re.M,
)
#: Folders and files of a documentation builder that are no pages.
_BUILT = re.compile(
    r"(?:^|/)(?:_static|_sources|_modules|_images|__pycache__|node_modules)/|(?:genindex|search|py-modindex)\.html$"
)


@dataclass(frozen=True)
class Docs(PageFormat):
    """One document a page."""

    settings: DocsSource
    known: ClassVar[str] = "/".join((*_MARKUP, *_HTML)) + ", also in packages and archives"
    small: ClassVar[bool] = True

    def reads(self, name: str) -> bool:
        return name.lower().endswith((*_MARKUP, *_HTML)) and is_prose_page(name) and not _BUILT.search(name)

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        if entry.is_link:
            tally.counts["links"] += 1
            return
        data = None if start else entry.content(self.settings.max_document_bytes, tally)
        if data is None:
            return
        license, group = entry.license_nearby(), repository_of(entry)
        metadata = {"file": entry.name}
        if entry.name.lower().endswith(_HTML):
            document = self.page_document(data, entry.name, entry.place, tally, license=license, group=group, metadata=metadata)
            if document is not None:
                yield 1, document
            return
        text, title = page_text(data.decode("utf-8-sig", errors="replace"), PurePosixPath(entry.name).suffix.lower())
        if title:
            metadata["title"] = title
        yield 1, Document(entry.name, text, license=license, group=group, metadata=metadata)


open_docs = Docs.open


def page_text(source: str, suffix: str) -> tuple[str, str]:
    """A page's text, without badges and what steers the builder, and its title."""
    source = source.replace("\r\n", "\n")
    title = ""
    if suffix != ".rst" and (front := _FRONT_MATTER.match(source)):
        stated = _FRONT_TITLE.search(front[0])
        title = stated[1] if stated else ""
        source = source[front.end() :]
    text = readable_page(_MACHINERY.sub("", source + "\n"))
    heading = _HEADING.search(text[:5000])
    return text, title or (" ".join((heading[1] or heading[2]).split()) if heading else "")
