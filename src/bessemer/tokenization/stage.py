"""The `tokenize` stage: documents to a tokenizer and token shards."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from bessemer.core.errors import ConfigError
from bessemer.core.progress import Progress, Task
from bessemer.core.seeds import derive_seed
from bessemer.data.documents import iterate_documents
from bessemer.tokenization.bpe import byte_level_bpe, train_bpe
from bessemer.tokenization.config import BYTE_TOKENS, TokenizeConfig
from bessemer.tokenization.folder import write_folder
from bessemer.tokenization.shards import EncodedDocuments, ShardWriter
from bessemer.tokenization.special import SPECIAL_TOKENS
from bessemer.tokenization.split import SPLIT_REGEXES
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer

_SHOWN_TOKENS = 24
_SHOWN_CHARACTERS = 400


def tokenize(config: TokenizeConfig, documents: Path, out: Path, *, seed: int, progress: Progress) -> dict[str, Any]:
    """Train a tokenizer on the train split, encode both splits with it.

    Writes `tokenizer/`, `tokens/train/` and `tokens/validation/` below `out`, and returns what the report shows. The
    bytes written depend on the documents, the settings and the seed, not on the number of threads. Documents stream
    through: memory does not grow with the corpus, but for the trainer's table of distinct pieces.

    Raises ConfigError when there are no training documents, or too few for the vocabulary.
    """
    sizes = {split: _text_bytes(documents, split) for split in ("train", "validation")}
    if not sizes["train"]:
        raise ConfigError(f"{documents}: holds no training documents to make a tokenizer from; see what earlier stages kept")

    start = time.perf_counter()
    share = min(1.0, config.training_bytes / sizes["train"])
    with progress.task("train tokenizer", total=sizes["train"] * share / 1e6, unit="MB") as task:
        texts = _TrainingTexts(documents, share, seed, task)
        tokens = train_bpe(texts, config.vocab_size - BYTE_TOKENS - len(SPECIAL_TOKENS), SPLIT_REGEXES[config.split])
    write_folder(out / "tokenizer", byte_level_bpe(tokens, config.split))
    training_seconds = time.perf_counter() - start

    tokenizer = load_tokenizer(out / "tokenizer")
    start = time.perf_counter()
    usage = np.zeros(tokenizer.vocab_size, np.int64)
    splits = {}
    for split, size in sizes.items():
        writer = ShardWriter(
            out / "tokens" / split,
            tokenizer_hash=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            shard_tokens=config.shard_tokens,
        )
        with progress.task(f"encode {split}", total=size / 1e6, unit="MB") as task:
            for batch in _encoded(documents, split, tokenizer):
                writer.add(batch)
                task.advance(int(batch.bytes.sum()) / 1e6)
                if split == "train":
                    usage += np.bincount(batch.ids, minlength=len(usage))
        splits[split] = _described(writer.finish())
    encoding_seconds = time.perf_counter() - start

    return {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_hash": tokenizer.hash,
        "encoder": tokenizer.bulk.name,
        "training_bytes": texts.bytes,
        "training_seconds": round(training_seconds, 3),
        "encoding_seconds": round(encoding_seconds, 3),
        "encoding_mb_per_second": round(sum(sizes.values()) / 1e6 / encoding_seconds, 3),
        **splits,
        **_vocabulary_facts(tokens, usage),
        **_text_facts(documents, "validation" if sizes["validation"] else "train", tokenizer),
    }


def _text_bytes(documents: Path, split: str) -> int:
    batches = iterate_documents(documents, ["text"], split=split)
    return sum(pc.sum(pc.binary_length(batch.column("text"))).as_py() or 0 for batch in batches)


class _TrainingTexts:
    """The training documents' texts, or a share of them drawn by the hash of seed and id; counts their bytes."""

    def __init__(self, documents: Path, share: float, seed: int, task: Task) -> None:
        self._documents, self._share, self._seed, self._task = documents, share, seed, task
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        for batch in iterate_documents(self._documents, ["id", "text"], split="train"):
            before = self.bytes
            for identifier, text in zip(batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True):
                if derive_seed(self._seed, identifier) < self._share * 2**63:
                    self.bytes += len(text.encode())
                    yield text
            self._task.advance((self.bytes - before) / 1e6)


def _encoded(documents: Path, split: str, tokenizer: Tokenizer) -> Iterator[EncodedDocuments]:
    for batch in iterate_documents(documents, ["id", "text", "source"], split=split):
        ids, offsets = tokenizer.encode_flat(batch.column("text").to_pylist())
        text_bytes = pc.binary_length(batch.column("text")).to_numpy().astype(np.int64)
        yield EncodedDocuments(batch.column("id").to_pylist(), batch.column("source").to_pylist(), text_bytes, ids, offsets)


def _described(shards: dict[str, Any]) -> dict[str, Any]:
    """A split in numbers. Bytes per token leave the begin tokens out."""
    text_tokens = shards["tokens"] - shards["documents"] - (1 if shards["documents"] else 0)
    return {
        "documents": shards["documents"],
        "tokens": shards["tokens"],
        "bytes": shards["bytes"],
        "bytes_per_token": round(shards["bytes"] / text_tokens, 4) if text_tokens else None,
        "fingerprint": shards["fingerprint"],
    }


def _vocabulary_facts(tokens: Sequence[bytes], usage: np.ndarray) -> dict[str, Any]:
    """Which tokens training made: the longest, a sample from first to last, and how many the training text never uses."""
    merged = tokens[BYTE_TOKENS:]
    evenly = np.linspace(0, max(len(merged) - 1, 0), min(_SHOWN_TOKENS, len(merged))).astype(int)
    return {
        "unused_tokens": int((usage[BYTE_TOKENS : len(tokens)] == 0).sum()),
        "unused_bytes": int((usage[:BYTE_TOKENS] == 0).sum()),
        "longest_tokens": [_shown(token) for token in sorted(merged, key=lambda token: (-len(token), token))[:_SHOWN_TOKENS]],
        "vocabulary_sample": [_shown(merged[index]) for index in evenly],
    }


def _text_facts(documents: Path, split: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Fertility, the tokens per word between white space, and one short text cut into its tokens for a coloured view."""
    words = tokens = 0
    sample: list[str] = []
    for batch in iterate_documents(documents, ["text"], split=split):
        texts = batch.column("text").to_pylist()
        words += sum(len(text.split()) for text in texts)
        tokens += len(tokenizer.encode_flat(texts)[0])
        if not sample:
            text = next((text for text in texts if len(text) >= _SHOWN_CHARACTERS), texts[0])[:_SHOWN_CHARACTERS]
            sample = [_shown(tokenizer.token_bytes(id)) for id in tokenizer.encode(text, add_bos=False)]
    return {"fertility": round(tokens / words, 4) if words else None, "sample_tokens": sample}


def _shown(token: bytes) -> str:
    return token.decode("utf-8", "replace")
