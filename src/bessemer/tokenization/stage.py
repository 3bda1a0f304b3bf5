"""The stage `tokenize`: samples a corpus, trains a tokenizer on it, and encodes the documents to token shards.

Every source has a rate, the fraction of its text that the tokenizer is trained on; whether a document is drawn is a function of
the seed and the document's id. So the sample is the same on any machine, and memory does not grow with the corpus.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import derive_seed, hash_files, hash_value
from bessemer.core.object_storage import fingerprint_of
from bessemer.core.progress import Progress, Task
from bessemer.core.store import read_json, write_json
from bessemer.data.corpus.reader import TRAIN, VALIDATION, document_files, document_schema, iterate_documents
from bessemer.data.stages.mixture import ANNEAL_EPOCHS, EPOCHS, iterate_epochs
from bessemer.tokenization.algorithms import train_vocabulary
from bessemer.tokenization.config import TOKENIZE_VERSION, TokenizeConfig
from bessemer.tokenization.existing import copy_tokenizer, existing_fingerprint, existing_tokenizer, settings_without_effect
from bessemer.tokenization.folder import TOKENIZER_FILE, write_folder
from bessemer.tokenization.measure import (
    TextCounts,
    by_domain,
    control_tokens_of,
    shown_tokens,
    unknown_share,
    vocabulary_metrics,
)
from bessemer.tokenization.shards import ANNEAL, EncodedDocuments, ShardWriter, TokenShards
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer

#: Folder of an interrupted stage's state; the store removes it from a finished artefact.
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
    a second mixture (`anneal_epochs`); returns the metrics of the report. folder: where the path of an existing tokenizer
    starts. The bytes written depend on the documents, the settings and the seed, not on the number of threads. Documents are
    streamed: memory does not grow with the corpus, except for the trainer's table of distinct pieces.

    Killed at any moment and started again on the same `out`, it resumes with the trained tokenizer after the last complete
    shard, and the bytes are those of an uninterrupted run. State of other settings or documents in `out` is discarded.

    Raises ConfigError when there are no training documents, too few for the vocabulary, or a weight of an unknown source.
    """
    sizes = bytes_by_source(documents, progress)
    if not sum(sizes[TRAIN].values()):
        raise ConfigError(f"{documents}: holds no training documents to train a tokenizer on; see what earlier stages kept")
    identity = _identity(config, documents, seed, folder)
    training = _finished_training(out, identity)
    if training is None:
        if config.tokenizer is None:
            training = _train_tokenizer(config, documents, out / "tokenizer", sizes[TRAIN], seed, progress)
        else:
            training = _copy_existing(config.tokenizer, folder, out / "tokenizer", settings_without_effect(config), progress)
        (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        files = hash_files(out, (out / "tokenizer").iterdir())
        write_json(out / CHECKPOINTS / _TRAINING_FILE, {"identity": identity, "files": files, "metrics": training})
    else:
        progress.say("  the tokenizer was finished before the interruption")

    tokenizer = load_tokenizer(out / "tokenizer")
    tokenizer.check_bulk(texts_to_check(documents))
    encoder = _SplitEncoder(documents, out, tokenizer, config.shard_tokens, identity, progress)
    splits = {split: _split_metrics(encoder.write(split, split, sum(of_split.values()))) for split, of_split in sizes.items()}
    if ANNEAL_EPOCHS in document_schema(documents).names:
        splits[ANNEAL] = _split_metrics(encoder.write(ANNEAL, TRAIN, sum(sizes[TRAIN].values()), ANNEAL_EPOCHS))

    measured_split = VALIDATION if splits[VALIDATION]["documents"] else TRAIN
    usage = TokenShards(out / "tokens" / TRAIN).usage()
    return {
        "algorithm": config.algorithm if config.tokenizer is None else _algorithm_of(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_hash": tokenizer.hash,
        "lossless": tokenizer.lossless,
        "encoder": tokenizer.bulk.name,
        **training,
        "encoding_seconds": round(encoder.seconds, 3),
        "encoding_mb_per_second": round(encoder.bytes / 1e6 / encoder.seconds, 3) if encoder.bytes else None,
        **splits,
        **_unknown_share(tokenizer, usage),
        **vocabulary_metrics(tokenizer, usage),
        "special_tokens": control_tokens_of(tokenizer),
        **_text_metrics(documents, measured_split, tokenizer, TokenShards(out / "tokens" / measured_split)),
        "by_domain": by_domain(tokenizer),
    }


def _identity(config: TokenizeConfig, documents: Path, seed: int, folder: Path) -> str:
    """Hash of everything that the written bytes depend on."""
    existing = None if config.tokenizer is None else existing_fingerprint(config.tokenizer, folder)
    corpus = [[part.name, fingerprint_of(part)] for part in document_files(documents)]
    return hash_value([TOKENIZE_VERSION, config.output_settings(), seed, existing, corpus])


def _finished_training(out: Path, identity: str) -> dict[str, Any] | None:
    """The metrics of a tokenizer that an interrupted stage of this identity finished; None when its files have changed."""
    try:
        state = read_json(out / CHECKPOINTS / _TRAINING_FILE)
        unchanged = state["files"] == hash_files(out, (out / "tokenizer").iterdir())
        return state["metrics"] if state["identity"] == identity and unchanged else None
    except (ArtefactError, OSError, KeyError, TypeError):
        return None


def _copy_existing(path: str, folder: Path, target: Path, ignored: list[str], progress: Progress) -> dict[str, Any]:
    """Copy an existing tokenizer's files to `target`. ignored: training settings that have no effect."""
    if ignored:
        progress.say(f"  no tokenizer is trained, so these settings have no effect: {', '.join(ignored)}")
    copy_tokenizer(existing_tokenizer(path, folder), target)
    return {"training_bytes": None, "training_seconds": None}


def _train_tokenizer(
    config: TokenizeConfig, documents: Path, target: Path, sizes: Mapping[str, int], seed: int, progress: Progress
) -> dict[str, Any]:
    """Train a tokenizer and write its folder; returns the bytes that were read and the seconds it took."""
    start = time.perf_counter()
    rates = sampling_rates(sizes, config.source_weights, config.training_bytes)
    expected = sum(rates[source] * size for source, size in sizes.items())
    with progress.task("train tokenizer", total=expected / 1e6, unit="MB") as task:
        texts = TrainingTexts(documents, rates, seed, task)
        parts = train_vocabulary(
            texts,
            config.algorithm,
            config.learned_tokens,
            split=config.split,
            trainer=config.trainer,
            max_piece_length=config.max_piece_length,
        )
    write_folder(target, parts, config.chat_template, config.reserved_tokens, config.fim_tokens)
    return {"training_bytes": texts.bytes, "training_seconds": round(time.perf_counter() - start, 3)}


class _SplitEncoder:
    """Writes the token shards of splits; counts the bytes that it encoded, and the seconds."""

    def __init__(
        self, documents: Path, out: Path, tokenizer: Tokenizer, shard_tokens: int, identity: str, progress: Progress
    ) -> None:
        self._documents = documents
        self._out = out
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._identity = identity
        self._progress = progress
        self.bytes = 0
        self.seconds = 0.0

    def write(self, name: str, split: str, total_bytes: int, epochs: str = EPOCHS) -> dict[str, Any]:
        """Write the documents of `split` to the folder `name`, each as often as its column `epochs`; returns the content of
        `shards.json`."""
        start = time.perf_counter()
        writer = ShardWriter(
            self._out / "tokens" / name,
            tokenizer_hash=self._tokenizer.hash,
            vocab_size=self._tokenizer.vocab_size,
            bos_id=self._tokenizer.bos_id,
            shard_tokens=self._shard_tokens,
            scratch=self._out / CHECKPOINTS / name,
            identity=self._identity,
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
        for part in _slices(batch):
            text_bytes = pc.binary_length(part.column("text")).to_numpy().astype(np.int64)
            ids, offsets = tokenizer.encode_flat(part.column("text").to_pylist())
            yield EncodedDocuments(part.column("id"), part.column("source"), text_bytes, ids, offsets)


def _slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch in slices of about `_ENCODED_AT_ONCE` bytes of text, each of at least one document."""
    starts = np.concatenate([[0], np.cumsum(pc.binary_length(batch.column("text")).to_numpy(), dtype=np.int64)])
    first = 0
    while first < batch.num_rows:
        end = int(np.searchsorted(starts, starts[first] + _ENCODED_AT_ONCE, side="right")) - 1
        end = max(end, first + 1)
        yield batch.slice(first, end - first)
        first = end


def _split_metrics(shards: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a split from its `shards.json`. Bytes per token leave the begin tokens out."""
    text_tokens = shards["tokens"] - shards["documents"] - (1 if shards["documents"] else 0)
    return {
        "documents": shards["documents"],
        "tokens": shards["tokens"],
        "bytes": shards["bytes"],
        "bytes_per_token": round(shards["bytes"] / text_tokens, 4) if text_tokens else None,
        "fingerprint": shards["fingerprint"],
    }


def _algorithm_of(tokenizer: Tokenizer) -> str:
    return str(read_json(tokenizer.folder / TOKENIZER_FILE)["model"]["type"]).lower()


def _unknown_share(tokenizer: Tokenizer, usage: np.ndarray) -> dict[str, Any]:
    """The fraction of unknown tokens in the training text, for a tokenizer with an unknown token."""
    text_usage = usage.copy()
    text_usage[tokenizer.bos_id] = 0
    share = unknown_share(tokenizer, text_usage)
    return {} if share is None else {"unknown_share": share}


def _text_metrics(documents: Path, split: str, tokenizer: Tokenizer, shards: TokenShards) -> dict[str, Any]:
    """Fertility (tokens per word between white space) and the baselines, on the first 50 MB of a split, and the tokens of a
    short text of it for a coloured view."""
    counts = TextCounts()
    counted = 0
    sample = ""
    for batch in iterate_epochs(documents, ["text"], split, batch_rows=ROWS_AT_ONCE):
        for text in batch.column("text").to_pylist():
            counts.add(text)
            counted += 1
            if len(sample) < _SHOWN_CHARACTERS <= len(text) or not sample:
                sample = text[:_SHOWN_CHARACTERS]
        if counts.bytes >= _MEASURED_BYTES:
            break
    tokens = shards.text_tokens(counted)
    return {
        "fertility": round(tokens / counts.words, 4) if counts.words else None,
        "baselines": counts.baselines(),
        "sample_tokens": shown_tokens(tokenizer, sample),
    }


#: Documents in memory at a time.
ROWS_AT_ONCE = 1024

_CHECKED_BYTES = 400_000
_CHECKED_DOCUMENTS = 200
_CHECKED_CHARACTERS = 5_000
_SEEDS = 1 << 63


def bytes_by_source(documents: Path, progress: Progress) -> dict[str, dict[str, int]]:
    """Bytes of text by split and source, in one pass over the corpus."""
    sizes: dict[str, dict[str, int]] = {TRAIN: {}, VALIDATION: {}}
    with progress.task("measure text", unit="MB") as task:
        for batch in iterate_documents(documents, ["text", "source", "split"], batch_rows=ROWS_AT_ONCE):
            lengths = pc.binary_length(batch.column("text"))
            rows = pa.table({"split": batch.column("split"), "source": batch.column("source"), "bytes": lengths})
            for row in rows.group_by(["split", "source"]).aggregate([("bytes", "sum")]).to_pylist():
                of_split = sizes.setdefault(row["split"], {})
                of_split[row["source"]] = of_split.get(row["source"], 0) + row["bytes_sum"]
            task.advance((pc.sum(lengths).as_py() or 0) / 1e6)
    return sizes


def sampling_rates(sizes: Mapping[str, int], weights: Mapping[str, float], most_bytes: int) -> dict[str, float]:
    """The fraction of each source's text to draw, 0 … 1: proportional to its weight (1 where not named), as high as possible
    with at most `most_bytes` drawn in all.

    sizes: bytes by source. With no weights every rate is min(1, most_bytes / total). Raises ConfigError for a weight of
    an unknown source, or when nothing is left to draw.
    """
    for source in weights:
        if source not in sizes:
            raise ConfigError(f"tokenize.source_weights: the documents have no source {source!r}{nearest(source, list(sizes))}")
    weight_of = {source: weights.get(source, 1.0) for source in sizes}
    weighted_bytes = sum(weight_of[source] * size for source, size in sizes.items())
    if not weighted_bytes:
        raise ConfigError("tokenize.source_weights: every source with text has the weight 0, so there is nothing to train on")
    scale = min(1 / max(weight_of.values()), most_bytes / weighted_bytes)
    return {source: scale * weight for source, weight in weight_of.items()}


class TrainingTexts:
    """The texts drawn for training, streamed. bytes: of the texts of the last iteration."""

    def __init__(self, documents: Path, rates: Mapping[str, float], seed: int, task: Task) -> None:
        self._documents = documents
        self._rates = rates
        self._seed = seed
        self._task = task
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        self.bytes = 0
        whole = all(rate >= 1 for rate in self._rates.values())
        for batch in iterate_documents(self._documents, ["id", "source", "text"], split=TRAIN, batch_rows=ROWS_AT_ONCE):
            chosen = batch if whole else batch.filter(pa.array(self._drawn(batch), pa.bool_()))
            yield from chosen.column("text").to_pylist()
            self.bytes += pc.sum(pc.binary_length(chosen.column("text"))).as_py() or 0
            self._task.reach(self.bytes / 1e6)

    def _drawn(self, batch: pa.RecordBatch) -> list[bool]:
        names = zip(batch.column("id").to_pylist(), batch.column("source").to_pylist(), strict=True)
        return [derive_seed(self._seed, id) < self._rates[source] * _SEEDS for id, source in names]


def texts_to_check(documents: Path) -> list[str]:
    """A few hundred kilobytes of training text to compare encoders on: the first documents, which come from all sources, since
    documents are sorted by ids that are hashes. Long ones are truncated."""
    texts: list[str] = []
    taken = 0
    for batch in iterate_documents(documents, ["text"], split=TRAIN, batch_rows=_CHECKED_DOCUMENTS):
        for text in batch.column("text").to_pylist():
            texts.append(text[:_CHECKED_CHARACTERS])
            taken += len(texts[-1])
            if taken >= _CHECKED_BYTES:
                return texts
    return texts
