"""A model on disk: a Hugging Face folder with `config.json`, `model.safetensors`, and the tokenizer's files.

Nothing in it is executed: no pickle is opened and no remote code is run.

A reward model or a critic has a scalar head in place of the language head: a linear layer without bias over the states after
the last norm, stored as `score.weight`, as in Hugging Face's `…ForSequenceClassification`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from bessemer.core.errors import ArtefactError
from bessemer.core.store import read_json
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.families import family_of
from bessemer.model.families.layout import Stored, whole
from bessemer.model.initialisation import empty_decoder, fill, initial_weight, tensor_shapes
from bessemer.model.quantisation.quantised_decoder import replace_with_quantised_modules, set_dtype
from bessemer.model.quantisation.quantised_layers import is_quantised
from bessemer.model.quantisation.storage import (
    layout_of,
    read_layout,
    read_settings,
    schemes_of,
)
from bessemer.model.quantisation.storage_parts import StoredPart
from bessemer.model.storage.library import import_advice
from bessemer.model.storage.model_config import CONFIG, read_model_config, refuse_scorer, write_model_config
from bessemer.model.storage.weights import (
    DTYPES,
    EMBEDDING,
    Entry,
    WeightsFile,
    find_tensors,
    opening,
    write_weights,
)


def save_model(model: Decoder, folder: Path, *, tokenizer: Path | None, shard_bytes: int | None = None) -> None:
    """Write a model folder that `transformers` opens too; each file is whole or absent.

    tokenizer: a folder whose tokenizer files and generation settings go with the model (another model's will do).
    shard_bytes: the most that a file of weights holds; all in one when None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    if is_quantised(model):
        stored, parts, settings, config, _ = layout_of(model.config, schemes_of(model))
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
    weights = read_weights(on_disk.files, on_disk.shapes, torch.device(device), dtype)
    if on_disk.second_head is not None:
        on_disk.check_second_head(weights[EMBEDDING])
    if not on_disk.config.num_nextn_predict_layers:
        schemes = {name: scheme for name, scheme in schemes.items() if not name.startswith("mtp.")}
    model = replace_with_quantised_modules(empty_decoder(on_disk.config), schemes)
    # norms are never quantised: their dtype is the model's
    set_dtype(model, weights["norm.weight"].dtype)
    # moves the tables of rotary positions as well
    return fill(model, weights).to(device)


def read_weights(
    files: Mapping[Path, Mapping[str, Stored | StoredPart]],
    shapes: dict[str, tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Every tensor of a model by our name. files, shapes: as of `StoredTensors`.

    A tensor that the file holds as ours is taken as it is; one that is spread or packed there is filled piece by piece,
    so that nothing is in memory twice.
    """
    weights: dict[str, Tensor] = {}
    for path, tensors in files.items():
        with opening(path):
            file = WeightsFile(path)
            for name, stored in tensors.items():
                if isinstance(stored, StoredPart):
                    _take_codes(stored, file, weights, device)
                    continue
                _, kind = file.describe(name)
                as_it_is = stored.is_whole and device.type == "cpu" and (dtype is None or DTYPES.get(dtype) == kind)
                tensor = file.kept(name) if as_it_is else file.passing(name)
                _take(stored, tensor, weights, shapes, device, dtype)
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
