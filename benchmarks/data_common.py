"""What the parts of `data.py` share: the texts, and measuring in fresh processes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bessemer.core.hashing import hash_bytes
from rounds import summaries, summary

#: Files that are no part of this repository; what is absent is left out, and said.
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REPEATS = 3
SHORTEST = 100  # characters of a text
_ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "NUMBA", "OPENBLAS", "MKL", "ARROW", "RAYON")}


# --- the texts ----------------------------------------------------------------------------------------------------


def texts_by_kind(megabytes: float) -> dict[str, list[str]]:
    """Real texts by where they come from, about so many megabytes of them together, without copies."""
    some = random.Random(0)
    found = {
        "documentation": list(_some_of(documentation(), megabytes * 0.55)),
        "docstrings": list(_some_of(docstrings_of_packages(), megabytes * 0.2)),
        "web pages": list(pages()),
        "plays": list(_some_of(plays(), megabytes * 0.1)),
    }
    prose = [text for texts in found.values() for text in texts]
    found["noisy"] = list(_some_of(noisy(prose, some), megabytes * 0.15))
    seen: set[str] = set()
    return {
        kind: [text for text in texts if len(text) >= SHORTEST and not (text in seen or seen.add(text))]
        for kind, texts in found.items()
    }


def _some_of(texts: Iterator[str], megabytes: float) -> Iterator[str]:
    size = 0
    for text in texts:
        if size > megabytes * 1e6:
            return
        size += len(text.encode())
        yield text


def _package_files(endings: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Installed packages' files with such names, in an order of its own."""
    root = Path(sysconfig.get_paths()["purelib"])
    files = [path for path in root.rglob("*") if path.name.endswith(endings) and 200 <= path.stat().st_size <= 500_000]
    for path in sorted(files, key=lambda path: hash_bytes(b"order", path.relative_to(root).as_posix().encode())):
        yield path.relative_to(root).as_posix(), path.read_bytes()


def documentation() -> Iterator[str]:
    """Pages, licences and descriptions of packages, long ones in parts."""
    for _, content in _package_files((".md", ".rst", ".txt", "LICENSE", "METADATA")):
        text = content.decode("utf-8", "replace").replace("\r\n", "\n")
        yield from _parts(text, 20_000)


def docstrings_of_packages() -> Iterator[str]:
    from bessemer.data.sources.python_docs import docstrings

    for name, content in _package_files((".py",)):
        try:
            yield from (found.text for found in docstrings(content, name))
        except (SyntaxError, ValueError):
            continue


def pages() -> Iterator[str]:
    """What two extractors make of web pages: the main text, and everything, navigation included."""
    from resiliparse.extract.html2text import extract_plain_text

    for path in sorted((SHARED / "html").glob("*.html")):
        html = path.read_bytes().decode("utf-8", "replace")
        yield extract_plain_text(html, main_content=True)
        yield extract_plain_text(html)


def plays() -> Iterator[str]:
    for path in sorted((SHARED / "text").glob("*hakespeare*")):
        yield from _parts(path.read_text(encoding="utf-8"), 3_000)


def noisy(prose: list[str], some: random.Random) -> Iterator[str]:
    """Made of real texts: navigation, repeated lines and paragraphs, JSON, unspaced, shouted and cut text, lists of numbers."""
    while True:
        text = some.choice(prose)
        lines = [line for line in text.splitlines() if line.strip()] or ["x"]
        words = text.split()[:400] or ["x"]
        yield "\n".join(some.choice(("Home", "About us", "Contact", "Privacy policy", *words)) for _ in range(60))
        yield "\n".join(f"{some.choice('-•*')} {line.strip()}" for line in lines)
        yield "\n".join(line for line in lines for _ in range(some.choice((1, 1, 1, 1, 2, 5))))
        yield "\n\n".join([text[:1500]] * some.choice((1, 2, 3)))
        yield json.dumps({word: some.choice(words) for word in words}, indent=some.choice((None, 2)))
        yield " ".join(line[: some.randint(10, 60)] + "..." * some.randint(0, 1) + "\n" for line in lines)
        yield text.replace(" ", "")[:3000]
        yield text.upper()
        yield "".join(character if character.isascii() else "" for character in text)[:: some.choice((1, 2))]
        yield "\n".join(" ".join(str(some.randint(0, 10**6)) for _ in range(8)) for _ in range(50))
        yield " ".join(some.choice(words) + some.choice(("", ",", ".", " —", "’s", "!?", "…")) for _ in range(200))


def _parts(text: str, characters: int) -> Iterator[str]:
    """A text cut at empty lines into parts of about so many characters."""
    part = ""
    for paragraph in text.split("\n\n"):
        part = f"{part}\n\n{paragraph}" if part else paragraph
        if len(part) >= characters:
            yield part
            part = ""
    yield part


def write_texts(path: Path, texts: list[str]) -> float:
    """As JSON, and their megabytes of UTF-8."""
    path.write_text(json.dumps(texts), encoding="utf-8")
    return sum(len(text.encode()) for text in texts) / 1e6


def read_texts(path: str) -> list[str]:
    texts: list[str] = json.loads(Path(path).read_text(encoding="utf-8"))
    return texts


# --- measuring ----------------------------------------------------------------------------------------------------


def measured(function: Callable[..., Any], *arguments: object, **environment: str) -> Any:
    """What a function of a module beside this one returns in a fresh process."""
    call = f"import json, sys, {function.__module__} as part; print(json.dumps(part.{function.__name__}(*sys.argv[1:])))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", call, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, **_ONE_THREAD, **environment},
        cwd=Path(__file__).parent,
        preexec_fn=_on_one_core,
    )
    if done.returncode:
        raise SystemExit(f"{function.__name__}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _on_one_core() -> None:
    """Threads that share a core's caches and units with others of the process would count as more CPU time."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def alternated(
    ours: Callable[[], dict[str, float]], peer: Callable[[], dict[str, float]]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Several measurements of each, taken in turn: of every figure the median, the rounds and their spread."""
    runs = [(ours(), peer()) for _ in range(REPEATS)]
    return summaries(mine for mine, _ in runs), summaries(theirs for _, theirs in runs)


def speed(megabytes: float, seconds: dict[str, Any]) -> dict[str, Any]:
    """Megabytes a second of measurements in seconds."""
    return summary(megabytes / taken for taken in seconds["rounds"])


def beside(ours: dict[str, Any], peer: dict[str, Any], peer_name: str) -> dict[str, Any]:
    """Two speeds and how many times the peer's ours is."""
    return {"bessemer": ours, peer_name: peer, "ratio": ours["median"] / peer["median"]}
