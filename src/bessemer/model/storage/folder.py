"""A model on disk: a Hugging Face folder with `config.json`, `model.safetensors`, and the tokenizer's files.

Nothing in it is executed: no pickle is opened and no remote code is run.

A reward model or a critic has a scalar head in place of the language head: a linear layer without bias over the states after
the last norm, stored as `score.weight`, as in Hugging Face's `…ForSequenceClassification`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.store import check_format, read_json, write_json
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.families import FAMILIES, family_of, read_config, write_config
from bessemer.model.families.layout import Stored, whole
from bessemer.model.initialisation import empty_decoder, fill, initial_weight, tensor_shapes
from bessemer.model.quantisation.quantised_decoder import replace_with_quantised_modules, set_dtype
from bessemer.model.quantisation.quantised_layers import is_quantised
from bessemer.model.quantisation.storage import (
    OWN_FORM,
    QUANTIZATION,
    StoredPart,
    layout_of,
    read_layout,
    read_settings,
    schemes_of,
)
from bessemer.model.storage.library import import_advice
from bessemer.model.storage.weights import (
    DTYPES,
    EMBEDDING,
    Entry,
    StoredTensors,
    WeightsFile,
    find_tensors,
    opening,
    write_weights,
)

#: Format number of a model folder, under `bessemer` in its config.json.
MODEL_FORMAT = 1

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
#: Generation settings with the same name in `SamplingParams`; the others belong to methods of `transformers`.
_SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    GENERATION_CONFIG,
)


def write_model_config(
    config: ModelConfig,
    dtype: torch.dtype,
    folder: Path,
    *,
    tokenizer: Path | None,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write what a model folder holds beside its weights: the tokenizer's files, as for `save_model`, and `config.json`.

    quantization: its `quantization_config`, where weights are quantised.
    """
    if tokenizer is not None and tokenizer.resolve() != folder.resolve():
        for name in TOKENIZER_FILES:
            if (tokenizer / name).exists():
                shutil.copyfile(tokenizer / name, folder / name)
    tokenizer_file = folder / "tokenizer.json"
    ours = {"format": MODEL_FORMAT, "tokenizer_hash": hash_file(tokenizer_file) if tokenizer_file.exists() else None}
    values = huggingface_config(config, str(dtype).removeprefix("torch."))
    quantised = {QUANTIZATION: dict(quantization)} if quantization else {}
    write_json(folder / CONFIG, values | quantised | {"bessemer": ours})


def huggingface_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """`config.json` as `transformers` reads it, with everything explicit: its defaults are another model's."""
    family = family_of(config)
    return {
        "model_type": family.model_type,
        **write_config(family, config),
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def read_model_config(folder: Path) -> ModelConfig:
    """The config of a model folder. Raises ArtefactError when it is missing, damaged, or not a model that we know."""
    path = folder / CONFIG
    values = read_json(path, "model config")
    if not isinstance(values, dict):
        raise ArtefactError(f"{path}: this model config is damaged (not a mapping)")
    if "bessemer" in values:
        check_format(values["bessemer"].get("format"), MODEL_FORMAT, path, "model")
    if "auto_map" in values:
        raise ArtefactError(f"{path}: it asks to run code that comes with the model ('auto_map'); bessemer runs no such code")
    family = FAMILIES.get(values.get("model_type", ""))
    if family is None:
        known = ", ".join(FAMILIES)
        raise ArtefactError(f"{path}: unknown architecture {values.get('model_type')!r}; supported: {known}")
    settings = read_settings(values, path)
    for name in family.required:
        if values.get(name) is None:
            raise ArtefactError(f"{path}: {name!r} is missing")
        if not isinstance(values[name], int):
            raise ArtefactError(f"{path}: {name}: input should be a valid integer, got {values[name]!r}")
    try:
        config = read_config(family, values)
        own = settings is not None and settings["quant_method"] == OWN_FORM
        return config.with_changes(model_type=settings.get("model_type")) if settings and own else config
    except ConfigError as error:
        raise ArtefactError(f"{path}: {error}") from None
    except KeyError as error:
        raise ArtefactError(f"{path}: {error.args[0]!r} is missing") from None


def holds_codes(folder: Path) -> bool:
    """Whether a folder's model is quantised."""
    return read_settings(read_json(folder / CONFIG, "model config"), folder / CONFIG) is not None


def refuse_quantised(folder: Path) -> None:
    """Raise ArtefactError for a model whose weights are codes: training needs them as numbers."""
    if holds_codes(folder):
        raise ArtefactError(
            f"{folder}: this model is quantised, and only whole weights can be trained or changed; take the model that it was "
            "made from"
        )


def refuse_scorer(config: ModelConfig, folder: Path) -> None:
    """Raise ArtefactError for a reward model, where a language model is needed."""
    if config.num_scores:
        raise ArtefactError(
            f"{folder}: this is a reward model, which gives scores and no text; take the language model that it was made from"
        )


def read_sampling_settings(folder: Path) -> dict[str, Any]:
    """How the makers of a model say that it is sampled, by the names of `SamplingParams`; what they leave out is missing.

    A model that is sampled at no stated temperature is at 1, and `do_sample: false` is a temperature of 0.
    """
    path = folder / GENERATION_CONFIG
    given = read_json(path, "file of generation settings") if path.exists() else {}
    settings = {name: given[name] for name in _SAMPLING_SETTINGS if given.get(name) is not None}
    if given.get("do_sample") is False:
        return settings | {"temperature": 0.0}
    is_sampled = given.get("do_sample") or settings.keys() - {"repetition_penalty"}
    return ({"temperature": 1.0} if is_sampled else {}) | settings


def read_end_tokens(folder: Path) -> frozenset[int]:
    """The tokens at which a model's answer ends, as its generation settings list them; none when they do not."""
    path = folder / GENERATION_CONFIG
    if not path.exists():
        return frozenset()
    ends = read_json(path, "file of generation settings").get("eos_token_id")
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def save_model(model: Decoder, folder: Path, *, tokenizer: Path | None, shard_bytes: int | None = None) -> None:
    """Write a model folder that `transformers` opens too; each file is whole or absent.

    tokenizer: a folder whose tokenizer files and generation settings go with the model (another model's will do).
    shard_bytes: the most that a file of weights holds; all in one when None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    if is_quantised(model):
        stored, parts, settings, config = layout_of(model.config, schemes_of(model))
    else:
        config = model.config
        stored, parts, settings = list(family_of(config).stored(config, list(ours))), [], None
    entries = [Entry(one.name, one.shape_in(shapes), ours[one.views[0].name].dtype) for one in stored]
    entries += [Entry(part.name, part.shape, part.dtype) for part in parts]
    tensors = chain((one.pack(ours) for one in stored), (part.packed(ours) for part in parts))
    write_weights(folder, entries, tensors, shard_bytes)
    write_model_config(config, model.dtype, folder, tokenizer=tokenizer, quantization=settings)


def save_initial_model(config: ModelConfig, seed: int, folder: Path, *, tokenizer: Path | None) -> None:
    """`save_model` of `initial_decoder(config, seed)`, to the last byte, with each tensor drawn when it is written: memory is
    that of the largest one, and of the form in which its family stores it."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = tensor_shapes(config)
    stored = list(family_of(config).stored(config, list(shapes)))

    def tensors() -> Iterator[Tensor]:
        ours: dict[str, Tensor] = {}
        for one in stored:
            names = [place.name for place in one.views]
            # consecutive files' tensors share one of ours: experts are stored one by one
            ours = {name: tensor for name, tensor in ours.items() if name in names}
            for name in names:
                if name not in ours:
                    ours[name] = initial_weight(name, shapes[name], config, seed)
            yield one.pack(ours)

    write_weights(folder, [Entry(one.name, one.shape_in(shapes), torch.float32) for one in stored], tensors())
    write_model_config(config, torch.float32, folder, tokenizer=tokenizer)


def load_model(
    folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, *, scores: bool = False
) -> Decoder:
    """The decoder of a model folder, or of a GGUF file, in evaluation mode; in the stored type when `dtype` is None.

    What a file holds as we do is mapped into memory and not copied; what is converted, or lies otherwise in the file, is so
    tensor by tensor. Memory is that of the model and of one tensor (docs/model-formats.md has measurements).
    scores: whether a model may have scores in place of logits.
    Raises ArtefactError naming the file and what is wrong: a missing or unexpected tensor, a shape that disagrees with
    config.json, a damaged file, an unknown architecture, a reward model where a language model is asked for.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf" and folder.is_file():
        from bessemer.model.formats.gguf_open import open_gguf

        return open_gguf(folder, device, dtype).model
    if not folder.is_dir():
        raise ArtefactError(f"{folder}: no such model folder{import_advice(str(folder))}")
    config = read_model_config(folder)
    if not scores:
        refuse_scorer(config, folder)
    settings = read_settings(read_json(folder / CONFIG), folder / CONFIG)
    layout, schemes = read_layout(config, settings, folder / CONFIG) if settings else (None, {})
    on_disk = find_tensors(folder, config, layout)
    weights = _read_weights(on_disk, torch.device(device), dtype)
    if not on_disk.config.num_nextn_predict_layers:
        schemes = {name: scheme for name, scheme in schemes.items() if not name.startswith("mtp.")}
    model = replace_with_quantised_modules(empty_decoder(on_disk.config), schemes)
    # norms are never quantised: their dtype is the model's
    set_dtype(model, weights["norm.weight"].dtype)
    # moves the tables of rotary positions as well
    return fill(model, weights).to(device)


def _read_weights(on_disk: StoredTensors, device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Every tensor of the decoder by our name.

    A tensor that the file holds as ours is taken as it is; one that is spread or packed there is filled piece by piece,
    so that nothing is in memory twice.
    """
    weights: dict[str, Tensor] = {}
    for path, tensors in on_disk.files.items():
        with opening(path):
            file = WeightsFile(path)
            for name, stored in tensors.items():
                if isinstance(stored, StoredPart):
                    _take_codes(stored, file, weights, device)
                    continue
                _, kind = file.describe(name)
                as_it_is = stored.is_whole and device.type == "cpu" and (dtype is None or DTYPES.get(dtype) == kind)
                tensor = file.kept(name) if as_it_is else file.passing(name)
                _take(stored, tensor, weights, on_disk.shapes, device, dtype)
    if on_disk.second_head is not None:
        on_disk.check_second_head(weights[EMBEDDING])
    return weights


def _take(
    stored: Stored,
    tensor: Tensor,
    weights: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Put one tensor of a file where it belongs among ours."""
    if stored.is_whole:
        weights[stored.views[0].name] = tensor.to(device, dtype)
        return
    for place in stored.views:
        if place.name not in weights:
            weights[place.name] = torch.empty(shapes[place.name], dtype=dtype or tensor.dtype, device=device)
    stored.unpack(tensor, weights)


def _take_codes(part: StoredPart, file: WeightsFile, weights: dict[str, Tensor], device: torch.device) -> None:
    """Put a file's codes, scales or zeros where they belong among ours."""
    if part.unpack is None:
        return
    tensor = part.unpack(file.kept(part.name)).to(device)
    if part.view is whole:
        weights[part.ours] = tensor
        return
    if part.ours not in weights:
        weights[part.ours] = torch.empty(part.ours_shape, dtype=tensor.dtype, device=device)
    part.view(weights[part.ours]).copy_(tensor)


SCORE = "score.weight"


def scorer_config(config: ModelConfig) -> ModelConfig:
    """The config of a model with a scalar head in place of its language head and MTP modules; that of one with scores as it
    is."""
    return config if config.num_scores else config.with_changes(num_scores=1, num_nextn_predict_layers=0)


def new_head(config: ModelConfig, seed: int) -> Tensor:
    """The weight of a head of a config with scores, before training: small, so that rewards begin near 0."""
    return initial_weight(SCORE, (config.num_scores, config.hidden_size), config, seed)


def as_scorer(model: Decoder, seed: int) -> Decoder:
    """A language model as one with a new scalar head, which shares its other tensors; one with scores as it is."""
    if model.config.num_scores:
        return model
    config = scorer_config(model.config)
    scorer = empty_decoder(config)
    weights = model.state_dict()
    kept = {name: weights[name] for name in scorer.state_dict() if name != SCORE}
    return fill(scorer, kept | {SCORE: new_head(config, seed).to(model.device, model.dtype)}).to(model.device)


def load_scorer(
    folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, *, seed: int
) -> Decoder:
    """The model of a folder with its scalar head; of a language model, or a GGUF file, with a new one drawn from `seed`.

    Raises ArtefactError as `load_model`.
    """
    return as_scorer(load_model(folder, device, dtype, scores=True), seed)
