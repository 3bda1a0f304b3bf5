"""Text for quantisation: calibration rows, and held-out documents to compare models on.

Sources are a run's folder or its tokens, a folder of documents, or a text file; the last two are encoded here. Where none is
given there is a small text that travels with Bessemer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bessemer.core.errors import ArtefactError
from bessemer.core.seeds import derive_seed
from bessemer.core.store import follow
from bessemer.data.corpus.reader import holds_documents, iterate_documents
from bessemer.tokenization.measure import sample_text
from bessemer.tokenization.shards import SHARDS_FILE, EncodedDocuments, ShardWriter, TokenShards
from bessemer.tokenization.tokenizer import Tokenizer

# Shapes: R rows, T time.

#: Every tenth chunk of a text file is held out.
_HELD_OUT = 10
_CHUNK_CHARACTERS = 4_000
#: Most characters that are encoded: calibration reads some tens of thousands of tokens.
_MOST_CHARACTERS = 20_000_000
_MOST_DOCUMENTS = 20_000


#: Of the texts of `sample_text`, those of the small text; the first ones suffice for a large model.
_SAMPLES = ("english", "prose", "python", "maths")


class Tokens(NamedTuple):
    """Two streams of a source without a common document; None where it has no such split."""

    train: TokenShards | None
    held_out: TokenShards | None


@contextmanager
def opened_tokens(source: Path, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """While entered, a source as token streams.

    Every tenth chunk of about 4,000 characters of a text file is held out. Raises ArtefactError for a source without text, and
    for tokens of another tokenizer.
    """
    place = follow(source)
    for folder in (place, follow(place / "tokens")):
        if (folder / SHARDS_FILE).exists():
            yield Tokens(_checked(folder, tokenizer), None)
            return
        if (folder / "train" / SHARDS_FILE).exists():
            held_out = folder / "validation"
            has_held_out = (held_out / SHARDS_FILE).exists()
            yield Tokens(_checked(folder / "train", tokenizer), _checked(held_out, tokenizer) if has_held_out else None)
            return
    with TemporaryDirectory() as scratch:
        texts = _texts(source, place)
        train = _encoded(texts["train"], tokenizer, Path(scratch) / "train")
        yield Tokens(train, _encoded(texts["validation"], tokenizer, Path(scratch) / "validation"))


@contextmanager
def sample_tokens(tokenizer: Tokenizer) -> Iterator[TokenShards]:
    """While entered, four documents of a kilobyte each: English twice, Python, mathematics."""
    with TemporaryDirectory() as scratch:
        encoded = _encoded([sample_text(name) for name in _SAMPLES], tokenizer, Path(scratch))
        assert encoded is not None, "the samples are not empty"
        yield encoded


def _checked(folder: Path, tokenizer: Tokenizer) -> TokenShards:
    shards = TokenShards(folder)
    shards.check_tokenizer(tokenizer.hash, "the model")
    return shards


def _texts(source: Path, place: Path) -> dict[str, list[str]]:
    documents = next(
        (folder for folder in (place, follow(place / "documents")) if folder.is_dir() and holds_documents(folder)), None
    )
    if documents is not None:
        return {split: _documents(documents, split) for split in ("train", "validation")}
    if not place.is_file():
        raise ArtefactError(f"{source}: no text to read: name a run, its tokens, a folder of documents or a text file")
    try:
        with place.open(encoding="utf-8") as stream:
            text = stream.read(_MOST_CHARACTERS)
    except UnicodeDecodeError:
        raise ArtefactError(f"{source}: this is not a text file in UTF-8") from None
    chunks = _chunks(text)
    held_out = chunks[_HELD_OUT - 1 :: _HELD_OUT]
    return {"train": [chunk for number, chunk in enumerate(chunks, 1) if number % _HELD_OUT], "validation": held_out}


def _documents(folder: Path, split: str) -> list[str]:
    texts = (text for batch in iterate_documents(folder, ["text"], split=split) for text in batch.column("text").to_pylist())
    return list(islice(texts, _MOST_DOCUMENTS))


def _chunks(text: str) -> list[str]:
    """A text split at ends of paragraphs into chunks of 4,000 characters or a little more."""
    chunks, current = [], ""
    for paragraph in text.split("\n\n"):
        current += paragraph + "\n\n"
        if len(current) >= _CHUNK_CHARACTERS:
            chunks.append(current)
            current = ""
    return [chunk for chunk in [*chunks, current] if chunk.strip()]


def _encoded(texts: list[str], tokenizer: Tokenizer, folder: Path) -> TokenShards | None:
    if not texts:
        return None
    writer = ShardWriter(
        folder,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        shard_tokens=1 << 24,
    )
    ids, offsets = tokenizer.encode_flat(texts)
    sizes = np.array([len(text.encode()) for text in texts])
    names = [str(number) for number in range(len(texts))]
    writer.add(EncodedDocuments(names, [""] * len(texts), sizes, ids, offsets))
    writer.finish()
    return TokenShards(folder)


def calibration_rows(shards: TokenShards, *, tokens: int, length: int, seed: int) -> Tensor:
    """Rows from random positions of the stream, (R, T): a function of the stream and the seed.

    Raises ArtefactError when the stream is shorter than a row.
    """
    last = shards.tokens - length
    if last < 0:
        raise ArtefactError(
            f"{shards.folder}: {shards.tokens:,} tokens are too few to calibrate on: one row has {length:,}; give more text"
        )
    generator = np.random.default_rng(derive_seed(seed, "calibration"))
    starts = generator.integers(0, last + 1, max(1, tokens // length))
    return torch.from_numpy(np.stack([shards.read(int(start), length).astype(np.int64) for start in starts]))
