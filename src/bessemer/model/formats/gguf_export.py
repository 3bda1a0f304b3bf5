"""Exports a model folder as a GGUF file, with a Modelfile for Ollama.

llama.cpp computes with the file as the decoder does with the folder. The Modelfile says which file to run, how a conversation
is written, and when an answer ends.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.store import new_file, read_json, write_text
from bessemer.model.config import ModelConfig
from bessemer.model.families import family_of
from bessemer.model.families.layout import Stored
from bessemer.model.formats.gguf_base import GgufFamily, GgufHead, Plus, context_before, setting_tensors, shortest
from bessemer.model.formats.gguf_blocks import Floats, keeps_rows, packed_codes, write_codes
from bessemer.model.formats.gguf_families import BY_MODEL_TYPE, with_sections
from bessemer.model.formats.gguf_imatrix import ImportanceMatrix
from bessemer.model.formats.gguf_mixtures import GGUF_DTYPES, TensorTypes
from bessemer.model.formats.gguf_quantise import quantise_rows, takes_importance
from bessemer.model.initialisation import tensor_shapes
from bessemer.model.layers.positions import rotary_frequencies
from bessemer.model.quantisation.base import Codes
from bessemer.model.quantisation.quantised_decoder import dequantised_tensors, weight_name
from bessemer.model.quantisation.quantised_layers import quantised_parts
from bessemer.model.storage.folder import load_model
from bessemer.model.storage.model_config import read_model_config, refuse_scorer
from bessemer.tokenization.chat_templates import template_name
from bessemer.tokenization.folder import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from bessemer.tokenization.formats.gguf_import import TokenType

if TYPE_CHECKING:
    import gguf

    from bessemer.tokenization.formats.gguf_export import GgufTokenizer


_OF_TORCH = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_ROWS_AT_ONCE = 1 << 22
_PHI3_TOKENS = frozenset(("</s>", "<unk>", "<s>", "<|endoftext|>"))
#: Settings that do not change what a model computes, and tokens, which the tokenizer names.
_NOT_COMPARED = frozenset(
    {"model_type", "bos_token_id", "eos_token_id", "initializer_range"}
    | {"router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"}
)


class _Written(NamedTuple):
    """otherwise: how many tensors have another type than wanted, by that type and what their rows are no multiple of. weighed:
    how many tensors' codes were chosen by importance."""

    otherwise: Mapping[tuple[str, int], int]
    weighed: int


def export_gguf(
    folder: Path,
    path: Path,
    dtype: str | None = None,
    *,
    importance: ImportanceMatrix | None = None,
    rope_sections: Sequence[int] = (),
) -> list[str]:
    """Write the model and the tokenizer of a folder as a GGUF file, which is there whole or not at all.

    dtype: one of `GGUF_DTYPES`; when None, the one that the folder has: of a quantised one its codes, as they are, in Q4_0,
    Q4_1, Q8_0 or the types of its blocks. Vectors, routers and biases stay float32. importance: of the inputs, by which codes
    are chosen. rope_sections: of a Qwen2.5-VL's decoder, how many pairs of channels each of three positions turns.
    Returns what llama.cpp does otherwise, a sentence each. Raises ArtefactError for a model or a tokenizer that llama.cpp has
    no equal for, naming what it lacks, ConfigError for a type that is not known.
    """
    if dtype is not None and dtype not in GGUF_DTYPES:
        raise ConfigError(f"--dtype: there is no {dtype!r}{nearest(dtype, list(GGUF_DTYPES))}")
    # refuse before weights are loaded
    config = read_model_config(folder)
    refuse_scorer(config, folder)
    as_llama_cpp(config, folder)
    model = load_model(folder)
    config, family, notes = as_llama_cpp(model.config, folder)
    family = with_sections(rope_sections) if rope_sections else family
    tokenizer = _tokenizer(folder, config)
    notes += tokenizer.notes if tokenizer else ["the folder holds no tokenizer: llama.cpp opens the file and reads no text"]
    codes = {weight_name(name): part.stored for name, part in quantised_parts(model).items()}
    ours = {name: tensor.detach() for name, tensor in dequantised_tensors(model).items()}
    mixture = GGUF_DTYPES[dtype or _OF_TORCH[model.dtype]]
    if codes and dtype is None:
        counts = Counter(one.scheme.gguf_type(ours[name].shape[-1]) for name, one in codes.items())
        most = counts.most_common(1)[0][0]
        mixture = replace(mixture, file_type=_file_type(most)) if most else mixture
    types = TensorTypes(mixture, config.num_hidden_layers, config.tie_word_embeddings, config.num_experts or 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as unfinished:
        plan = _write(unfinished, folder, config, family, ours, tokenizer, types, codes if dtype is None else {}, importance)
    notes += [
        f"{count} {'tensor has' if count == 1 else 'tensors have'} rows that are no multiple of {size} and "
        f"{'is' if count == 1 else 'are'} kept in {kind}"
        for (kind, size), count in plan.otherwise.items()
    ]
    if importance is not None:
        notes.append(f"codes of {plan.weighed} tensors are chosen by the importance of their inputs")
        if not plan.weighed:
            raise ArtefactError("the importance matrix has none of this model's tensors; it is of another model")
    return notes


#: llama.cpp's number of the mixture in which most matrices have a type, where none is called as the type.
_MIXTURES_OF = {"Q5_0": 8, "Q5_1": 9, "Q4_K": 15, "Q5_K": 17, "IQ4_NL": 25, "IQ4_XS": 30, "MXFP4": 38}


def _file_type(kind: str) -> int:
    """llama.cpp's number of a file most of whose matrices have a type."""
    named = GGUF_DTYPES.get(kind.lower())
    return _MIXTURES_OF[kind] if named is None else named.file_type


def as_llama_cpp(config: ModelConfig, folder: Path) -> tuple[ModelConfig, GgufFamily, list[str]]:
    """A folder's decoder as llama.cpp can hold it, the architecture, and notes where that is less than all.

    Raises ArtefactError, naming the family or the settings that llama.cpp has no place for.
    """
    model_type = family_of(config).model_type
    family = BY_MODEL_TYPE.get(model_type)
    if family is None:
        raise ArtefactError(
            f"{folder}: a {model_type} model cannot be exported to GGUF; families that can: {', '.join(BY_MODEL_TYPE)}"
        )
    reduced, notes = family.reduced(config)
    lacks = lacking(reduced, family, folder)
    if lacks:
        raise ArtefactError(
            f"{folder}: this {model_type} model cannot be exported to GGUF: llama.cpp's architecture {family.architecture} "
            f"has no place for its {', '.join(lacks)}"
        )
    return reduced, family, notes


def lacking(config: ModelConfig, family: GgufFamily, place: Path) -> list[str]:
    """The settings that a file would not give back."""
    keys = {f"{family.architecture}.{name}": value for name, value in family.write(config).items()}
    ours = tensor_shapes(config)
    shapes = {stored.name: stored.shape_in(ours) for stored in family.stored(config, list(ours))}
    settings = {name: tensor for name, tensor in setting_tensors(config).items() if name in family.setting_tensors}
    again = ModelConfig.parse(family.read(GgufHead(place, family.architecture, keys, shapes, settings)))
    before, after = _compared(config), _compared(again)
    return [name for name in before if before[name] != after[name]]


def _compared(config: ModelConfig) -> dict[str, Any]:
    """Settings in a form in which the same model has the same."""
    values = {name: getattr(config, name) for name in ModelConfig.model_fields if name not in _NOT_COMPARED}
    values["layer_types"] = config.types
    values["query_pre_attn_scalar"] = float(config.query_pre_attn_scalar or config.head_dim)
    values["no_rope_layers"] = tuple(config.has_rope(layer) for layer in range(config.num_hidden_layers))
    values["rope_scaling"] = _compared_scaling(config)
    if "sliding_attention" not in config.types:
        values["sliding_window"] = values["rope_local_base_freq"] = None
    elif config.rope_local_base_freq is None and config.rope_scaling.rope_type == "default":
        values["rope_local_base_freq"] = config.rope_theta
    return {name: shortest(value) if isinstance(value, float) else value for name, value in values.items()}


def _compared_scaling(config: ModelConfig) -> Any:
    scaling = config.rope_scaling
    # frequencies are compared: different settings may give the same
    if scaling.rope_type == "llama3":
        frequencies, _ = rotary_frequencies(config.rotary_dim, config.rope_theta, scaling, config.max_position_embeddings)
        return ("llama3", tuple(float(f"{frequency:.3g}") for frequency in frequencies.tolist()))
    values = scaling.model_dump()
    if scaling.rope_type == "yarn":
        values["original_max_position_embeddings"] = context_before(config)
    return {name: _rounded(value) for name, value in values.items()}


def _rounded(value: Any) -> Any:
    """A number, or several, to as many digits as float32 holds."""
    if isinstance(value, tuple):
        return tuple(map(_rounded, value))
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _tokenizer(folder: Path, config: ModelConfig) -> GgufTokenizer | None:
    """The tokenizer, with a token for every row of the embedding."""
    if not (folder / TOKENIZER_FILE).exists():
        return None
    from bessemer.tokenization.formats.gguf_export import gguf_tokenizer

    values = gguf_tokenizer(folder)
    extra = config.vocab_size - len(values.tokens)
    if extra < 0:
        raise ArtefactError(f"{folder}: {len(values.tokens):,} tokens, and the embedding has {config.vocab_size:,} rows")
    values.tokens += [f"[PAD{id}]" for id in range(len(values.tokens), config.vocab_size)]
    values.types += [int(TokenType.UNUSED)] * extra
    if values.scores is not None:
        values.scores += [min(values.scores)] * extra
    return values


def _write(
    path: Path,
    folder: Path,
    config: ModelConfig,
    family: GgufFamily,
    ours: dict[str, Tensor],
    tokenizer: GgufTokenizer | None,
    types: TensorTypes,
    codes: Mapping[str, Codes],
    importance: ImportanceMatrix | None,
) -> _Written:
    """Write the file; codes: those of ours that are kept as they are, by the weight's name."""
    import gguf

    writer = gguf.GGUFWriter(path, family.architecture)
    writer.add_type("model")
    writer.add_name(_name(folder.resolve().name, tokenizer))
    writer.add_file_type(types.mixture.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    for name, value in family.write(config).items():
        add_key(writer, f"{family.architecture}.{name}", value)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        tokenizer.add_to(writer)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    stored = list(family.stored(config, list(ours)))
    asked = {one.name: types.of(one.name, one.shape_in(shapes)) for one in stored}
    kept = {one.name: block for one in stored if (block := _kept(one, shapes, codes)) is not None}
    asked |= {name: (block, None) for name, block in kept.items()}
    # of another model it is refused before anything is written
    weights = {one.name: _importance_of(one, shapes, asked[one.name][0], importance) for one in stored}
    settings = setting_tensors(config)
    for name, tensor in settings.items():
        add_info(writer, name, tuple(tensor.shape), "F32")
    for one in stored:
        add_info(writer, one.name, one.shape_in(shapes), asked[one.name][0])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in settings.values():
            writer.write_tensor_data(tensor.numpy())
        for one in stored:
            if one.name in kept:
                inputs = shapes[one.views[0].name][-1]
                writer.write_tensor_data(write_codes(packed_codes(one, codes), kept[one.name], inputs))
            else:
                what = f"{folder}: tensor {one.name!r}"
                writer.write_tensor_data(encoded(one.pack(ours), asked[one.name][0], what, weights[one.name]))
    finally:
        writer.close()
    otherwise = Counter((kind, 32 if kind == "F16" else 256) for kind, wanted in asked.values() if wanted is not None)
    return _Written(otherwise, sum(weight is not None for weight in weights.values()))


def _name(name: str, tokenizer: GgufTokenizer | None) -> str:
    """The folder's name. llama.cpp looks up tokens of Phi-3 in every model whose name has `phi3` or `phi-3` in it, and opens
    none that lacks them; such a model's name is written in two words."""
    if tokenizer is None or set(tokenizer.tokens) >= _PHI3_TOKENS:
        return name
    return re.sub("(phi)-?3", r"\1 3", name, flags=re.IGNORECASE)


def _importance_of(
    one: Stored, shapes: Mapping[str, tuple[int, ...]], kind: str, importance: ImportanceMatrix | None
) -> Floats | None:
    """What each input of a tensor weighs, (matrices, inputs), where its type's codes depend on that."""
    if importance is None or not takes_importance(kind):
        return None
    shape = one.shape_in(shapes)
    return importance.of(one.name, shape[0] if len(shape) == 3 else 1, shape[-1])


def _kept(one: Stored, shapes: Mapping[str, tuple[int, ...]], codes: Mapping[str, Codes]) -> str | None:
    """The type of a tensor that takes our codes as they are: rows of quantised weights of one scheme; None for another."""
    names = [place.name for place in one.views]
    if isinstance(one, Plus) or not all(name in codes for name in names):
        return None
    schemes = {codes[name].scheme for name in names}
    rows = one.dim == 0 and all(keeps_rows(place.view, shapes[place.name]) for place in one.views)
    return schemes.pop().gguf_type(shapes[names[0]][-1]) if len(schemes) == 1 and rows else None


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Write a key by the type of its value."""
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)


def add_info(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: str) -> None:
    """Announce a tensor of a number type."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[number]
    bytes = torch.Size(shape).numel() // values * size
    writer.add_tensor_info(name, shape, np.dtype(np.float32), bytes, raw_dtype=number)


def encoded(tensor: Tensor, kind: str, what: str, weights_EK: Floats | None = None) -> np.ndarray:
    """A tensor's bytes, encoded some rows at a time: (rows, bytes of a row). Raises ArtefactError for a value that half
    precision cannot hold."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    rows = tensor.reshape(-1, tensor.shape[-1])
    values, size = gguf.GGML_QUANT_SIZES[number]
    out = np.empty((rows.shape[0], rows.shape[1] // values * size), np.uint8)
    # experts have weights each
    matrices = 1 if weights_EK is None else len(weights_EK)
    step = max(_ROWS_AT_ONCE // rows.shape[1], 1)
    for matrix, (first, last) in enumerate(pairwise(range(0, len(rows) + 1, len(rows) // matrices))):
        weights_K = None if weights_EK is None else weights_EK[matrix]
        for start in range(first, last, step):
            some = rows[start : min(start + step, last)]
            out[start : start + len(some)] = _encoded_rows(some, kind, what, weights_K)
    return out


def _encoded_rows(some: Tensor, kind: str, what: str, weights_K: Floats | None) -> np.ndarray:
    if kind == "BF16":
        encoded = some.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    elif kind == "F16":
        halves = some.to(torch.float16)
        if not bool(torch.isfinite(halves).all()):
            raise ArtefactError(f"{what} holds values that half precision cannot; choose --dtype bf16 or f32")
        encoded = halves.contiguous().view(torch.uint8).numpy()
    elif kind == "F32":
        encoded = some.float().contiguous().view(torch.uint8).numpy()
    else:
        encoded = quantise_rows(some.float().contiguous().numpy(), kind, weights_K)
    return encoded.reshape(len(some), -1)


#: Our templates in the language of Ollama, Go's `text/template`. The begin token is the file's own, which it adds itself.
_TEMPLATES = {
    "chatml": """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
""",
    "llama3": """{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>

""",
}
_STOPS = {"chatml": ("<|im_end|>",), "llama3": ("<|eot_id|>",)}
#: Names of generation settings, ours and Ollama's.
_PARAMETERS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}


def write_modelfile(folder: Path, gguf: Path) -> Path:
    """Write `NAME.Modelfile` beside a GGUF file that was made of a model's folder; its path.

    A template of ours is written out; of another one Ollama makes what it can of the file's own.
    """
    lines = [f"FROM ./{gguf.name}"]
    name = _template_name(folder)
    if name is not None:
        lines.append(f'TEMPLATE """{_TEMPLATES[name]}"""')
        lines += [f'PARAMETER stop "{stop}"' for stop in _STOPS[name]]
    lines.append(f"PARAMETER num_ctx {read_model_config(folder).max_position_embeddings}")
    settings: dict[str, Any] = {}
    if (path := folder / "generation_config.json").is_file():
        settings = read_json(path, "generation settings")
    lines += [f"PARAMETER {theirs} {settings[ours]}" for ours, theirs in _PARAMETERS.items() if settings.get(ours) is not None]
    out = gguf.with_suffix(".Modelfile")
    write_text(out, "\n".join(lines) + "\n")
    return out


def _template_name(folder: Path) -> str | None:
    """The template of a folder, if it is one of ours and Ollama's form can express it."""
    beside, settings = folder / "chat_template.jinja", folder / TOKENIZER_CONFIG_FILE
    if beside.is_file():
        text = beside.read_text(encoding="utf-8")
    elif settings.is_file():
        text = read_json(settings, "tokenizer's settings").get("chat_template") or ""
    else:
        return None
    name = template_name(text)
    return name if name in _TEMPLATES else None
