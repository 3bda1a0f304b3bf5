"""What TOKENIZER means on the command line, and the figures that `bessemer show` prints of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bessemer.tokenization.tokenizer import Tokenizer

#: Files that hold a tokenizer in the formats of others.
TOKENIZER_SUFFIXES = (".json", ".gguf", ".model", ".tiktoken")

#: Characters of a user's text that are shown in their tokens.
_SHOWN_CHARACTERS = 2000

_SAMPLE = (
    "The quick brown fox jumps over 13 lazy dogs: def fox(dogs: int) -> str:\n\treturn 'über' * dogs  # 狐 🦊\n"
    "Naïve façade, 3.14159 × 10⁻², ключ, مفتاح."
)


def tokenizer_folder(name: str, runs: Path) -> Path | None:
    """The folder that a name or path means: itself, one with `tokenizer/` in it (a run, a stage), or a run's name."""
    from bessemer.core.store import follow

    for folder in (Path(name), runs / name):
        for place in (folder, folder / "tokenizer"):
            if (follow(place) / "tokenizer.json").is_file():
                return follow(place)
    return None


@contextmanager
def opened_tokenizer(name: str, runs: Path) -> Iterator[Tokenizer]:
    """A tokenizer by folder, by run, or from a file of another format, which is read into a folder that lasts as long.

    Raises ArtefactError when there is none.
    """
    from bessemer.core.errors import ArtefactError
    from bessemer.tokenization.tokenizer import load_tokenizer

    folder = tokenizer_folder(name, runs)
    if folder is not None:
        yield load_tokenizer(folder)
        return
    if not Path(name).exists():
        raise ArtefactError(f"there is no tokenizer {name!r}: not a folder with a tokenizer.json, a run, or a file of one")
    from bessemer.tokenization.formats import import_tokenizer

    with tempfile.TemporaryDirectory(prefix="bessemer-") as scratch:
        import_tokenizer(Path(name), Path(scratch) / "tokenizer")
        yield load_tokenizer(Path(scratch) / "tokenizer")


def described(name: str, runs: Path, texts: Sequence[Path]) -> dict[str, Any]:
    """Figures of a tokenizer: what its stage measured, where a stage made it and no texts are given; else measured now.

    Raises ArtefactError when there is none, SourceError for a text that cannot be read.
    """
    from bessemer.core.store import MANIFEST, read_json
    from bessemer.model.summary import embedding_shares
    from bessemer.tokenization.measure import describe

    folder = tokenizer_folder(name, runs)
    if folder is not None and not texts and (folder.parent / MANIFEST).exists():
        manifest = read_json(folder.parent / MANIFEST, "manifest")
        if manifest["stage"] == "tokenize" and "by_domain" in manifest["metrics"]:
            metrics = manifest["metrics"]
            return {**metrics, "embedding_shares": embedding_shares(metrics["vocab_size"])}
    read = [_read_text(path) for path in texts]
    with opened_tokenizer(name, runs) as tokenizer:
        figures = describe(tokenizer, read[0][:_SHOWN_CHARACTERS] if read else _SAMPLE, read)
    return {**figures, "embedding_shares": embedding_shares(figures["vocab_size"])}


def _read_text(path: Path) -> str:
    from bessemer.core.errors import SourceError

    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: is not UTF-8 text (byte {error.start})") from None


def column_names(names: Sequence[str]) -> list[str]:
    """Short names for columns: the last part of each path, or the whole where two would be the same."""
    short = [Path(name).name if Path(name).name != "tokenizer" else Path(name).parent.name or name for name in names]
    return [one if short.count(one) == 1 else whole for one, whole in zip(short, names, strict=True)]
