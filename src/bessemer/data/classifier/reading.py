"""Reader of training examples: the texts of a folder of text, JSONL and Parquet files, plain or `.gz` or `.zst`."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from bessemer.core.errors import SourceError
from bessemer.data.sources.document import encodable

_COMPRESSED = (".gz", ".zst")
_KNOWN = (".txt", ".md", ".jsonl", ".parquet")


def read_examples(folder: Path) -> list[str]:
    """Every text below a folder (or of one file), without blank ones and copies, in an order that no file's name decides.

    A text file is one text, a line of JSONL and a row of Parquet another, by their `text`. Raises SourceError for what is
    not there or cannot be read, naming file and line.
    """
    if not folder.exists():
        raise SourceError(f"{folder}: there is no such folder of examples")
    files = [folder] if folder.is_file() else sorted(file for file in folder.rglob("*") if file.is_file() and _kind(file))
    if not files or not all(map(_kind, files)):
        raise SourceError(f"{folder}: holds no examples ({', '.join(_KNOWN)}, also with {' or '.join(_COMPRESSED)})")
    texts = {text for file in files for text in _texts(file) if text.strip()}
    if not texts:
        raise SourceError(f"{folder}: holds no text at all")
    return sorted(texts)


def _texts(file: Path) -> Iterator[str]:
    try:
        if _kind(file) == ".parquet":
            for batch in pq.ParquetFile(file).iter_batches(columns=["text"]):
                yield from (text for text in batch.column(0).to_pylist() if text)
        elif _kind(file) == ".jsonl":
            for number, line in enumerate(_content(file).split("\n"), start=1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                        raise SourceError(f"{file}:{number}: a record of examples is an object with a 'text'")
                    yield encodable(record["text"])
        else:
            yield _content(file)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowInvalid, json.JSONDecodeError) as error:
        raise SourceError(f"{file}: these examples cannot be read ({error})") from None


def _content(file: Path) -> str:
    data = file.read_bytes()
    if file.suffix == ".gz":
        data = gzip.decompress(data)
    elif file.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True).read()
    return data.decode("utf-8-sig", errors="replace")


def _kind(file: Path) -> str | None:
    suffixes = [suffix for suffix in file.suffixes if suffix not in _COMPRESSED]
    return suffixes[-1] if suffixes and suffixes[-1] in _KNOWN else None
