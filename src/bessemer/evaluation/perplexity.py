"""Bits per byte of single documents under a model: the score `perplexity` of `clean` with one of our models.

    bits per byte = Σ −log₂ p(token | begin token, tokens before it) / UTF-8 bytes of the document

Documents are split into windows without overlap, as in `training.validation`, but each document starts with the begin token and
its end is not predicted: a document's score does not depend on its neighbours, and works for models whose begin and end tokens
differ.
"""

# Shapes: B windows, T time, D hidden, V vocabulary.

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

import numpy as np
import torch

from bessemer.data.text.texts import Texts
from bessemer.model.decoder import Decoder
from bessemer.model.device import choose_device
from bessemer.model.storage.folder import load_model
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.training.data.batches import IGNORE_INDEX
from bessemer.training.head import linear_cross_entropy

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
