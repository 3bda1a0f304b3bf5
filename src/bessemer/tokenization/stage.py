"""The `tokenize` stage: documents to a tokenizer and token shards."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import hash_files, hash_value
from bessemer.core.object_storage import fingerprint_of
from bessemer.core.progress import Progress
from bessemer.core.store import read_json, write_json
from bessemer.data.corpus.reader import TRAIN, VALIDATION, document_files, document_schema
from bessemer.data.stages.mixture import ANNEAL_EPOCHS, EPOCHS, iterate_epochs
from bessemer.tokenization.algorithms import train
from bessemer.tokenization.config import TOKENIZE_VERSION, TokenizeConfig
from bessemer.tokenization.corpus_sample import ROWS_AT_ONCE, TrainingTexts, drawing_rates, survey, texts_to_check
from bessemer.tokenization.existing import copy_tokenizer, existing_fingerprint, existing_tokenizer, settings_without_effect
from bessemer.tokenization.folder import TOKENIZER_FILE, write_folder
from bessemer.tokenization.measure import (
    TextFigures,
    batch_slices,
    by_domain,
    control_tokens_of,
    unknown_share,
    vocabulary_figures,
)
from bessemer.tokenization.shards import ANNEAL, EncodedDocuments, ShardWriter, TokenShards
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer

#: What an interrupted stage leaves to the next run; the store removes it from a finished artefact.
CHECKPOINTS = ".checkpoints"
_TRAINING_FILE = "training.json"

_ENCODED_AT_ONCE = 2_000_000
_MEASURED_BYTES = 50_000_000
_SHOWN_CHARACTERS = 400


def tokenize(
    config: TokenizeConfig, documents: Path, out: Path, *, seed: int, progress: Progress, folder: Path = Path()
) -> dict[str, Any]:
    """Train a tokenizer on the train split, or take the one that `config.tokenizer` names, and encode both splits with it.

    Writes `tokenizer/`, `tokens/train/` and `tokens/validation/` below `out`, and `tokens/anneal/` where the documents have
    a second mixture (`anneal_epochs`), and returns what the report shows. `folder` is where the path of an existing
    tokenizer starts. The bytes written depend on the documents, the settings and the
    seed, not on the number of threads. Documents stream through: memory does not grow with the corpus, but for the
    trainer's table of distinct pieces.

    Killed at any moment and started again on the same `out`, it goes on with the trained tokenizer, behind the last
    closed file of tokens, and the bytes are those of a run that was never killed. What other settings or documents left
    in `out` is made again.

    Raises ConfigError when there are no training documents, too few for the vocabulary, or a weight of a source that
    they do not have.
    """
    sizes = survey(documents, progress)
    if not sum(sizes[TRAIN].values()):
        raise ConfigError(f"{documents}: holds no training documents to make a tokenizer from; see what earlier stages kept")
    work = _identity(config, documents, seed, folder)
    training = _finished_training(out, work)
    if training is None:
        training = _make_tokenizer(config, documents, out, sizes[TRAIN], seed, folder, progress)
        (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        files = hash_files(out, (out / "tokenizer").iterdir())
        write_json(out / CHECKPOINTS / _TRAINING_FILE, {"work": work, "files": files, "metrics": training})
    else:
        progress.say("  the tokenizer was finished before the interruption")

    tokenizer = load_tokenizer(out / "tokenizer")
    tokenizer.check_bulk(texts_to_check(documents))
    encoding = _Encoding(config, documents, out, work, tokenizer, progress)
    splits = {split: _described(encoding.write(split, split, sum(of_split.values()))) for split, of_split in sizes.items()}
    if ANNEAL_EPOCHS in document_schema(documents).names:
        splits[ANNEAL] = _described(encoding.write(ANNEAL, TRAIN, sum(sizes[TRAIN].values()), ANNEAL_EPOCHS))

    measured_split = VALIDATION if splits[VALIDATION]["documents"] else TRAIN
    usage = TokenShards(out / "tokens" / TRAIN).usage()
    return {
        "algorithm": _algorithm(config, tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_hash": tokenizer.hash,
        "lossless": tokenizer.lossless,
        "encoder": tokenizer.bulk.name,
        **training,
        "encoding_seconds": round(encoding.seconds, 3),
        "encoding_mb_per_second": round(encoding.bytes / 1e6 / encoding.seconds, 3) if encoding.bytes else None,
        **splits,
        **_unknown(tokenizer, usage),
        **vocabulary_figures(tokenizer, usage),
        "special_tokens": control_tokens_of(tokenizer),
        **_text_figures(documents, measured_split, tokenizer, TokenShards(out / "tokens" / measured_split)),
        "by_domain": by_domain(tokenizer),
    }


def _identity(config: TokenizeConfig, documents: Path, seed: int, folder: Path) -> str:
    """Hash of all that the bytes written depend on."""
    given = None if config.tokenizer is None else existing_fingerprint(config.tokenizer, folder)
    corpus = [[part.name, fingerprint_of(part)] for part in document_files(documents)]
    return hash_value([TOKENIZE_VERSION, config.output_settings(), seed, given, corpus])


def _finished_training(out: Path, work: str) -> dict[str, Any] | None:
    """The figures of a tokenizer that an interrupted stage finished for this work, if its files are still what they were."""
    try:
        state = read_json(out / CHECKPOINTS / _TRAINING_FILE)
        whole = state["files"] == hash_files(out, (out / "tokenizer").iterdir())
        return state["metrics"] if state["work"] == work and whole else None
    except (ArtefactError, OSError, KeyError, TypeError):
        return None


def _make_tokenizer(
    config: TokenizeConfig,
    documents: Path,
    out: Path,
    sizes: Mapping[str, int],
    seed: int,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Write the tokenizer's folder; returns what its training read and took."""
    if config.tokenizer is not None:
        ignored = settings_without_effect(config)
        if ignored:
            progress.say(f"  no tokenizer is trained, so these settings have no effect: {', '.join(ignored)}")
        copy_tokenizer(existing_tokenizer(config.tokenizer, folder), out / "tokenizer")
        return {"training_bytes": None, "training_seconds": None}
    start = time.perf_counter()
    rates = drawing_rates(sizes, config.source_weights, config.training_bytes)
    expected = sum(rates[source] * size for source, size in sizes.items())
    with progress.task("train tokenizer", total=expected / 1e6, unit="MB") as task:
        texts = TrainingTexts(documents, rates, seed, task)
        parts = train(config, texts)
    write_folder(out / "tokenizer", parts, config.chat_template, config.reserved_tokens, config.fim_tokens)
    return {"training_bytes": texts.bytes, "training_seconds": round(time.perf_counter() - start, 3)}


class _Encoding:
    """Writes the splits' tokens; counts the text that it encoded itself, and the time."""

    def __init__(
        self, config: TokenizeConfig, documents: Path, out: Path, work: str, tokenizer: Tokenizer, progress: Progress
    ) -> None:
        self._config, self._documents, self._out = config, documents, out
        self._work, self._tokenizer, self._progress = work, tokenizer, progress
        self.bytes = 0
        self.seconds = 0.0

    def write(self, name: str, split: str, total_bytes: int, epochs: str = EPOCHS) -> dict[str, Any]:
        """Write the documents of `split` to the folder `name`, each as often as the column `epochs` says; returns the
        content of its `shards.json`."""
        start = time.perf_counter()
        writer = ShardWriter(
            self._out / "tokens" / name,
            tokenizer_hash=self._tokenizer.hash,
            vocab_size=self._tokenizer.vocab_size,
            bos_id=self._tokenizer.bos_id,
            shard_tokens=self._config.shard_tokens,
            scratch=self._out / CHECKPOINTS / name,
            work=self._work,
        )
        before = writer.bytes
        with self._progress.task(f"encode {name}", total_bytes / 1e6, "MB", completed=before / 1e6) as task:
            for batch in _encoded(self._documents, split, self._tokenizer, writer.documents, epochs):
                writer.add(batch)
                task.reach(writer.bytes / 1e6)
        description = writer.finish()
        self.bytes += writer.bytes - before
        self.seconds += time.perf_counter() - start
        return description


def _encoded(documents: Path, split: str, tokenizer: Tokenizer, skip: int, epochs: str) -> Iterator[EncodedDocuments]:
    columns = ["id", "text", "source"]
    for batch in iterate_epochs(documents, columns, split, batch_rows=ROWS_AT_ONCE, skip=skip, column=epochs):
        for some in _slices(batch):
            text_bytes = pc.binary_length(some.column("text")).to_numpy().astype(np.int64)
            ids, offsets = tokenizer.encode_flat(some.column("text").to_pylist())
            yield EncodedDocuments(some.column("id"), some.column("source"), text_bytes, ids, offsets)


def _slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch in slices of so much text that their tokens need little memory, each of at least one document."""
    starts = np.concatenate([[0], np.cumsum(pc.binary_length(batch.column("text")).to_numpy(), dtype=np.int64)])
    first = 0
    while first < batch.num_rows:
        end = int(np.searchsorted(starts, starts[first] + _ENCODED_AT_ONCE, side="right")) - 1
        end = max(end, first + 1)
        yield batch.slice(first, end - first)
        first = end


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


def _algorithm(config: TokenizeConfig, tokenizer: Tokenizer) -> str:
    if config.tokenizer is None:
        return config.algorithm
    return str(read_json(tokenizer.folder / TOKENIZER_FILE)["model"]["type"]).lower()


def _unknown(tokenizer: Tokenizer, usage: np.ndarray) -> dict[str, Any]:
    """The share of unknown tokens in the training text, where the tokenizer has such."""
    text_usage = usage.copy()
    text_usage[tokenizer.bos_id] = 0
    share = unknown_share(tokenizer, text_usage)
    return {} if share is None else {"unknown_share": share}


def _text_figures(documents: Path, split: str, tokenizer: Tokenizer, shards: TokenShards) -> dict[str, Any]:
    """Fertility (tokens per word between white space) and the baselines, on the first 50 MB of a split, and one short
    text of it cut into its tokens for a coloured view."""
    figures = TextFigures()
    counted = 0
    sample = ""
    for batch in iterate_epochs(documents, ["text"], split, batch_rows=ROWS_AT_ONCE):
        for text in batch.column("text").to_pylist():
            figures.add(text)
            counted += 1
            if len(sample) < _SHOWN_CHARACTERS <= len(text) or not sample:
                sample = text[:_SHOWN_CHARACTERS]
        if figures.bytes >= _MEASURED_BYTES:
            break
    tokens = shards.text_tokens(counted)
    return {
        "fertility": round(tokens / figures.words, 4) if figures.words else None,
        "baselines": figures.baselines(),
        "sample_tokens": batch_slices(tokenizer, sample),
    }
