"""A model on disk: a Hugging Face folder with `config.json`, `model.safetensors`, and the tokenizer's files.

Nothing in it is executed: no pickle is opened and no remote code is run.
"""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from bessemer.core.errors import ArtefactError
from bessemer.core.store import read_json
from bessemer.model.checkpoints import WEIGHTS, WEIGHTS_INDEX, refuse_checkpoint
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.families import family_of
from bessemer.model.families.layout import Stored, whole
from bessemer.model.folder_config import CONFIG, read_model_config, write_model_config
from bessemer.model.formats.hub import import_advice
from bessemer.model.initialisation import empty_decoder, fill, tensor_shapes
from bessemer.model.quantisation.layout import Layout, layout_of, read_layout, schemes_of
from bessemer.model.quantisation.quantised_modules import replace_with_quantised_modules, set_dtype
from bessemer.model.quantisation.settings import read_settings
from bessemer.model.quantisation.stored import StoredPart
from bessemer.model.quantised_linear import is_quantised
from bessemer.model.weights_file import CODE_DTYPES, DTYPES, Entry, WeightsFile, write_weights

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
    model = replace_with_quantised_modules(empty_decoder(config), schemes)
    # norms are never quantised: they say in which type the rest of the model is
    set_dtype(model, weights["norm.weight"].dtype)
    # the tables of rotary positions too
    return fill(model, weights).to(device)


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
    of_mtp = {name for name, stored in wanted.items() if stored.places[0].name.startswith("mtp.")}
    of_mtp |= {name for name, part in coded.items() if part.ours.startswith("mtp.") and part.unpack}
    if of_mtp and of_mtp <= missing.keys():
        config = config.with_changes(num_nextn_predict_layers=0)
        missing = {name: None for name in missing if name not in of_mtp}
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
