"""A model on disk: a Hugging Face folder with `config.json`, `model.safetensors`, and the tokenizer's files.

Nothing in it is executed: no pickle is opened and no remote code is run.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.store import check_format, read_json, write_json
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.initialisation import empty_decoder, fill, tensor_shapes

#: Format number of a model folder, under `bessemer` in its config.json.
MODEL_FORMAT = 1

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    GENERATION_CONFIG,
)
_HEAD = "lm_head.weight"
_DTYPES = ("F32", "BF16", "F16")
#: Settings of Qwen3 that the decoder has in one form only.
_FIXED: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False}


def save_model(model: Decoder, folder: Path, *, tokenizer: Path | None) -> None:
    """Write a model folder that `transformers` opens too; each file is whole or absent.

    tokenizer: a folder whose tokenizer files and generation settings go with the model (another model's will do).
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name_on_disk(name): tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    temporary = folder / f".{WEIGHTS}.{os.getpid()}.tmp"
    try:
        save_file(weights, temporary, metadata={"format": "pt"})
        temporary.replace(folder / WEIGHTS)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if tokenizer is not None and tokenizer.resolve() != folder.resolve():
        for name in TOKENIZER_FILES:
            if (tokenizer / name).exists():
                shutil.copyfile(tokenizer / name, folder / name)
    tokenizer_file = folder / "tokenizer.json"
    ours = {"format": MODEL_FORMAT, "tokenizer_hash": hash_file(tokenizer_file) if tokenizer_file.exists() else None}
    dtype = str(model.head_weight.dtype).removeprefix("torch.")
    write_json(folder / CONFIG, huggingface_config(model.config, dtype) | {"bessemer": ours})


def huggingface_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """`config.json` as `transformers` reads it, with everything explicit: its defaults are a 0.6B model's."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **config.model_dump(),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "max_window_layers": config.num_hidden_layers,
        "sliding_window": None,
        **_FIXED,
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
    _refuse_unsupported(values, path)
    rope = values.get("rope_parameters") or {}
    settings = {name: values[name] for name in ModelConfig.model_fields if name in values}
    settings["rope_theta"] = rope.get("rope_theta", values.get("rope_theta"))
    settings["tie_word_embeddings"] = values.get("tie_word_embeddings", False)  # as transformers takes it when absent
    if isinstance(settings.get("eos_token_id"), list):  # the rest is in generation_config.json
        settings["eos_token_id"] = settings["eos_token_id"][0]
    optional = {"bos_token_id", "eos_token_id", "initializer_range"}
    for name in ModelConfig.model_fields.keys() - optional:
        if settings.get(name) is None:
            raise ArtefactError(f"{path}: {name!r} is missing")
    try:
        return ModelConfig.parse(settings)
    except ConfigError as error:
        raise ArtefactError(f"{path}: {error}") from None


def read_end_tokens(folder: Path) -> frozenset[int]:
    """The tokens at which a model's answer ends, as its generation settings list them; none when they do not."""
    path = folder / GENERATION_CONFIG
    if not path.exists():
        return frozenset()
    ends = read_json(path, "file of generation settings").get("eos_token_id")
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def _refuse_unsupported(values: dict[str, Any], path: Path) -> None:
    """Raise ArtefactError naming the first thing in a config that the decoder does not do."""
    if "auto_map" in values:
        raise ArtefactError(f"{path}: it asks to run code that comes with the model ('auto_map'); bessemer runs no such code")
    if values.get("model_type") != "qwen3":
        raise ArtefactError(f"{path}: unknown architecture {values.get('model_type')!r}; supported: qwen3")
    if values.get("quantization_config"):
        raise ArtefactError(f"{path}: the weights are quantised ('quantization_config'), which is not supported")
    for name, value in _FIXED.items():
        if values.get(name, value) != value:
            raise ArtefactError(f"{path}: {name} is {values[name]!r}, supported is {value!r}")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ArtefactError(f"{path}: rotary scaling {kind!r} is not supported")
    if set(values.get("layer_types") or ()) - {"full_attention"}:
        raise ArtefactError(f"{path}: layer_types must all be 'full_attention', got {sorted(set(values['layer_types']))}")


def load_model(folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Decoder:
    """The decoder of a model folder, in evaluation mode; in the stored type when `dtype` is None.

    Raises ArtefactError naming the file and what is wrong: a missing or unexpected tensor, a shape that disagrees with
    config.json, a damaged file, an unknown architecture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtefactError(f"{folder}: no such model folder")
    config = read_model_config(folder)
    weights = {name: tensor.to(device, dtype) for name, tensor in _read_weights(folder, config).items()}
    return fill(empty_decoder(config), weights).to(device)


def _read_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of the decoder by our name, checked against the config before any is read."""
    shapes = tensor_shapes(config)
    wanted = {name_on_disk(name): name for name in shapes}
    weights: dict[str, Tensor] = {}
    second_head: tuple[Path, Tensor] | None = None
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as stored:
                for disk_name in stored.keys():  # noqa: SIM118  (not a mapping)
                    if disk_name == _HEAD and config.tie_word_embeddings:
                        second_head = (path, stored.get_tensor(disk_name))
                        continue
                    if disk_name not in wanted:
                        raise ArtefactError(f"{path}: unexpected tensor {disk_name!r}; config.json describes no such part")
                    name, tensor = wanted[disk_name], stored.get_slice(disk_name)
                    shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
                    if shape != shapes[name]:
                        raise ArtefactError(f"{path}: {disk_name!r} has shape {shape}, config.json asks for {shapes[name]}")
                    if kind not in _DTYPES:
                        raise ArtefactError(f"{path}: {disk_name!r} has type {kind}; supported: {', '.join(_DTYPES)}")
                    weights[name] = stored.get_tensor(disk_name)
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"{path}: this is not a whole safetensors file ({error})") from None
    missing = sorted(disk_name for disk_name, name in wanted.items() if name not in weights)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ArtefactError(f"{folder}: tensor {missing[0]!r}{more} is missing from the weights")
    # some published folders repeat the tied table as a head; one that differs is another model
    if second_head is not None and not torch.equal(second_head[1], weights["embed_tokens.weight"]):
        raise ArtefactError(f"{second_head[0]}: tensor {_HEAD!r} differs from the embedding that config.json ties it to")
    return weights


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
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        raise ArtefactError(f"{folder}: its weights are a pickle, which may run code and is not opened; ask for safetensors")
    raise ArtefactError(f"{folder / WEIGHTS}: no such file; this folder holds no weights")


def name_on_disk(name: str) -> str:
    """Hugging Face's name of one of our tensors."""
    return name if name == _HEAD else f"model.{name}"
