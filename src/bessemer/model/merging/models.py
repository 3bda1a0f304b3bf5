"""Merges models' folders into one, tensor by tensor.

All have one architecture, so their files hold the same tensors: each is read from every folder, merged and written before the
next. Memory is that of the largest tensor, a few times for each model. The new folder is there whole or not at all, and is a
function of the folders, the settings and the seed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import derive_seed, hash_file
from bessemer.core.progress import Progress
from bessemer.core.store import follow, new_folder, read_json, write_json
from bessemer.model.adapters import Adapter
from bessemer.model.adapters.folder import read_adapter
from bessemer.model.config import ModelConfig
from bessemer.model.families import family_of
from bessemer.model.families.layout import Stored
from bessemer.model.initialisation import tensor_shapes
from bessemer.model.merging.config import METHODS, MergeConfig, describe, is_folder, value_at
from bessemer.model.merging.methods import DeltaOptions, linear, merge_deltas, slerp
from bessemer.model.storage.folder import load_model
from bessemer.model.storage.model_config import CONFIG, read_model_config, refuse_quantised, write_model_config
from bessemer.model.storage.tuned_folder import tuned_model
from bessemer.model.storage.weights import Entry, WeightsFile, find_tensors, opening, write_weights
from bessemer.tokenization.folder import TOKENIZER_FILE
from bessemer.tokenization.tokenizer import load_tokenizer

#: Record of a merge, in the new folder.
RECORD = "merge.json"
#: Settings that models may differ in: they change nothing for texts within the shorter context, or are ids that the tokenizer
#: has too.
_MAY_DIFFER = frozenset(
    {"model_type", "bos_token_id", "eos_token_id", "initializer_range", "max_position_embeddings"}
    | {"router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"}
)
_LAYER = re.compile(r"layers\.(\d+)\.")


class ModelPlace(NamedTuple):
    """The place of a model to merge. name: as messages call it. adapter: folder of an adapter that is merged into the model
    while it is read."""

    name: str
    folder: Path
    adapter: Path | None = None


def place_of(name: str, folder: Path) -> ModelPlace:
    """The place of a folder's model; for a folder that `finetune` wrote, its base with its adapter. Raises as `tuned_model`."""
    tuned = tuned_model(folder)
    return ModelPlace(name, folder) if tuned is None else ModelPlace(name, tuned.folder, tuned.adapter)


class MergeSource:
    """An opened model: its tensors by the names of its files, with its adapter in them. Files are mapped, not read."""

    def __init__(self, place: ModelPlace) -> None:
        self.name = place.name
        self.folder = place.folder
        if place.folder.is_file():
            raise ArtefactError(
                f"{place.folder}: a GGUF file is not merged; import it first: bessemer import {place.folder} FOLDER"
            )
        config = read_model_config(place.folder)
        refuse_quantised(place.folder)
        on_disk = find_tensors(place.folder, config)
        self.config: ModelConfig = on_disk.config
        self._shapes = on_disk.shapes
        self._files: dict[str, tuple[Path, WeightsFile, str]] = {}
        for path, tensors in on_disk.files.items():
            with opening(path):
                file = WeightsFile(path)
            for disk_name, one in tensors.items():
                assert isinstance(one, Stored), disk_name
                self._files[one.name] = (path, file, disk_name)
        self._adapter: Adapter | None = None
        if place.adapter is not None:
            self._adapter = read_adapter(place.adapter, load_model(place.folder, scores=True), dtype=torch.float32)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the files' first tensor, as that of the model."""
        _, file, disk_name = next(iter(self._files.values()))
        return file.kept(disk_name).dtype

    def read(self, stored: Stored) -> Tensor:
        """A copy of a tensor of the files in float32; of a float64 tensor in float64."""
        path, file, disk_name = self._files[stored.name]
        with opening(path):
            tensor = file.passing(disk_name)
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        return tensor if self._adapter is None else self._adapted(stored, tensor, self._adapter)

    def _adapted(self, stored: Stored, tensor: Tensor, adapter: Adapter) -> Tensor:
        updates = {place.name: adapter.updates.get(place.name.removesuffix(".weight")) for place in stored.views}
        if not any(updates.values()):
            return tensor
        ours = {name: torch.empty(self._shapes[name], dtype=tensor.dtype) for name in updates}
        stored.unpack(tensor, ours)
        return stored.pack(
            {name: weight if (update := updates[name]) is None else update.on(weight) for name, weight in ours.items()}
        )


def merge_models(
    config: MergeConfig,
    places: Sequence[ModelPlace],
    base: ModelPlace | None,
    out: Path,
    *,
    seed: int,
    progress: Progress,
    shard_bytes: int | None = None,
) -> dict[str, Any]:
    """Merge models into the folder `out`; returns what its record holds.

    places: those of `config.models`, in their order. base: that of `config.base`. seed: used where the settings have none.
    The tokenizer, its template and the generation settings are the first model's. Raises ArtefactError for models that do not
    fit each other, and ConfigError for settings that fit none of their tensors.
    """
    sources = [MergeSource(place) for place in places]
    base_source = None if base is None else MergeSource(base)
    check_alike([*sources, *([base_source] if base_source else [])], merged=len(sources))
    first = sources[0]
    shapes = tensor_shapes(first.config)
    stored = list(family_of(first.config).stored(first.config, list(shapes)))
    dtype = first.dtype if config.dtype is None else getattr(torch, config.dtype)
    # compute all settings before anything is written: a filter may match nothing
    settings = [_settings_of(config, places, one, first.config.num_hidden_layers) for one in stored]
    entries = [Entry(one.name, one.shape_in(shapes), dtype) for one in stored]
    seed = seed if config.seed is None else config.seed
    with progress.task("merge", total=sum(entry.bytes for entry in entries) // dtype.itemsize, unit="weights") as task:

        def tensors() -> Iterator[Tensor]:
            for one, own in zip(stored, settings, strict=True):
                merged = _merged(config, one, own, sources, base_source, seed)
                task.advance(merged.numel())
                yield merged.to(dtype)

        out.mkdir(parents=True, exist_ok=True)
        write_weights(out, entries, tensors(), shard_bytes)
    with_template = next((source for source in sources if _template(source.folder)), first)
    write_model_config(first.config, dtype, out, tokenizer=with_template.folder)
    record = {
        "format": 1,
        "settings": config.model_dump(mode="json") | {"seed": seed},
        "models": [_identity(place) for place in places],
        "base": None if base is None else _identity(base),
        "parameters": first.config.parameters(),
    }
    write_json(out / RECORD, record)
    return record


def merged_folder(
    config: MergeConfig,
    places: Sequence[ModelPlace],
    base: ModelPlace | None,
    out: Path,
    *,
    seed: int,
    progress: Progress,
    shard_bytes: int | None = None,
) -> dict[str, Any]:
    """`merge_models` into a folder that is there whole or not at all. Raises ArtefactError for one that holds something."""
    with new_folder(out) as partial:
        return merge_models(config, places, base, partial, seed=seed, progress=progress, shard_bytes=shard_bytes)


def merge_stage(
    config: MergeConfig, stages: Mapping[str, Path], folder: Path, out: Path, *, seed: int, progress: Progress
) -> dict[str, Any]:
    """The stage `merge`: into `out`, from stages' models by name and folders from `folder` on; returns its metrics.

    Raises ConfigError where no model is named and the stages above trained fewer than two.
    """
    names = [one.model for one in config.models] or list(stages)
    if len(names) < 2 and config.base is None:
        raise ConfigError(f"merge: the stages above trained {len(names)} model; name models: [A, B], or leave merge out")
    config = config if config.models else config.with_changes(models=names)

    def place(name: str) -> ModelPlace:
        return ModelPlace(name, _existing(name, folder)) if is_folder(name) else ModelPlace(name, stages[name])

    base = None if config.base is None else place(config.base)
    record = merge_models(config, [place(name) for name in names], base, out, seed=seed, progress=progress)
    return {"merge": describe(config), "models": len(names), "parameters": record["parameters"]}


def folders_fingerprint(config: MergeConfig, folder: Path) -> dict[str, Any]:
    """What a merge of folders depends on beside its settings: the hashes of their files. Raises ConfigError as `_existing`."""
    places = {name: _existing(name, folder) for name in config.folders()}
    return {name: {path.name: hash_file(path) for path in _files(place)} for name, place in places.items()}


def _files(place: Path) -> list[Path]:
    return [path for path in (place / CONFIG, place / TOKENIZER_FILE) if path.exists()] + sorted(place.glob("*.safetensors"))


def _existing(name: str, folder: Path) -> Path:
    """The model folder that the settings name, relative to the recipe's folder `folder`; a run's or a stage's folder also names
    its model."""
    place = Path(os.path.normpath(folder.resolve() / name))
    for found in (follow(place), follow(place / "model")):
        if (found / CONFIG).is_file():
            return found
    raise ConfigError(
        f"merge: {name}: {'not a model' if follow(place).exists() else 'no such folder'} (a folder with {CONFIG})"
    )


class _TensorSettings(NamedTuple):
    """The settings of one tensor: numbers by model, and slerp's t."""

    weights: list[float]
    densities: list[float]
    t: float


def _settings_of(config: MergeConfig, places: Sequence[ModelPlace], stored: Stored, layers: int) -> _TensorSettings:
    names = [stored.name, *(place.name for place in stored.views)]
    match = _LAYER.search(stored.views[0].name)
    depth = int(match[1]) / (layers - 1) if match and layers > 1 else 0.0
    weights, densities = [], []
    for place, model in zip(places, config.models, strict=True):
        weights.append(value_at(model.weight, names, depth, f"weight of {place.name}"))
        density = config.density if model.density is None else model.density
        densities.append(value_at(density, names, depth, f"density of {place.name}"))
        if not 0 <= densities[-1] <= 1:
            raise ConfigError(f"density of {place.name}: {densities[-1]:g} for {stored.name}; a share is from 0 to 1")
    t = value_at(config.t, names, depth, "t") if config.method == "slerp" else 0.0
    return _TensorSettings(weights, densities, t)


@torch.no_grad()
def _merged(
    config: MergeConfig,
    stored: Stored,
    settings: _TensorSettings,
    sources: Sequence[MergeSource],
    base: MergeSource | None,
    seed: int,
) -> Tensor:
    """One tensor of the merged model."""
    if not METHODS[config.method].needs_base:
        tensors = [source.read(stored) for source in sources]
        if config.method == "slerp":
            return slerp(tensors[0], tensors[1], settings.t)
        try:
            return linear(tensors, settings.weights, normalize=config.normalizes)
        except ValueError as error:
            raise ConfigError(f"weight: {error} for the tensor {stored.name!r}; set normalize: false for sums") from None
    assert base is not None
    base_tensor = base.read(stored)
    deltas = [source.read(stored).sub_(base_tensor) for source in sources]

    def generator(index: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(seed, "merge", index, stored.name))

    options = DeltaOptions(settings.densities, config.normalizes, config.rescaling, config.factor, generator)
    return base_tensor.add_(merge_deltas(config.method, deltas, settings.weights, options))


def _identity(place: ModelPlace) -> dict[str, Any]:
    """A model's name and the hashes of its weights' files."""
    files = sorted(place.folder.glob("*.safetensors")) + (sorted(place.adapter.glob("*.safetensors")) if place.adapter else [])
    return {"name": place.name, "weights": {path.name: hash_file(path) for path in files}}


# -------------------------------------------------------------------------------------------- whether they fit together


def check_alike(sources: Sequence[MergeSource], *, merged: int) -> None:
    """Raise ArtefactError where models differ in architecture, tokenizer or chat template.

    merged: number of models to merge, the first of `sources`; a base after them may have another template, or none.
    """
    first = sources[0]
    for other in sources[1:]:
        _check_configs(first, other)
        if (difference := tokenizer_difference(first.folder, other.folder)) is not None:
            raise ArtefactError(
                f"{other.name}: another tokenizer than {first.name}'s ({difference}), so a row of its embedding means another "
                "token; only models of one tokenizer are merged"
            )
    templates = {source.name: text for source in sources[:merged] if (text := _template(source.folder))}
    if len(set(templates.values())) > 1:
        names = list(templates)
        other_name = next(name for name in names if templates[name] != templates[names[0]])
        raise ArtefactError(
            f"{other_name}: another chat template than {names[0]}'s, so the merged model would know its own only "
            "in part; merge models that were tuned on one template"
        )


def _check_configs(first: MergeSource, other: MergeSource) -> None:
    kinds = [family_of(source.config).model_type for source in (first, other)]
    if kinds[0] != kinds[1]:
        raise ArtefactError(
            f"{other.name}: a {kinds[1]} model, and {first.name} is a {kinds[0]} model; only one family is merged"
        )
    own, others = (source.config.model_dump(mode="json") for source in (first, other))
    differing = [name for name in own if own[name] != others[name] and name not in _MAY_DIFFER]
    if differing:
        name = differing[0]
        more = f", and {len(differing) - 1} more settings differ" if len(differing) > 1 else ""
        raise ArtefactError(
            f"{other.name}: {name} is {others[name]!r}, and {own[name]!r} of {first.name}{more}; only models of one shape are "
            "merged"
        )


#: Parts of tokenizer.json that decide which ids a text has.
_PARTS = ("normalizer", "pre_tokenizer", "model")


def tokenizer_difference(first: Path, second: Path) -> str | None:
    """How two folders' tokenizers differ in the ids that they give a text; None where they do not, or a folder has none.

    A token may be special in one and plain in the other, and what follows encoding may differ.
    """
    if not (first / TOKENIZER_FILE).exists() or not (second / TOKENIZER_FILE).exists():
        return None
    tokenizers = [load_tokenizer(folder) for folder in (first, second)]
    if tokenizers[0].hash == tokenizers[1].hash:
        return None
    sizes = [tokenizer.vocab_size for tokenizer in tokenizers]
    vocabularies = [_tokens_by_id(read_json(folder / TOKENIZER_FILE, "tokenizer")) for folder in (first, second)]
    for id in sorted(vocabularies[0].keys() & vocabularies[1].keys()):
        if vocabularies[0][id] != vocabularies[1][id]:
            return f"id {id} is {vocabularies[1][id]!r}, there {vocabularies[0][id]!r}"
    if vocabularies[0].keys() != vocabularies[1].keys():
        return f"{sizes[1]:,} tokens, there {sizes[0]:,}"
    contents = [read_json(folder / TOKENIZER_FILE, "tokenizer") for folder in (first, second)]
    for part in _PARTS:
        if contents[0].get(part) != contents[1].get(part):
            return f"its {part.replace('_', '-')} differs"
    return None


def _tokens_by_id(content: Mapping[str, Any]) -> dict[int, str]:
    vocabulary = content.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, Mapping):
        tokens = {id: token for token, id in vocabulary.items()}
    else:
        # Unigram lists pairs of a token and its score
        tokens = {id: pair[0] for id, pair in enumerate(vocabulary)}
    return tokens | {token["id"]: token["content"] for token in content.get("added_tokens", [])}


def _template(folder: Path) -> str | None:
    return load_tokenizer(folder).chat_template if (folder / TOKENIZER_FILE).exists() else None
