"""Low-rank adapters on disk, in the form of Hugging Face's `peft`: `adapter_config.json` and `adapter_model.safetensors`.

A linear layer's update lies there as `base_model.model.<the family's name>.lora_A.weight`, (R, K), and `.lora_B.weight`,
(N, R); its scale is alpha / R, or alpha / √R (Kalajdzievski 2023). DoRA's have `.lora_magnitude_vector`, (N,), too. Nothing in
the folder is executed.
"""

from __future__ import annotations

import math
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bessemer.core.errors import ArtefactError
from bessemer.core.store import check_format, new_file, read_json, write_json
from bessemer.model.adapters import Adapter, Update, row_norms, weight_of
from bessemer.model.adapters.fingerprints import FLOAT16, WeightSample, fingerprints
from bessemer.model.decoder import Decoder
from bessemer.model.families import family_of
from bessemer.model.families.layout import FilePatterns, Stored, transposed, whole
from bessemer.model.initialisation import tensor_shapes
from bessemer.model.quantisation.quantised_layers import QuantisedLinear

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: Format number of an adapter's folder, under `bessemer` in its config.
ADAPTER_FORMAT = 1

#: Settings of adapters that are more than low-rank updates of linear layers, with what they add.
_MORE = {
    "lora_bias": "trained biases",
    "trainable_token_indices": "trained embeddings (trainable_token_indices)",
    "target_parameters": "updates of experts' parameters (target_parameters)",
    "layer_replication": "repeated layers (layer_replication)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow's routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
#: Settings that are true or false; without one it is false.
_FLAGS = ("use_rslora", "use_dora", "lora_bias", "use_qalora")
#: Initialisations that leave the base weights unchanged; others subtract the adapter's initial update from them.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(?:(A|B)\.weight|(magnitude_vector))")

# Shapes: N outputs, K inputs, R rank, P places of a tensor that are sampled.


class _Target(NamedTuple):
    """A linear layer of a family's files: our modules that it is made of, side by side, and the outputs of each."""

    modules: tuple[str, ...]
    outputs: tuple[int, ...]
    inputs: int
    is_transposed: bool


def read_adapter(
    folder: Path | str,
    model: Decoder,
    samples: Mapping[str, WeightSample] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """The adapter in a folder, for `model`: where its weights lie, and in their type unless `dtype` says another.

    samples: of the whole model, where `model` holds shards of it; the adapter is the whole one.

    Raises ArtefactError, one line, for a folder that is damaged, an adapter that is more than low-rank updates of linear
    layers, and one that was made for another model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtefactError(f"{folder}: no such adapter folder")
    config = _read_config(folder / ADAPTER_CONFIG)
    _check_base(folder / ADAPTER_CONFIG, config.get("bessemer"), model, samples)
    path = folder / ADAPTER_WEIGHTS
    if not path.exists():
        pickle = path.with_suffix(".bin")
        hint = f" ({pickle.name} is a pickle, which is never opened; save it as safetensors)" if pickle.exists() else ""
        raise ArtefactError(f"{path}: no such file; this folder holds no adapter's weights{hint}")
    patterns = FilePatterns(folder / ADAPTER_CONFIG)
    targets = _targets(model)
    updates: dict[str, Update] = {}
    plain = _whole_tensors(model) if config.get("modules_to_save") else {}
    layers, whole = _read_stored(path, plain, with_magnitudes=bool(config.get("use_dora")))
    for name, stored in layers.items():
        if name not in targets:
            raise ArtefactError(f"{path}: {_why_not(name, model)}")
        target, down_RK, up_NR, magnitude_N = targets[name], stored["A"], stored["B"], stored.get("magnitude_vector")
        shapes = (down_RK.shape[1], up_NR.shape[0])
        if shapes != (target.inputs, sum(target.outputs)):
            raise ArtefactError(
                f"{path}: the update of {name} goes from {shapes[0]:,} to {shapes[1]:,} channels, this model's layer from "
                f"{target.inputs:,} to {sum(target.outputs):,}; the adapter was made for another model"
            )
        if magnitude_N is not None and len(magnitude_N) != len(up_NR):
            raise ArtefactError(f"{path}: {name} has {len(magnitude_N):,} magnitudes for its {len(up_NR):,} channels")
        rank = _matching(folder / ADAPTER_CONFIG, patterns, config, "r", "rank_pattern", name)
        if not rank == down_RK.shape[0] == up_NR.shape[1]:
            raise ArtefactError(
                f"{path}: the update of {name} has rank {down_RK.shape[0]} and {up_NR.shape[1]}, {ADAPTER_CONFIG} says {rank}"
            )
        alpha = _matching(folder / ADAPTER_CONFIG, patterns, config, "lora_alpha", "alpha_pattern", name)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        magnitudes = [None] * len(target.modules) if magnitude_N is None else magnitude_N.split(target.outputs)
        for module, part_NR, own_N in zip(target.modules, up_NR.split(target.outputs), magnitudes, strict=True):
            updates[module] = Update(down_RK, part_NR.contiguous(), scale, own_N)
    if not updates:
        raise ArtefactError(f"{path}: it holds no update of any layer")
    own_shapes, held = tensor_shapes(model.config), {name.split(".")[-2] for name in whole}
    if missing := next((one for one in config.get("modules_to_save") or () if str(one).rpartition(".")[2] not in held), None):
        raise ArtefactError(f"{path}: {ADAPTER_CONFIG} says that {missing} was trained whole, and its weights are not there")
    for name, tensor in whole.items():
        if tuple(tensor.shape) != own_shapes[name]:
            raise ArtefactError(
                f"{path}: {name}, trained whole, has shape {tuple(tensor.shape)}, and this model's {own_shapes[name]}; the "
                "adapter was made for another model, or for one with more tokens"
            )
    adapter = Adapter(updates, whole=whole)
    dtype = dtype or model.dtype
    if not adapter.has_magnitudes:
        return adapter.to(model.device, dtype)
    if samples is not None:
        raise ArtefactError(
            f"{path}: DoRA, whose norms are of whole weights, beside a sharded model; merge it, or serve it whole"
        )
    return adapter.fitted(model).to(model.device, dtype)


def trains_modules(folder: Path) -> bool:
    """Whether an adapter's folder holds modules trained whole, so that it cannot lie beside a model."""
    return bool(read_json(folder / ADAPTER_CONFIG, "adapter config").get("modules_to_save"))


def write_adapter(adapter: Adapter, model: Decoder, folder: Path, samples: Mapping[str, WeightSample] | None = None) -> None:
    """Write an adapter's folder, which `peft` opens too, beside the model's; it knows its base again when it is read.

    samples: of the model's weights, as for `fingerprints`.
    """
    targets, stored = _targets(model), {}
    for name, target in targets.items():
        updates = [adapter.updates.get(module) for module in target.modules]
        if any(update is not None for update in updates):
            stored[name] = _packed(updates, target, model)
    placed = {module for name in stored for module in targets[name].modules}
    assert placed >= adapter.updates.keys(), sorted(adapter.updates.keys() - placed)
    names = {ours: theirs for theirs, ours in _whole_tensors(model).items()}
    whole = {names[name]: tensor.detach().cpu().contiguous() for name, tensor in adapter.whole.items()}
    ranks = {name: len(update.down_RK) for name, update in stored.items()}
    alphas = {name: _as_whole(update.scale * ranks[name]) for name, update in stored.items()}
    rank, alpha = most_usual(ranks.values()), most_usual(alphas.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {name: other for name, other in alphas.items() if other != alpha},
        "target_modules": _target_modules(stored, model),
        "use_rslora": False,
        "use_dora": adapter.has_magnitudes,
        "fan_in_fan_out": any(targets[name].is_transposed for name in stored),
        "bias": "none",
        # whole names, since `peft` compares their ends: `norm` would match every norm
        **({"modules_to_save": sorted({name.rpartition(".")[0] for name in whole})} if whole else {}),
        **({"ensure_weight_tying": True} if whole and model.config.tie_word_embeddings else {}),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "bessemer": {"format": ADAPTER_FORMAT, "base": fingerprints(model, samples)},
    }
    tensors = {}
    for name, update in stored.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = update.down_RK.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = update.up_NR.detach().cpu().contiguous()
        if update.magnitude_N is not None:
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = update.magnitude_N.detach().cpu().contiguous()
    tensors |= {f"base_model.model.{name}": tensor for name, tensor in whole.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / ADAPTER_WEIGHTS) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, config)


def adaptable_layers(model: Decoder) -> dict[str, tuple[int, int]]:
    """The linear layers that an adapter may change, by module name: outputs and inputs."""
    return {
        module: (outputs, target.inputs)
        for target in _targets(model).values()
        for module, outputs in zip(target.modules, target.outputs, strict=True)
    }


# -- inside


def _check_base(path: Path, ours: Any, model: Decoder, samples: Mapping[str, WeightSample] | None) -> None:
    """Refuse an adapter that was written here for other weights."""
    if ours is None:
        return
    if not isinstance(ours, Mapping):
        raise ArtefactError(f"{path}: this adapter config is damaged ('bessemer' is not a mapping)")
    check_format(ours.get("format"), ADAPTER_FORMAT, path, "adapter")
    base, own = ours.get("base"), fingerprints(model, samples)
    # copies in float32 and bfloat16 agree in the plain hashes, a copy in float16 in those of the suffix
    ways = [[name for name in own if name.endswith(FLOAT16) == is_float16] for is_float16 in (False, True)]
    if not isinstance(base, Mapping) or not any(all(base.get(name) == own[name] for name in names) for names in ways):
        raise ArtefactError(
            f"{path}: this adapter was trained on a model with other weights; use it with that one, as it was then"
        )


def _read_config(path: Path) -> dict[str, Any]:
    """The settings of an adapter that is low-rank updates and nothing more."""
    config = read_json(path, "adapter config")
    if not isinstance(config, dict):
        raise ArtefactError(f"{path}: this adapter config is damaged (not a mapping)")
    if config.get("peft_type") != "LORA":
        raise ArtefactError(f"{path}: an adapter of the kind {config.get('peft_type')!r}; supported: 'LORA'")
    if config.get("bias", "none") != "none":
        raise ArtefactError(f"{path}: this adapter has trained biases, which are not supported")
    for name in _FLAGS:
        if not isinstance(config.get(name, False), (bool, NoneType)):
            raise ArtefactError(f"{path}: {name} should be true or false, got {_shown(config[name])}")
    for name, what in _MORE.items():
        if config.get(name):
            raise ArtefactError(f"{path}: this adapter has {what}, which is not supported")
    beginning = config.get("init_lora_weights")
    if beginning not in _PLAIN_BEGINNINGS:
        raise ArtefactError(
            f"{path}: this adapter began as {beginning!r}, which changes the base; save it as plain LoRA "
            "(peft: path_initial_model_for_weight_conversion)"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise ArtefactError(f"{path}: this adapter config is damaged ({name} is not a mapping)")
    return config


def _matching(path: Path, patterns: FilePatterns, config: Mapping[str, Any], setting: str, pattern: str, name: str) -> float:
    """A layer's own rank or alpha, where the first pattern that matches its name gives one, or the one of all."""
    value = config.get(setting)
    for expression, other in (config.get(pattern) or {}).items():
        if patterns.matches(expression, name, pattern, r"(.*\.)?(", ")$"):
            value = other
            break
    # an int of JSON may exceed every float
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ArtefactError(f"{path}: {setting} of {name} should be a number above 0, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """A setting's value for a message."""
    return reprlib.repr(value)


def _read_stored(
    path: Path, plain: Mapping[str, str], *, with_magnitudes: bool
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """A and B of every layer, with DoRA its magnitudes too, by the family's name; and tensors trained whole, by ours. plain:
    our names of tensors that may be whole, by the family's."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path}: this is not a whole safetensors file ({error}); fetch or make it again") from None
    layers: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None and (ours := plain.get(name.removeprefix("base_model.model."))) is not None:
            whole[ours] = tensor
            continue
        if match is None:
            raise ArtefactError(
                f"{path}: tensor {name!r} is not a linear layer's lora_A or lora_B, and nothing else is supported"
            )
        part = match[2] or match[3]
        dimensions, kind = (2, "matrix") if match[2] else (1, "vector")
        if tensor.ndim != dimensions or not tensor.is_floating_point():
            raise ArtefactError(f"{path}: tensor {name!r} is not a {kind} of floating-point numbers")
        # float8 has no isfinite of its own
        if not tensor.float().isfinite().all():
            raise ArtefactError(f"{path}: tensor {name!r} has numbers that are not finite")
        layers.setdefault(match[1], {})[part] = tensor
    wanted = {"A", "B", "magnitude_vector"} if with_magnitudes else {"A", "B"}
    for name, parts in layers.items():
        if missing := sorted(wanted - parts.keys()):
            raise ArtefactError(f"{path}: {name} has no lora_{missing[0]}, and has lora_{' and lora_'.join(sorted(parts))}")
        if extra := parts.keys() - wanted:
            raise ArtefactError(f"{path}: {name} has a lora_{min(extra)}, and {ADAPTER_CONFIG} does not say use_dora")
    return layers, whole


def _whole_tensors(model: Decoder) -> dict[str, str]:
    """Our names of the tensors that a family's files hold as they are, by theirs: what may be trained whole."""
    return {one.name: one.views[0].name for one in _stored(model) if len(one.views) == 1 and one.views[0].view is whole}


def _stored(model: Decoder) -> list[Stored]:
    return list(family_of(model.config).stored(model.config, list(tensor_shapes(model.config))))


def _targets(model: Decoder) -> dict[str, _Target]:
    """The linear layers of the blocks that an adapter may change, by the family's names."""
    shapes, modules, targets = tensor_shapes(model.config), dict(model.named_modules()), {}
    for stored in _stored(model):
        names = tuple(place.name.removesuffix(".weight") for place in stored.views)
        layers = [modules.get(name) for name in names if name.startswith("layers.")]
        is_linear = len(layers) == len(names) and all(isinstance(layer, (nn.Linear, QuantisedLinear)) for layer in layers)
        if is_linear and all(place.name.endswith(".weight") and place.view in (whole, transposed) for place in stored.views):
            outputs, inputs = zip(*(shapes[place.name] for place in stored.views), strict=True)
            is_transposed = stored.views[0].view is transposed
            targets[stored.name.removesuffix(".weight")] = _Target(names, outputs, inputs[0], is_transposed)
    return targets


def _why_not(name: str, model: Decoder) -> str:
    """Why an adapter cannot change a layer, given the family's name."""
    if any(stored.name.startswith(f"{name}.") for stored in _stored(model)):
        return (
            f"the adapter changes {name}, and only linear layers of attention, feed-forward and shared experts can be changed: "
            "not experts, routers, embeddings or the head"
        )
    return f"the adapter changes {name}, which this model does not have; it was made for another model"


def _packed(updates: list[Update | None], target: _Target, model: Decoder) -> Update:
    """One update of a family's layer from those of our modules that it is made of."""
    magnitude_N = None
    if any(update is not None and update.magnitude_N is not None for update in updates):
        # a magnitude equal to the norms of the weight's rows leaves a part without an update unchanged
        own = [
            row_norms(weight_of(model, module).float()).cpu()
            if update is None or update.magnitude_N is None
            else update.magnitude_N.detach().cpu()
            for module, update in zip(target.modules, updates, strict=True)
        ]
        magnitude_N = torch.cat(own)
    return packed_update(updates, target.outputs)._replace(magnitude_N=magnitude_N)


def packed_update(updates: Sequence[Update | None], outputs: Sequence[int]) -> Update:
    """One update of a weight from those of the parts of its rows, of which at least one is there; without magnitudes.

    outputs: the rows of each part.
    """
    present = [update for update in updates if update is not None]
    first = present[0]
    if len(present) == len(updates) and all(
        update.scale == first.scale and torch.equal(update.down_RK, first.down_RK) for update in present
    ):
        return Update(first.down_RK, torch.cat([update.up_NR for update in present]), first.scale)
    ups = [
        first.up_NR.new_zeros(rows, 0) if update is None else update.up_NR * update.scale
        for update, rows in zip(updates, outputs, strict=True)
    ]
    return Update(torch.cat([update.down_RK for update in present]), torch.block_diag(*ups), 1.0)


def _target_modules(names: Iterable[str], model: Decoder) -> list[str]:
    """The last part of the names where every layer with that ending is changed, as people write them; else whole names."""
    changed, endings = set(names), set()
    everything = {stored.name.rpartition(".")[0] for stored in _stored(model)}
    for name in changed:
        last = name.rpartition(".")[2]
        alike = {other for other in everything if other.rpartition(".")[2] == last}
        endings.add(last if alike <= changed else name)
    return sorted(endings)


def most_usual(values: Iterable[float]) -> float:
    """The value that comes most often."""
    return Counter(values).most_common(1)[0][0]


def _as_whole(value: float) -> float:
    """An int where it is one, as `peft` writes them; near one, where the scale was divided before."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value
