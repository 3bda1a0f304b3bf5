"""A model on disk: a Hugging Face folder with `config.json`, `model.safetensors`, and the tokenizer's files.

Nothing in it is executed: no pickle is opened and no remote code is run.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.store import check_format, read_json, write_json
from bessemer.model.checkpoints import WEIGHTS, WEIGHTS_INDEX, refuse_checkpoint
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.families import FAMILIES, family_of, read_config, write_config
from bessemer.model.families.layout import Stored, whole
from bessemer.model.formats.hub import import_advice
from bessemer.model.initialisation import empty_decoder, fill, tensor_shapes
from bessemer.model.quantisation.layout import Layout, layout_of, read_layout, schemes_of
from bessemer.model.quantisation.settings import OWN_FORM, QUANTIZATION, read_settings
from bessemer.model.quantisation.shells import put_shells, set_dtype
from bessemer.model.quantisation.stored import StoredPart
from bessemer.model.quantised_linear import is_quantised
from bessemer.model.weights_file import CODE_DTYPES, DTYPES, Entry, WeightsFile, write_weights

#: Format number of a model folder, under `bessemer` in its config.json.
MODEL_FORMAT = 1

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    GENERATION_CONFIG,
)
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
#: What the names of some published files lack.
_PREFIXES = {"gpt2": "transformer."}


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
    entries = [Entry(one.name, one.shape_in(shapes), ours[one.places[0].name].dtype) for one in stored]
    entries += [Entry(part.name, part.shape, part.dtype) for part in parts]
    tensors = chain((one.pack(ours) for one in stored), (part.packed(ours) for part in parts))
    write_weights(folder, entries, tensors, shard_bytes)
    write_model_config(config, model.dtype, folder, tokenizer=tokenizer, quantization=settings)


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
        "architectures": [family.architecture],
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


def refuse_quantised(folder: Path) -> None:
    """Raise ArtefactError for a model whose weights are codes: training needs them as numbers."""
    if read_settings(read_json(folder / CONFIG, "model config"), folder / CONFIG):
        raise ArtefactError(
            f"{folder}: this model is quantised, and only whole weights can be trained or changed; take the model that it was "
            "made from"
        )


def read_end_tokens(folder: Path) -> frozenset[int]:
    """The tokens at which a model's answer ends, as its generation settings list them; none when they do not."""
    path = folder / GENERATION_CONFIG
    if not path.exists():
        return frozenset()
    ends = read_json(path, "file of generation settings").get("eos_token_id")
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def load_model(folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Decoder:
    """The decoder of a model folder, or of a GGUF file, in evaluation mode; in the stored type when `dtype` is None.

    What a file holds as we do is mapped into memory and not copied; what is converted, or lies otherwise in the file, is so
    tensor by tensor. Memory is that of the model and of one tensor (docs/model-formats.md has measurements).
    Raises ArtefactError naming the file and what is wrong: a missing or unexpected tensor, a shape that disagrees with
    config.json, a damaged file, an unknown architecture.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf" and folder.is_file():
        from bessemer.model.formats.gguf_open import open_gguf

        return open_gguf(folder, device, dtype).model
    if not folder.is_dir():
        raise ArtefactError(f"{folder}: no such model folder{import_advice(str(folder))}")
    config = read_model_config(folder)
    settings = read_settings(read_json(folder / CONFIG), folder / CONFIG)
    layout, schemes = read_layout(config, settings, folder / CONFIG) if settings else (None, {})
    config, weights = _read_weights(folder, config, layout, torch.device(device), dtype)
    if not config.num_nextn_predict_layers:
        schemes = {name: scheme for name, scheme in schemes.items() if not name.startswith("mtp.")}
    model = put_shells(empty_decoder(config), schemes)
    # norms are never quantised: they say in which type the rest of the model is
    set_dtype(model, weights["norm.weight"].dtype)
    return fill(model, weights).to(device)  # the tables of rotary positions too


def _read_weights(
    folder: Path, config: ModelConfig, layout: Layout | None, device: torch.device, dtype: torch.dtype | None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Every tensor of the decoder by our name, checked against the config before any is read; and the config, less the
    multi-token prediction that it promises where the file has none of it (`transformers` does not save it).

    A tensor that the file holds as ours is taken as it is; one that is spread or packed there is filled piece by piece,
    so that nothing is in memory twice.
    """
    shapes, family = tensor_shapes(config), family_of(config)
    plain = layout.plain if layout else family.stored(config, list(shapes))
    wanted = {stored.name: stored for stored in plain}
    coded = {part.name: part for part in layout.parts} if layout else {}
    plain_embedding = any(stored.places[0].name == _EMBEDDING for stored in wanted.values())
    weights: dict[str, Tensor] = {}
    missing = dict.fromkeys((*wanted, *(name for name, part in coded.items() if part.unpack)))
    second_head: tuple[Path, Tensor] | None = None
    for path in _weight_files(folder):
        try:
            file = WeightsFile(path)
            for disk_name in file.names():
                if disk_name in coded:
                    _take_codes(coded[disk_name], file, path, weights, device)
                    missing.pop(disk_name, None)
                    continue
                stored = wanted.get(disk_name) or wanted.get(f"{_PREFIXES.get(family.model_type)}{disk_name}")
                if stored is None:
                    if disk_name == _HEAD and config.tie_word_embeddings and plain_embedding:
                        second_head = (path, file.kept(disk_name))
                        continue
                    if any(re.fullmatch(pattern, disk_name) for pattern in family.ignored):
                        continue
                    raise ArtefactError(f"{path}: unexpected tensor {disk_name!r}; config.json describes no such part")
                (shape, kind), asked = file.describe(disk_name), stored.shape_in(shapes)
                if shape != asked:
                    raise ArtefactError(f"{path}: {disk_name!r} has shape {shape}, config.json asks for {asked}")
                if kind not in DTYPES.values():
                    raise ArtefactError(f"{path}: {disk_name!r} has type {kind}; supported: {', '.join(DTYPES.values())}")
                as_it_is = stored.is_whole and device.type == "cpu" and (dtype is None or DTYPES.get(dtype) == kind)
                tensor = file.kept(disk_name) if as_it_is else file.passing(disk_name)
                _take(stored, tensor, weights, shapes, device, dtype)
                missing.pop(stored.name, None)
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"{path}: this is not a whole safetensors file ({error})") from None
    ahead = {name for name, stored in wanted.items() if stored.places[0].name.startswith("mtp.")}
    ahead |= {name for name, part in coded.items() if part.ours.startswith("mtp.") and part.unpack}
    if ahead and ahead <= missing.keys():
        config = config.with_changes(num_nextn_predict_layers=0)
        missing = {name: None for name in missing if name not in ahead}
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ArtefactError(f"{folder}: tensor {min(missing)!r}{more} is missing from the weights")
    # some published folders repeat the tied table as a head; one that differs is another model
    if second_head is not None and not _same(second_head[1], weights[_EMBEDDING]):
        raise ArtefactError(f"{second_head[0]}: tensor {_HEAD!r} differs from the embedding that config.json ties it to")
    return config, weights


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
        weights[stored.places[0].name] = tensor.to(device, dtype)
        return
    for place in stored.places:
        if place.name not in weights:
            weights[place.name] = torch.empty(shapes[place.name], dtype=dtype or tensor.dtype, device=device)
    stored.unpack(tensor, weights)


def _take_codes(part: StoredPart, file: WeightsFile, path: Path, weights: dict[str, Tensor], device: torch.device) -> None:
    """Put a file's codes, scales or zeros where they belong among ours."""
    shape, kind = file.describe(part.name)
    asked = (DTYPES | CODE_DTYPES)[part.dtype]
    if shape != part.shape or (kind != asked and not (kind in DTYPES.values() and asked in DTYPES.values())):
        raise ArtefactError(f"{path}: {part.name!r} is {kind} of shape {shape}, config.json asks for {asked} of {part.shape}")
    if part.unpack is None:
        return
    tensor = part.unpack(file.kept(part.name)).to(device)
    if part.view is whole:
        weights[part.ours] = tensor
        return
    if part.ours not in weights:
        weights[part.ours] = torch.empty(part.ours_shape, dtype=tensor.dtype, device=device)
    part.view(weights[part.ours]).copy_(tensor)


def _same(stored: Tensor, taken: Tensor) -> bool:
    """Whether a tensor of a file is the one that was taken, and perhaps converted, from another."""
    return torch.equal(stored.to(taken.device, taken.dtype), taken)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that an index names."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / WEIGHTS_INDEX).exists():
        index = read_json(folder / WEIGHTS_INDEX, "index of weights")
        names = sorted({str(name) for name in index.get("weight_map", {}).values()})
        for name in names:
            if Path(name).name != name or not (folder / name).exists():
                raise ArtefactError(f"{folder / name}: missing; {WEIGHTS_INDEX} names it")
        return [folder / name for name in names]
    refuse_checkpoint(folder)
    raise ArtefactError(f"{folder / WEIGHTS}: no such file; this folder holds no weights")
