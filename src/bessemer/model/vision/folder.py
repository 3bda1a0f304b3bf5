"""Models that read pictures on disk, in Hugging Face's form: LLaVA, Idefics3, SmolVLM, Gemma 3 and Qwen2.5-VL, and
encoders alone.

The spelling of tensors has changed over the versions of `transformers`: `language_model.model.…` of published LLaVAs is
`model.language_model.…` within it, and `vision_tower.vision_model.…` lacks its middle in new files. Both are read, the
published one is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import derive_seed
from bessemer.core.store import read_json, write_json
from bessemer.model.families import family_of
from bessemer.model.families.layout import Stored, TensorView
from bessemer.model.initialisation import initial_weight
from bessemer.model.quantisation.storage_parts import StoredPart
from bessemer.model.storage.folder import read_weights
from bessemer.model.storage.model_config import CONFIG, copy_tokenizer
from bessemer.model.storage.weights import (
    EMBEDDING,
    HEAD,
    Entry,
    StoredTensors,
    WeightsFile,
    check_plain,
    opening,
    weight_files,
    write_weights,
)
from bessemer.model.vision.config import (
    ARCHITECTURES,
    ENCODER_KINDS,
    VisionLanguageConfig,
    read_vision_config,
    read_vision_language_config,
    write_vision_config,
    write_vision_language_config,
)
from bessemer.model.vision.encoder import VisionEncoder
from bessemer.model.vision.model import VisionLanguageModel

#: Prefixes of our tensors' names.
_DECODER, _VISION, _ENCODER, _PROJECTOR = "decoder.", "vision.", "vision.encoder.", "vision.projector."
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
#: Files of a folder that say how pictures and prompts are prepared.
PROCESSOR_FILES = (PREPROCESSOR, PROCESSOR)
#: Tensors of files that are read past: places counted from 0, and parts of a whole SigLIP or CLIP that reads text.
_IGNORED = re.compile(r".*position_ids|text_model\..*|logit_(bias|scale)|(visual|text)_projection\..*")
#: Models that name their parts `vision_tower`, `multi_modal_projector` and `language_model`.
_TOWERS = ("llava", "gemma3")
_POOLING = re.compile(r"(model\.)?vision_tower\.(vision_model\.)?head\..*")


def is_vision_folder(folder: Path) -> bool:
    """Whether a folder holds a model that reads pictures and writes text."""
    path = folder / CONFIG
    if not path.is_file():
        return False
    values = read_json(path, "model config")
    return isinstance(values, Mapping) and values.get("model_type") in ARCHITECTURES


def read_vision_language(folder: Path) -> VisionLanguageConfig:
    """The settings of a folder's model. Raises ArtefactError for what is missing, damaged or not known."""
    path = folder / CONFIG
    values = read_json(path, "model config")
    if not isinstance(values, Mapping):
        raise ArtefactError(f"{path}: this model config is damaged (not a mapping)")
    try:
        return read_vision_language_config(values)
    except ConfigError as error:
        raise ArtefactError(f"{path}: {error}") from None


def load_vision_language(
    folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> VisionLanguageModel:
    """The model of a folder, for reading; in the stored type where `dtype` is None. Raises ArtefactError as `load_model`."""
    folder = Path(folder)
    config = read_vision_language(folder)
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    stored = find_vision_tensors(folder, config)
    weights = read_weights(stored.files, stored.shapes, torch.device(device), dtype)
    if stored.second_head is not None:
        stored.check_second_head(weights[EMBEDDING])
    _fill(model, {name if name.startswith(_VISION) else _DECODER + name: tensor for name, tensor in weights.items()})
    # the tables of rotary positions are no part of the weights
    model.decoder.to(device)
    return model.eval()


def find_vision_tensors(folder: Path, config: VisionLanguageConfig) -> StoredTensors:
    """The tensors of a model's folder: the decoder's by its own names, the encoder's and the projector's under `vision.`.
    Raises ArtefactError as `find_tensors`."""
    with torch.device("meta"):
        whole = _shapes(VisionLanguageModel(config))
    shapes = {name.removeprefix(_DECODER): shape for name, shape in whole.items()}
    stored = [
        replace(one, views=tuple(replace(view, name=view.name.removeprefix(_DECODER)) for view in one.views))
        for one in _stored(config, list(whole))
    ]
    spellings = {one.name: list(_spellings(config, one.name)) for one in stored}
    files, second = _find(folder, stored, spellings, shapes, _is_ignored(config), config.text.tie_word_embeddings)
    return StoredTensors(config.text, shapes, files, *(second or (None,)))


def save_vision_language(model: VisionLanguageModel, folder: Path, *, processor: Path | None) -> None:
    """Write a folder that `transformers` opens too. processor: a folder whose tokenizer and settings of pictures go with it."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    stored = list(_stored(model.config, list(ours)))
    _write(folder, stored, ours)
    dtype = str(model.decoder.dtype).removeprefix("torch.")
    values = write_vision_language_config(model.config) | {"dtype": dtype, "torch_dtype": dtype}
    write_json(folder / CONFIG, values)
    if processor is not None and processor.resolve() != folder.resolve():
        copy_tokenizer(processor, folder, PROCESSOR_FILES)


def load_vision_encoder(
    folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> VisionEncoder:
    """An encoder alone, or that of a whole SigLIP, SigLIP2 or CLIP. Raises ArtefactError."""
    folder = Path(folder)
    path = folder / CONFIG
    try:
        config = read_vision_config(read_json(path, "model config"))
    except ConfigError as error:
        raise ArtefactError(f"{path}: {error}") from None
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    stored = [Stored(f"vision_model.{name}", (TensorView(name),)) for name in encoder.state_dict()]
    spellings = {one.name: [one.name, one.name.removeprefix("vision_model.")] for one in stored}
    shapes = _shapes(encoder)
    files, _ = _find(folder, stored, spellings, shapes, _IGNORED.fullmatch)
    _fill(encoder, read_weights(files, shapes, torch.device(device), dtype))
    return encoder.eval()


def save_vision_encoder(encoder: VisionEncoder, folder: Path) -> None:
    """Write an encoder alone, as `transformers` opens it. Raises ConfigError for one that only lies within other models."""
    architecture = ENCODER_KINDS[encoder.config.model_type]
    if architecture is None:
        raise ConfigError(f"an encoder of the type {encoder.config.model_type} is stored within its model alone")
    folder.mkdir(parents=True, exist_ok=True)
    ours = {name: tensor.detach() for name, tensor in encoder.state_dict().items()}
    _write(folder, [Stored(f"vision_model.{name}", (TensorView(name),)) for name in ours], ours)
    dtype = str(next(iter(ours.values())).dtype).removeprefix("torch.")
    write_json(
        folder / CONFIG,
        {"architectures": [architecture], **write_vision_config(encoder.config), "dtype": dtype, "torch_dtype": dtype},
    )


@torch.no_grad()
def initial_vision_language(config: VisionLanguageConfig, seed: int) -> VisionLanguageModel:
    """A new model: the decoder as `initial_decoder`; matrices of the encoder and the projector normal with a variance of one
    over their inputs (LeCun et al. 1998), positions with one over the width, as SigLIP's; norms 1, biases 0.

    With the decoder's deviation of 0.02 a small encoder's patches differ so little that it learns nothing for a long time.
    """
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    weights = {}
    for name, shape in _shapes(model).items():
        if name.startswith(_DECODER):
            weights[name] = initial_weight(name.removeprefix(_DECODER), shape, config.text, seed)
        else:
            weights[name] = _initial_of_vision(name, shape, seed)
    _fill(model, weights)
    return model.eval()


# -- inside


def _initial_of_vision(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if name.endswith("mm_soft_emb_norm.weight"):
        # the scale is this and 1
        return torch.zeros(shape)
    if len(shape) < 2:
        # Qwen2.5-VL's projector calls its norm `ln_q`
        is_norm = ("norm" in name or "ln_q" in name) and name.endswith(".weight")
        return torch.ones(shape) if is_norm else torch.zeros(shape)
    generator = torch.Generator().manual_seed(derive_seed(seed, "weights", name))
    is_by_input = name.endswith("mm_input_projection_weight")
    inputs = shape[0] if is_by_input else math.prod(shape[1:])
    return torch.empty(shape).normal_(0.0, inputs**-0.5, generator=generator)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.load_state_dict(weights, assign=True)


def _stored(config: VisionLanguageConfig, names: Sequence[str]) -> Iterator[Stored]:
    """The tensors of a model's files under their published names."""
    ours = [name.removeprefix(_DECODER) for name in names if name.startswith(_DECODER)]
    for one in family_of(config.text).stored(config.text, ours):
        views = tuple(replace(view, name=_DECODER + view.name) for view in one.views)
        yield replace(one, name=_text_name(config, one.name), views=views)
    if config.vision.is_native:
        for name in names:
            if name.startswith(_ENCODER):
                yield Stored("visual." + name.removeprefix(_ENCODER), (TensorView(name),))
            elif name.startswith(_PROJECTOR):
                yield Stored("visual.merger." + name.removeprefix(_PROJECTOR), (TensorView(name),))
        return
    is_tower = config.model_type in _TOWERS
    encoder = "vision_tower.vision_model." if is_tower else "model.vision_model."
    projector = "multi_modal_projector." if is_tower else "model.connector.modality_projection."
    for name in names:
        if name.startswith(_ENCODER):
            yield Stored(encoder + name.removeprefix(_ENCODER), (TensorView(name),))
        elif name.startswith(_PROJECTOR):
            yield Stored(projector + name.removeprefix(_PROJECTOR), (TensorView(name),))


def _text_name(config: VisionLanguageConfig, name: str) -> str:
    if config.vision.is_native:
        return name
    if config.model_type in _TOWERS:
        return f"language_model.{name}"
    return name if not name.startswith("model.") else f"model.text_model.{name.removeprefix('model.')}"


def _spellings(config: VisionLanguageConfig, name: str) -> Iterator[str]:
    """The names under which a file may hold a tensor that is published as `name`."""
    yield name
    if config.vision.is_native:
        yield f"model.{name}"
        if name.startswith("model."):
            yield name.replace("model.", "model.language_model.", 1)
        return
    if config.model_type not in _TOWERS:
        return
    shorter = name.replace("vision_tower.vision_model.", "vision_tower.")
    yield shorter
    yield f"model.{name}"
    yield f"model.{shorter}"
    yield name.replace("language_model.model.", "model.language_model.")
    if name == f"language_model.{HEAD}":
        yield HEAD


def _is_ignored(config: VisionLanguageConfig) -> Callable[[str], object]:
    return lambda name: _IGNORED.fullmatch(name) or (config.model_type in _TOWERS and _POOLING.fullmatch(name))


def _find(
    folder: Path,
    stored: Sequence[Stored],
    spellings: Mapping[str, Sequence[str]],
    shapes: dict[str, tuple[int, ...]],
    is_ignored: Callable[[str], object],
    is_tied: bool = False,
) -> tuple[dict[Path, dict[str, Stored | StoredPart]], tuple[Path, str] | None]:
    """The place of each tensor in the files, and where these hold the tied embedding a second time, as the head.

    Raises ArtefactError for a missing or an unexpected tensor, or one of another shape.
    """
    by_name = {name: one for one in stored for name in spellings[one.name]}
    missing = {one.name for one in stored}
    files: dict[Path, dict[str, Stored | StoredPart]] = {}
    second_head = None
    for path in weight_files(folder):
        here: dict[str, Stored | StoredPart] = {}
        with opening(path):
            file = WeightsFile(path)
            for name in file.names():
                one = by_name.get(name)
                if one is None:
                    if is_tied and name.endswith(HEAD):
                        second_head = (path, name)
                    elif not is_ignored(name):
                        raise ArtefactError(f"{path}: unexpected tensor {name!r}; config.json describes no such part")
                    continue
                check_plain(one.shape_in(shapes), name, file, path)
                here[name] = one
                missing.discard(one.name)
        files[path] = here
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ArtefactError(f"{folder}: tensor {min(missing)!r}{more} is missing from the weights")
    return files, second_head


def _write(folder: Path, stored: Sequence[Stored], ours: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    entries = [Entry(one.name, one.shape_in(shapes), ours[one.views[0].name].dtype) for one in stored]
    write_weights(folder, entries, (one.pack(ours) for one in stored))
