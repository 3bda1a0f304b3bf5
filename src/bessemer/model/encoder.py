"""Encoders, which read a text in both directions: BERT, RoBERTa, XLM-R, MPNet, ModernBERT, from their Hugging Face folders.

BERT (Devlin et al. 2019) normalises behind each residual sum and adds learnt positions to the embeddings. RoBERTa (Liu et al.
2019) and XLM-R differ in where positions begin. MPNet (Song et al. 2020) adds a bias of the tokens' distance to the scores of
attention, as T5 does. ModernBERT (Warner et al. 2024) normalises before, rotates queries and keys,
gates its feed-forward, and in two of three layers attends within a window. An encoder has no cache: each text is read once.
"""

# Shapes: B texts, T tokens, D hidden, H heads, C channels of a head.

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from bessemer.core.errors import ArtefactError

#: The kinds of `config.json` that are read.
ENCODER_KINDS = ("bert", "roberta", "xlm-roberta", "mpnet", "modernbert")
#: Distance from which on tokens share the last bucket.
_FARTHEST = 128
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": lambda hidden: functional.gelu(hidden, approximate="tanh"),
    "gelu_pytorch_tanh": lambda hidden: functional.gelu(hidden, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder, and what its kind says.

    rope_thetas: of each layer, where positions are rotations; empty: they are learnt. windows: tokens that a layer sees to
    either side; None: all. first_position: of the first token, among the learnt ones. distance_buckets: of the bias by
    distance; 0: none. num_labels: outputs of its classifier; 0: none.
    """

    kind: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    activation: str
    norm_eps: float
    pad_token: int
    token_types: int = 0
    first_position: int = 0
    has_bias: bool = True
    rope_thetas: tuple[float, ...] = ()
    windows: tuple[int | None, ...] = ()
    distance_buckets: int = 0
    num_labels: int = 0
    classifier_pooling: str = "cls"

    @property
    def is_modern(self) -> bool:
        return self.kind == "modernbert"

    @property
    def longest(self) -> int:
        """The most tokens of a text."""
        return self.max_positions - self.first_position


def read_encoder_config(folder: Path) -> EncoderConfig:
    """The settings in `config.json`. Raises ArtefactError for a folder that holds no encoder, or one of an unknown kind."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return _config(values)
    except FileNotFoundError:
        raise ArtefactError(f"{folder}: no encoder is here: config.json is missing") from None
    except KeyError as error:
        raise ArtefactError(f"{path}: the setting {error} is missing") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{path}: {error}") from None


def _config(values: Mapping[str, Any]) -> EncoderConfig:
    kind = values.get("model_type")
    architecture = (values.get("architectures") or [""])[0]
    shared: dict[str, Any] = {
        "kind": kind,
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "intermediate_size": values["intermediate_size"],
        "max_positions": values["max_position_embeddings"],
        "pad_token": values.get("pad_token_id") or 0,
        "num_labels": _labels(values) if architecture.endswith("ForSequenceClassification") else 0,
    }
    if kind in ("bert", "roberta", "xlm-roberta", "mpnet"):
        if values.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(f"positions of the type {values['position_embedding_type']!r} are not read")
        first = 0 if kind == "bert" else shared["pad_token"] + 1
        activation, eps = values.get("hidden_act", "gelu"), values.get("layer_norm_eps", 1e-12)
        shared |= {"activation": activation, "norm_eps": eps, "first_position": first}
        if kind == "mpnet":
            shared["distance_buckets"] = values.get("relative_attention_num_buckets", 32)
        else:
            shared["token_types"] = values.get("type_vocab_size", 2)
    elif kind == "modernbert":
        shared |= _modern(values)
    else:
        raise ValueError(f"encoders of the type {kind!r} are not read; known are {', '.join(ENCODER_KINDS)}")
    if shared["activation"] not in _ACTIVATIONS:
        raise ValueError(f"the activation {shared['activation']!r} is not known")
    return EncoderConfig(**shared)


def _labels(values: Mapping[str, Any]) -> int:
    return len(values["id2label"]) if "id2label" in values else int(values.get("num_labels", 2))


def _modern(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of ModernBERT: every third layer sees all tokens, the others a window; each kind has rotations of its own base."""
    layers, every = values["num_hidden_layers"], values.get("global_attn_every_n_layers", 3)
    types = values.get("layer_types") or [
        "full_attention" if layer % every == 0 else "sliding_attention" for layer in range(layers)
    ]
    ropes = values.get("rope_parameters") or {}
    thetas = {
        "full_attention": (ropes.get("full_attention") or {}).get("rope_theta", values.get("global_rope_theta", 160_000.0)),
        "sliding_attention": (ropes.get("sliding_attention") or {}).get("rope_theta", values.get("local_rope_theta", 10_000.0)),
    }
    if any(values.get(name) for name in ("norm_bias", "attention_bias", "mlp_bias")):
        raise ValueError("a ModernBERT with biases is not read")
    window = values.get("local_attention", 128) // 2
    return {
        "activation": values.get("hidden_activation", "gelu"),
        "norm_eps": values.get("norm_eps", 1e-5),
        "has_bias": False,
        "rope_thetas": tuple(float(thetas[kind]) for kind in types),
        "windows": tuple(None if kind == "full_attention" else window for kind in types),
        "classifier_pooling": values.get("classifier_pooling", "cls"),
    }


class EncoderLayer(nn.Module):
    """Attention among all tokens of a text, and a feed-forward network."""

    def __init__(self, config: EncoderConfig, number: int) -> None:
        super().__init__()
        size, bias, modern = config.hidden_size, config.has_bias, config.is_modern
        self.query_key_value = nn.Linear(size, 3 * size, bias=bias)
        self.attention_out = nn.Linear(size, size, bias=bias)
        self.attention_norm: nn.Module = nn.LayerNorm(size, config.norm_eps, bias=bias)
        if modern and number == 0:
            # the embeddings are normalised already
            self.attention_norm = nn.Identity()
        self.up = nn.Linear(size, config.intermediate_size * (2 if modern else 1), bias=bias)
        self.down = nn.Linear(config.intermediate_size, size, bias=bias)
        self.feed_forward_norm = nn.LayerNorm(size, config.norm_eps, bias=bias)
        self._heads = config.num_heads
        self._activation = _ACTIVATIONS[config.activation]
        self._is_modern = modern

    def forward(self, hidden_BTD: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """mask: (B, 1, T, T), True where a token may be seen, or what is added to the scores; None: everywhere. rotation:
        cosines and sines, (T, C)."""
        if self._is_modern:
            hidden_BTD = hidden_BTD + self._attention(self.attention_norm(hidden_BTD), mask, rotation)
            return hidden_BTD + self._feed_forward(self.feed_forward_norm(hidden_BTD))
        hidden_BTD = self.attention_norm(hidden_BTD + self._attention(hidden_BTD, mask, rotation))
        normed_BTD: Tensor = self.feed_forward_norm(hidden_BTD + self._feed_forward(hidden_BTD))
        return normed_BTD

    def _attention(self, hidden_BTD: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        parts = self.query_key_value(hidden_BTD).unflatten(-1, (3, self._heads, -1)).permute(2, 0, 3, 1, 4)
        query_BHTC, key_BHTC, value_BHTC = parts
        if rotation is not None:
            query_BHTC, key_BHTC = _rotated(query_BHTC, rotation), _rotated(key_BHTC, rotation)
        seen_BHTC = functional.scaled_dot_product_attention(query_BHTC, key_BHTC, value_BHTC, attn_mask=mask)
        out_BTD: Tensor = self.attention_out(seen_BHTC.transpose(1, 2).flatten(-2))
        return out_BTD

    def _feed_forward(self, hidden_BTD: Tensor) -> Tensor:
        inner = self.up(hidden_BTD)
        if self._is_modern:
            activated, gate = inner.chunk(2, -1)
            inner = self._activation(activated) * gate
        else:
            inner = self._activation(inner)
        out_BTD: Tensor = self.down(inner)
        return out_BTD


def _rotated(states_BHTC: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Each pair of channels (c, c + C / 2) rotated by its token's angle (Su et al. 2021, as in GPT-NeoX)."""
    cosines_TC, sines_TC = rotation
    first, second = states_BHTC.chunk(2, -1)
    return states_BHTC * cosines_TC + torch.cat((-second, first), -1) * sines_TC


def distance_bucket(distances_TT: Tensor, buckets: int) -> Tensor:
    """The bucket of each signed distance (Raffel et al. 2020, T5): a half for tokens ahead and one for those behind, each with
    a bucket of its own for short distances, and for longer ones up to 128 on a logarithmic scale."""
    half = buckets // 2
    exact, far_TT = half // 2, distances_TT.abs()
    scale = log(_FARTHEST / exact) / (half - exact)
    logarithmic_TT = exact + ((far_TT.float() / exact).log() / scale).long()
    bucket_TT = torch.where(far_TT < exact, far_TT, logarithmic_TT.clamp(max=half - 1))
    return bucket_TT + half * (distances_TT > 0)


class Encoder(nn.Module):
    """Texts in, a hidden state of each token out; or, of a classifier, its scores."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, size)
        if not config.rope_thetas:
            self.positions = nn.Embedding(config.max_positions, size)
        if config.token_types:
            self.token_types = nn.Embedding(config.token_types, size)
        if config.distance_buckets:
            self.distance_bias = nn.Embedding(config.distance_buckets, config.num_heads)
        self.embedding_norm = nn.LayerNorm(size, config.norm_eps, bias=config.has_bias)
        self.layers = nn.ModuleList(EncoderLayer(config, number) for number in range(config.num_layers))
        if config.is_modern:
            self.norm = nn.LayerNorm(size, config.norm_eps, bias=False)
        if config.num_labels:
            # of BERT the pooler, of RoBERTa and ModernBERT the first layer of the head
            self.pooler = nn.Linear(size, size, bias=config.has_bias)
            if config.is_modern:
                self.pooler_norm = nn.LayerNorm(size, config.norm_eps, bias=False)
            self.classifier = nn.Linear(size, config.num_labels)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, types_BT: Tensor | None = None) -> Tensor:
        """The last hidden states, (B, T, D). mask_BT: True for tokens, which come first. types_BT: 1 in the second text of a
        pair; None: 0 everywhere."""
        config, length = self.config, ids_BT.shape[1]
        hidden_BTD = self.embedding(ids_BT)
        if config.token_types:
            hidden_BTD = hidden_BTD + self.token_types(torch.zeros_like(ids_BT) if types_BT is None else types_BT)
        places_T = torch.arange(length, device=ids_BT.device)
        if not config.rope_thetas:
            places = (places_T + config.first_position).expand_as(ids_BT)
            # RoBERTa's padding stands at a place of its own
            places = places if not config.first_position else places.masked_fill(~mask_BT, config.pad_token)
            hidden_BTD = hidden_BTD + self.positions(places)
        hidden_BTD = self.embedding_norm(hidden_BTD)
        seen = None if bool(mask_BT.all()) else mask_BT[:, None, None, :]
        distances_TT = places_T[None, :] - places_T[:, None]
        if config.distance_buckets:
            bias_1HTT = self.distance_bias(distance_bucket(distances_TT, config.distance_buckets)).permute(2, 0, 1)[None]
            seen = bias_1HTT if seen is None else bias_1HTT.masked_fill(~seen, -torch.inf)
        rotations = {theta: self._rotation(theta, places_T, hidden_BTD.dtype) for theta in set(config.rope_thetas)}
        for number, layer in enumerate(self.layers):
            window = config.windows[number] if config.windows else None
            mask = seen
            if window is not None and window < length:
                near = (distances_TT.abs() <= window)[None, None]
                mask = near if seen is None else near & seen
            hidden_BTD = layer(hidden_BTD, mask, rotations[config.rope_thetas[number]] if config.rope_thetas else None)
        return self.norm(hidden_BTD) if config.is_modern else hidden_BTD

    def scores(self, ids_BT: Tensor, mask_BT: Tensor, types_BT: Tensor | None = None) -> Tensor:
        """The classifier's outputs of each text or pair, (B, labels)."""
        hidden_BTD = self(ids_BT, mask_BT, types_BT)
        if self.config.classifier_pooling == "mean":
            weights_BT1 = mask_BT[:, :, None].to(hidden_BTD.dtype)
            pooled_BD = (hidden_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)
        else:
            pooled_BD = hidden_BTD[:, 0]
        pooled_BD = self.pooler(pooled_BD)
        if self.config.is_modern:
            pooled_BD = self.pooler_norm(_ACTIVATIONS[self.config.activation](pooled_BD))
        else:
            pooled_BD = torch.tanh(pooled_BD)
        scores: Tensor = self.classifier(pooled_BD)
        return scores

    def _rotation(self, theta: float, places_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        channels = self.config.hidden_size // self.config.num_heads
        steps = torch.arange(0, channels, 2, dtype=torch.float32, device=places_T.device) / channels
        angles_TC = torch.outer(places_T.float(), theta**-steps).repeat(1, 2)
        return angles_TC.cos().to(dtype), angles_TC.sin().to(dtype)


def load_encoder(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Encoder:
    """An encoder from a Hugging Face folder (`config.json`, `model.safetensors`), for reading. Raises ArtefactError."""
    config = read_encoder_config(folder)
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ArtefactError(f"{folder}: model.safetensors is missing; older weights (pytorch_model.bin) are not read") from None
    except SafetensorError as error:
        raise ArtefactError(f"{path}: {error}") from None
    with torch.device("meta"):
        encoder = Encoder(config)
    try:
        encoder.load_state_dict(_renamed(tensors, config), assign=True)
    except (KeyError, RuntimeError) as error:
        raise ArtefactError(f"{path}: its tensors are not those of its config.json: {error}") from None
    return encoder.to(device, dtype).eval().requires_grad_(False)


def _renamed(tensors: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """A folder's tensors under our names. A prefix such as `bert.` is that of a model with a head."""
    own: dict[str, Tensor] = {}
    base = next((name for name in tensors if name.endswith(_EMBEDDING[config.is_modern])), None)
    if base is None:
        raise KeyError(_EMBEDDING[config.is_modern])
    prefix = base.removesuffix(_EMBEDDING[config.is_modern])
    layers = "layers" if config.is_modern else "encoder.layer"
    of_layer = _MODERN_LAYER if config.is_modern else _MPNET_LAYER if config.kind == "mpnet" else _BERT_LAYER
    if config.distance_buckets:
        own["distance_bias.weight"] = tensors[f"{prefix}encoder.relative_attention_bias.weight"]
    for ours, theirs in (_MODERN if config.is_modern else _BERT).items():
        if ours == "token_types.weight" and not config.token_types:
            continue
        own[ours] = tensors[prefix + theirs]
    for number in range(config.num_layers):
        for ours, parts in of_layer.items():
            if config.is_modern and number == 0 and ours == "attention_norm.weight":
                continue
            found = [tensors[f"{prefix}{layers}.{number}.{part}"] for part in parts]
            own[f"layers.{number}.{ours}"] = found[0] if len(found) == 1 else torch.cat(found)
    if config.num_labels:
        for ours, theirs in _HEADS[config.kind].items():
            own[ours] = tensors[prefix + theirs if theirs.startswith("pooler") else theirs]
    return own


#: The name of the embedding table, by whether the model is a ModernBERT.
_EMBEDDING = {False: "embeddings.word_embeddings.weight", True: "embeddings.tok_embeddings.weight"}
_BERT = {
    "embedding.weight": "embeddings.word_embeddings.weight",
    "positions.weight": "embeddings.position_embeddings.weight",
    "token_types.weight": "embeddings.token_type_embeddings.weight",
    "embedding_norm.weight": "embeddings.LayerNorm.weight",
    "embedding_norm.bias": "embeddings.LayerNorm.bias",
}
_MODERN = {
    "embedding.weight": "embeddings.tok_embeddings.weight",
    "embedding_norm.weight": "embeddings.norm.weight",
    "norm.weight": "final_norm.weight",
}
#: Of a layer, the tensors that make up one of ours, one below the other.
_BERT_PARTS = {
    "query_key_value": [f"attention.self.{name}" for name in ("query", "key", "value")],
    "attention_out": ["attention.output.dense"],
    "attention_norm": ["attention.output.LayerNorm"],
    "up": ["intermediate.dense"],
    "down": ["output.dense"],
    "feed_forward_norm": ["output.LayerNorm"],
}
_MPNET_PARTS = _BERT_PARTS | {
    "query_key_value": [f"attention.attn.{name}" for name in "qkv"],
    "attention_out": ["attention.attn.o"],
    "attention_norm": ["attention.LayerNorm"],
}
_BERT_LAYER, _MPNET_LAYER = (
    {f"{ours}.{kind}": [f"{theirs}.{kind}" for theirs in names] for ours, names in parts.items() for kind in ("weight", "bias")}
    for parts in (_BERT_PARTS, _MPNET_PARTS)
)
_MODERN_LAYER = {
    "query_key_value.weight": ["attn.Wqkv.weight"],
    "attention_out.weight": ["attn.Wo.weight"],
    "attention_norm.weight": ["attn_norm.weight"],
    "up.weight": ["mlp.Wi.weight"],
    "down.weight": ["mlp.Wo.weight"],
    "feed_forward_norm.weight": ["mlp_norm.weight"],
}
_ROBERTA_HEAD = {
    "pooler.weight": "classifier.dense.weight",
    "pooler.bias": "classifier.dense.bias",
    "classifier.weight": "classifier.out_proj.weight",
    "classifier.bias": "classifier.out_proj.bias",
}
_HEADS: Mapping[str, Mapping[str, str]] = {
    "bert": {
        "pooler.weight": "pooler.dense.weight",
        "pooler.bias": "pooler.dense.bias",
        "classifier.weight": "classifier.weight",
        "classifier.bias": "classifier.bias",
    },
    "roberta": _ROBERTA_HEAD,
    "xlm-roberta": _ROBERTA_HEAD,
    "mpnet": _ROBERTA_HEAD,
    "modernbert": {
        "pooler.weight": "head.dense.weight",
        "pooler_norm.weight": "head.norm.weight",
        "classifier.weight": "classifier.weight",
        "classifier.bias": "classifier.bias",
    },
}
