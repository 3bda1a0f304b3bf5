"""Bits per byte of a held-out text under a model: the cost of each token, and the sums by source, domain and position.

The text is read in windows that may overlap (Press et al. 2021, arXiv 2012.15832, section 2). With a stride shorter than the
window every token has at least `context_length − stride` tokens before it, for context_length / stride times the work.

A document's bits are those of its tokens and of the token that ends it, so the parts of each breakdown add up to the whole.
"""

# Shapes: B windows, T time, D hidden, V vocabulary.

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from bessemer.core.progress import Progress, Silent
from bessemer.data.corpus.reader import VALIDATION, iterate_documents
from bessemer.data.text.texts import Texts
from bessemer.model.cpu_kernels.logits import cross_entropy_
from bessemer.model.decoder import Decoder
from bessemer.model.device import choose_device
from bessemer.model.storage.folder import load_model
from bessemer.tokenization.shards import TokenShards
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.training.chunked_head import Head, Workspace
from bessemer.training.data.batch import IGNORE_INDEX
from bessemer.training.head import linear_cross_entropy, token_log_probs
from bessemer.training.validation import LanguageModel, Scored

# Shapes: W windows of a batch, T time, N tokens, D hidden, V vocabulary.


class _Window(NamedTuple):
    """A window of the stream: it reads from `start`, and scores the tokens after `first` up to `end`."""

    start: int
    first: int
    end: int


@torch.no_grad()
def token_nats(
    model: LanguageModel,
    shards: TokenShards,
    scored: Scored,
    *,
    context_length: int,
    batch_size: int,
    stride: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> np.ndarray:
    """−log p of every token after the stream's first, up to those that are scored, in nats: (N,), float32.

    stride: tokens from a window to the next, at most `context_length`; None: `context_length`, with the same sum as
    `training.validation.bits_per_byte`.
    """
    windows = _windows(scored.tokens, context_length, min(stride or context_length, context_length))
    nats = np.empty(scored.tokens, np.float32)
    with (progress or Silent()).task("validate", total=scored.tokens, unit="tokens") as task:
        for place in range(0, len(windows), batch_size):
            batch = windows[place : place + batch_size]
            tokens_WT = np.zeros((batch_size, context_length), np.int64)
            targets_WT = np.full((batch_size, context_length), IGNORE_INDEX, np.int64)
            for row, window in enumerate(batch):
                stream = shards.read(window.start, window.end - window.start + 1).astype(np.int64)
                tokens_WT[row, : len(stream) - 1] = stream[:-1]
                targets_WT[row, window.first - window.start : len(stream) - 1] = stream[1 + window.first - window.start :]
            hidden_WTD = model.hidden(torch.from_numpy(tokens_WT).to(device))
            targets_N, hidden_ND = torch.from_numpy(targets_WT.ravel()).to(device), hidden_WTD.flatten(0, 1)
            scored_N = targets_N != IGNORE_INDEX
            # most batches score all of their tokens, which needs no copy
            if not scored_N.all():
                targets_N, hidden_ND = targets_N[scored_N], hidden_ND[scored_N]
            losses_N = token_losses(hidden_ND, model.head_weight, targets_N, model.logit_softcap)
            nats[batch[0].first : batch[-1].end] = losses_N.float().cpu().numpy()
            task.reach(batch[-1].end)
    return nats


def _windows(tokens: int, context_length: int, stride: int) -> list[_Window]:
    ends = [*range(context_length, tokens, stride), tokens]
    firsts = [0, *ends[:-1]]
    return [_Window(max(0, first + stride - context_length), first, end) for first, end in zip(firsts, ends, strict=True)]


def token_losses(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float | None = None) -> Tensor:
    """−log softmax(hidden · weightᵀ)[target] of each token, in nats, (N,): the terms that `linear_cross_entropy` sums."""
    head, hidden_ND, weight_VD = Head.of(hidden_ND, weight_VD, softcap)
    if not head.is_compiled:
        log_probs_N, _ = token_log_probs(hidden_ND, weight_VD, targets_N, softcap=softcap)
        return -log_probs_N
    hidden, weight = hidden_ND.to(head.dtype), weight_VD.to(head.dtype)
    workspace = Workspace(head, weight, len(hidden))
    log_odds_N = torch.empty(len(hidden), dtype=head.float_dtype)
    for chunk in workspace.chunks():
        _, log_odds_N[chunk] = cross_entropy_(workspace.logits(hidden[chunk]), targets_N[chunk], wants_gradient=False)
    return -torch.nn.functional.logsigmoid(log_odds_N)


# Shapes: N scored tokens, D documents.

#: Buckets of a token's position in its document, by their first positions; the last is open.
POSITIONS = (0, 16, 64, 256, 1024, 4096)
#: Domains with the most text are named; the others are one row.
MOST_DOMAINS = 20
OTHERS = "others"


@dataclass(frozen=True)
class ScoredDocuments:
    """The scored documents, in the stream's order.

    ends_D: of each, the number of scored tokens up to its end. bytes_D: of its text. sources, domains: of each; a document
    without a URL has the domain "". bytes_N: of the text that each scored token stands for, 0 for one that ends a document;
    None where the tokenizer does not give texts back.
    """

    ends_D: np.ndarray
    bytes_D: np.ndarray
    sources: Sequence[str]
    domains: Sequence[str]
    bytes_N: np.ndarray | None


def scored_documents(shards: TokenShards, documents: Path, count: int, tokenizer: Tokenizer) -> ScoredDocuments:
    """The first `count` documents of the split `validation`, in whose order the shards are. documents: their folder."""
    index = shards.documents().slice(0, count)
    urls = islice(
        (url for batch in iterate_documents(documents, ["url"], split=VALIDATION) for url in batch["url"].to_pylist()), count
    )
    ends_D = np.cumsum(index["length"].to_numpy())
    bytes_N = None
    if tokenizer.lossless:
        sizes = np.array(
            [0 if tokenizer.is_special(id) else len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)], np.int32
        )
        bytes_N = sizes[shards.read(1, int(ends_D[-1]))]
    return ScoredDocuments(
        ends_D, index["bytes"].to_numpy(), index["source"].to_pylist(), [_domain(url) for url in urls], bytes_N
    )


def _domain(url: str | None) -> str:
    try:
        return (urlsplit(url).hostname or "") if url else ""
    except ValueError:
        return ""


def breakdown(scored: ScoredDocuments, nats: Mapping[str, np.ndarray]) -> dict[str, list[dict[str, Any]]]:
    """Rows by `source`, `domain` and `position`: those with the most text first, positions in their order.

    nats: by model the cost of each scored token, (N,). A row has its `name`, or the `first` position of its bucket; `bytes`; of
    whole documents their number; and `bits_per_byte` by model. `domain` is left out where no document has one, `position` where
    the tokenizer does not give texts back.
    """
    starts_D = np.concatenate(([0], scored.ends_D[:-1]))
    bits_D = {model: np.add.reduceat(of_model.astype(np.float64), starts_D) / math.log(2) for model, of_model in nats.items()}
    rows = {"source": _by_name(scored.sources, scored.bytes_D, bits_D)}
    if any(scored.domains):
        rows["domain"] = _by_name(_largest(scored.domains, scored.bytes_D), scored.bytes_D, bits_D)
    if scored.bytes_N is not None:
        lengths_D = scored.ends_D - starts_D
        positions_N = np.arange(scored.ends_D[-1]) - np.repeat(starts_D, lengths_D)
        buckets_N = np.searchsorted(POSITIONS, positions_N, side="right") - 1
        bytes_by_bucket = np.bincount(buckets_N, scored.bytes_N, len(POSITIONS))
        bits = {model: np.bincount(buckets_N, of_model, len(POSITIONS)) / math.log(2) for model, of_model in nats.items()}
        rows["position"] = [
            {
                "first": first,
                "bytes": int(size),
                "bits_per_byte": {model: float(of[number] / size) for model, of in bits.items()},
            }
            for number, (first, size) in enumerate(zip(POSITIONS, bytes_by_bucket, strict=True))
            if size
        ]
    return rows


def _largest(names: Sequence[str], bytes_D: np.ndarray) -> list[str]:
    """The names, with all but the MOST_DOMAINS with the most text replaced by `others`."""
    sizes: dict[str, int] = {}
    for name, size in zip(names, bytes_D.tolist(), strict=True):
        sizes[name] = sizes.get(name, 0) + size
    kept = set(sorted(sizes, key=lambda name: (-sizes[name], name))[:MOST_DOMAINS])
    return [name if name in kept else OTHERS for name in names]


def _by_name(names: Sequence[str], bytes_D: np.ndarray, bits_D: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    known = sorted(set(names))
    numbers_D = np.searchsorted(known, names)
    sizes = np.bincount(numbers_D, bytes_D, len(known))
    bits = {model: np.bincount(numbers_D, of_model, len(known)) for model, of_model in bits_D.items()}
    rows = [
        {
            "name": name,
            "documents": int((numbers_D == number).sum()),
            "bytes": int(sizes[number]),
            "bits_per_byte": {model: float(of_model[number] / sizes[number]) for model, of_model in bits.items()},
        }
        for number, name in enumerate(known)
        if sizes[number]
    ]
    return sorted(rows, key=lambda row: (-row["bytes"], row["name"]))


#: Longest window, if the model's context is longer: more distant tokens hardly change a mean.
LONGEST_WINDOW = 1024
#: Tokens of a forward pass, padding included; it bounds memory.
_BATCH_TOKENS = 8192
#: Windows are padded to a multiple of this, so that there are few shapes.
_STEP = 64


class DocumentScorer:
    """Scores documents with a model and its tokenizer, in float32, so that CPUs differ only in the last digits."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, device: torch.device) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._device = device
        self._window = min(model.config.max_position_embeddings, LONGEST_WINDOW)
        self._lock = Lock()

    def bits_per_byte(self, texts: Texts) -> np.ndarray:
        """Bits per byte of each text, float64; 0 for an empty one. Thread-safe: calls are serialised."""
        bits, lengths = np.zeros(len(texts)), np.diff(texts.offsets)
        ids, offsets = self._tokenizer.encode_flat(texts.array.to_pylist())
        with self._lock, torch.no_grad():
            for batch in self._batches(np.diff(offsets)):
                for document, nats in zip(batch[:, 0], self._nats(ids, offsets, batch), strict=True):
                    bits[document] += nats / math.log(2)
        return np.where(lengths, bits / np.maximum(lengths, 1), 0.0)

    def _batches(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Batches of windows of documents with these token counts: rows (document, first, count) of one padded length."""
        windows = [
            (document, first, min(self._window, count - first))
            for document, count in enumerate(tokens.tolist())
            for first in range(0, count, self._window)
        ]
        for length, alike in groupby(sorted(windows, key=self._length), key=self._length):
            rows, size = list(alike), max(1, _BATCH_TOKENS // length)
            for start in range(0, len(rows), size):
                yield np.array(rows[start : start + size])

    def _length(self, window: Sequence[int]) -> int:
        """The padded length of a window in tokens."""
        return min(-(-window[2] // _STEP) * _STEP, self._window)

    def _nats(self, ids: np.ndarray, offsets: np.ndarray, batch: np.ndarray) -> list[float]:
        """−log p of each window's tokens, given the token before the window and those before in it."""
        shape = (len(batch), self._length(batch[0]))
        tokens_BT, targets_BT = np.zeros(shape, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
        for row, (document, first, count) in enumerate(batch.tolist()):
            start = offsets[document] + first
            targets_BT[row, :count] = ids[start : start + count]
            tokens_BT[row, 0] = ids[start - 1] if first else self._tokenizer.bos_id
            tokens_BT[row, 1:count] = ids[start : start + count - 1]
        hidden_BTD = self._model.hidden(torch.from_numpy(tokens_BT).to(self._device))
        rows = zip(hidden_BTD, torch.from_numpy(targets_BT).to(self._device), strict=True)
        head_VD, softcap = self._model.head_weight, self._model.logit_softcap
        return [float(linear_cross_entropy(hidden_TD, head_VD, targets_T, softcap)) for hidden_TD, targets_T in rows]


_open: WeakValueDictionary[tuple[str, str], DocumentScorer] = WeakValueDictionary()
_opening = Lock()


def open_document_scorer(folder: Path, device: str = "auto") -> DocumentScorer:
    """The scorer of a model folder, shared by all threads that hold a reference; freed with the last of them.

    Raises ArtefactError for a folder without a model or tokenizer, ConfigError for a missing device.
    """
    where = choose_device(device)
    with _opening:
        scorer = _open.get((str(folder), str(where)))
        if scorer is None:
            scorer = DocumentScorer(load_model(folder, where, torch.float32), load_tokenizer(folder), where)
            _open[str(folder), str(where)] = scorer
        return scorer
