"""Texts, or pairs of texts, as padded batches for the encoder of a folder: what embedders and cross-encoders share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bessemer.core.errors import ArtefactError
from bessemer.model.encoder import ENCODER_KINDS, load_encoder

# Shapes: N texts, B of a batch, T tokens of its longest.

#: Tokens of a batch of texts, its padding included. On a processor states of few tokens stay in its caches, and texts of a
#: batch are of one length; a GPU wants many.
_TOKENS_AT_ONCE, _TOKENS_AT_ONCE_ON_GPU = 1024, 8192


class EncoderBatch(NamedTuple):
    """Texts of about a length. places_B: of each text among those given. types_BT: 1 in the second text of a pair; None where
    the encoder does not tell them apart."""

    places_B: np.ndarray
    ids_BT: Tensor
    mask_BT: Tensor
    types_BT: Tensor | None


class EncoderTexts:
    """An encoder's folder, opened: the encoder, its tokenizer, and the most tokens of a text as its files say."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Raises ArtefactError for a folder without an encoder or a tokenizer."""
        self.encoder = load_encoder(folder, device)
        self.device = torch.device(device)
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing more specific
            raise ArtefactError(f"{folder / 'tokenizer.json'}: {error}") from None
        longest = self.encoder.config.longest
        given = (
            read_values(folder / "sentence_bert_config.json").get("max_seq_length")
            or read_values(folder / "tokenizer_config.json").get("model_max_length")
            or longest
        )
        self.longest = min(int(given), longest)
        self._tokenizer.no_padding()
        # of a pair, tokens are taken from the longer text
        self._tokenizer.enable_truncation(self.longest)

    def batches(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> Iterator[EncoderBatch]:
        """Batches that together hold every text, or pair, once, in no order."""
        encodings = self._tokenizer.encode_batch(list(texts))
        lengths_N = np.array([len(encoding.ids) for encoding in encodings], np.int64)
        # texts of a length together, so that little is padded
        order_N = np.argsort(-lengths_N, kind="stable")
        first = 0
        most = _TOKENS_AT_ONCE if self.device.type == "cpu" else _TOKENS_AT_ONCE_ON_GPU
        while first < len(order_N):
            count = max(1, most // max(1, int(lengths_N[order_N[first]])))
            places_B = order_N[first : first + count]
            yield self._batch(places_B, [encodings[place] for place in places_B])
            first += count

    def _batch(self, places_B: np.ndarray, encodings: Sequence[Any]) -> EncoderBatch:
        config = self.encoder.config
        shape = (len(encodings), max(len(encoding.ids) for encoding in encodings))
        ids_BT = torch.full(shape, config.pad_token)
        mask_BT = torch.zeros(shape, dtype=torch.bool)
        types_BT = torch.zeros(shape, dtype=torch.int64)
        for row, encoding in enumerate(encodings):
            count = len(encoding.ids)
            ids_BT[row, :count] = torch.tensor(encoding.ids)
            types_BT[row, :count] = torch.tensor(encoding.type_ids)
            mask_BT[row, :count] = True
        # RoBERTa has one type, whatever its tokenizer says
        types = types_BT.to(self.device) if config.token_types > 1 else None
        return EncoderBatch(places_B, ids_BT.to(self.device), mask_BT.to(self.device), types)


def read_values(path: Path) -> Any:
    """The values of a JSON file; {} where it is missing. Raises ArtefactError for one that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ArtefactError(f"{path}: {error}") from None


def holds_encoder(folder: Path) -> bool:
    """Whether a model's folder holds an encoder of a known kind; otherwise it is taken for a language model."""
    return read_values(folder / "config.json").get("model_type") in ENCODER_KINDS
