"""The folder that `bessemer init` makes: a recipe for one's own text, sized by how much there is, and notes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bessemer.core.errors import SourceError
from bessemer.core.metrics import size
from bessemer.data.sources.io.paths import suffix_of, uncompressed_name
from bessemer.training.report import ENOUGH_TEXT

#: Sources by the suffix of the files that they read, and the share of such a file that is text, roughly.
_SOURCES = {
    ".txt": ("files", 1.0),
    ".md": ("files", 1.0),
    ".jsonl": ("files", 0.8),
    ".html": ("html", 0.1),
    ".htm": ("html", 0.1),
    ".xhtml": ("html", 0.1),
    ".epub": ("epub", 0.5),
    ".pdf": ("pdf", 0.1),
}
#: Size of a compressed file's content over the file's own, roughly.
_EXPANDS = 3.0
#: (most bytes of text, vocabulary size for it): each entry must occur often enough to be learnt.
_VOCABULARIES = ((ENOUGH_TEXT, 512), (2_000_000, 1024), (10_000_000, 2048))
_LARGEST_VOCABULARY = 4096
#: Bytes of text that are assumed where there is none yet.
_USUAL_TEXT = 1_000_000

_FROM_NOTHING = """\
# A language model of your own text, in about five minutes on two CPU cores.
#   bessemer run recipe.yaml --dry-run           what would run, and why
#   bessemer run recipe.yaml                     make it
#   bessemer recipes show recipe.yaml --full     every setting, and where it comes from
format: 1
name: {name}
seed: 7
collect:
  sources:
{sources}
  hold_out: documents # one piece in 20 is not trained on: the model is measured by it
clean: {{edit: [repair], score: []}} # nothing of yours is filtered out; docs/data.md has what chooses among other people's text
deduplicate: [exact, minhash]
tokenize: {{vocab_size: {vocab_size}}} # 512 for less than 300 kB of text, 1024 up to 2 MB, 2048 up to 10 MB, 4096 for more
model: {{preset: qwen3-1m, max_position_embeddings: 256}} # with hours instead of minutes: qwen3-3m, qwen3-10m
pretrain: # its minutes are measured once on this machine, and kept in the run's recipe.lock.yaml
  minutes: 3.5
  batch_size: 16
  context_length: 256
  learning_rate: 1e-2
  matrix_learning_rate: 5e-3
  save: best # the weights that know the held-out text best: little text is learnt by heart before the time is over
  threads: auto
evaluate: {{tasks: [], context_length: 256, minutes: 0.5}}
"""

_FROM_MODEL = """\
# An open model that goes on with your own text (continued pretraining, docs/pretraining.md), in minutes on two CPU cores.
#   bessemer run recipe.yaml --dry-run           what would run, and why
#   bessemer run recipe.yaml                     make it
#   bessemer recipes show recipe.yaml --full     every setting, and where it comes from
format: 1
name: {name}
extends: continue
collect:
  sources:
{sources}
tokenize: {{tokenizer: {model}}} # the model's own: to a model, a new vocabulary means nothing
model: {{init_from: {model}}}
"""

_NOTES = """\
# {name}

`recipe.yaml` says what to make of the text in {texts}.

{commands}
    bessemer run recipe.yaml
    bessemer generate {name} "The beginning of a sentence"
    bessemer show {name}
    bessemer serve {name}

Results are in `runs/{name}/`: `report.html`, `model`, `tokenizer`, `corpus`.
"""


@dataclass(frozen=True)
class OwnText:
    """Text on this machine. paths: by the source that reads them. size: bytes of text, roughly; None: there is none yet."""

    paths: dict[str, list[str]] = field(default_factory=lambda: {"files": ["data"]})
    size: int | None = None

    @property
    def too_little(self) -> bool:
        """Whether there is too little to learn a language from."""
        return self.size is not None and self.size < ENOUGH_TEXT

    def vocab_size(self) -> int:
        """Entries of a vocabulary for so much text."""
        size = _USUAL_TEXT if self.size is None else self.size
        return next((entries for limit, entries in _VOCABULARIES if size < limit), _LARGEST_VOCABULARY)


def find_text(places: Sequence[Path], folder: Path) -> OwnText:
    """The text in files and folders, with paths as the recipe of `folder` names them.

    Raises SourceError for a place that does not exist or holds no file that a recipe of text reads.
    """
    paths: dict[str, list[str]] = {}
    total = 0.0
    for place in places:
        if not place.exists():
            raise SourceError(f"--text: {place}: there is no such file or folder")
        sizes: dict[str, float] = {}
        for path in [place] if place.is_file() else sorted(filter(Path.is_file, place.rglob("*"))):
            if (suffix := suffix_of(path.name)) in _SOURCES:
                source, share = _SOURCES[suffix]
                expands = 1.0 if uncompressed_name(path.name) == path.name else _EXPANDS
                sizes[source] = sizes.get(source, 0.0) + share * expands * path.stat().st_size
        if not sizes:
            known = ", ".join(_SOURCES)
            raise SourceError(
                f"--text: {place}: no text is found here; known are {known}; docs/sources.md has all kinds of files"
            )
        for source in sizes:
            paths.setdefault(source, []).append(Path(os.path.relpath(place.resolve(), folder.resolve())).as_posix())
        total += sum(sizes.values())
    return OwnText(paths, round(total))


def starting_files(name: str, text: OwnText, model: str | None) -> dict[str, str]:
    """The files of a new folder by path. model: the folder of the model to continue from, for the recipe; None: a new model."""
    values = {"name": json.dumps(name), "sources": "\n".join(_source_lines(text))}
    if model is None:
        recipe = _FROM_NOTHING.format(**values, vocab_size=text.vocab_size())
    else:
        recipe = _FROM_MODEL.format(**values, model=json.dumps(model, ensure_ascii=False))
    texts = ", ".join(f"`{path}`" for path in dict.fromkeys(path for paths in text.paths.values() for path in paths))
    commands = "" if text.size is not None else "Put .txt, .md or .jsonl files (with a `text` field) there; then:\n"
    files = {
        "recipe.yaml": recipe,
        "README.md": _NOTES.format(name=name, texts=texts, commands=commands),
        ".gitignore": "runs/\n.venv/\n",
    }
    return files if text.size is not None else {**files, "data/.gitkeep": ""}


def _source_lines(text: OwnText) -> Iterator[str]:
    for source, paths in text.paths.items():
        longest = "2_000" if text.too_little else "10_000"  # enough pieces for some to be held out
        more = f", max_document_bytes: {longest}" if source == "files" else ", by_chapter: true" if source == "epub" else ""
        note = ' # .txt, .md, .jsonl with a "text" field; also .gz and .zst' if source == "files" else ""
        yield f"    - {{source: {source}, paths: {json.dumps(paths, ensure_ascii=False)}{more}}}{note}"


def amount(text: OwnText) -> str:
    """How much text there is, in words."""
    return "no text yet" if text.size is None else f"about {size(text.size)} of text"
