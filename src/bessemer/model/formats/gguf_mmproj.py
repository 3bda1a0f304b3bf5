"""llama.cpp's `mmproj` files: the encoder and the projector of a model that reads pictures, beside its decoder's GGUF.

Keys and tensors are those of llama.cpp's `clip.cpp`. What it has no key for, the exact activation and how pictures are resized,
travels under keys of ours, which it passes over; files without them get what llama.cpp does itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.store import new_file, new_folder, write_json
from bessemer.model.config import ModelConfig
from bessemer.model.formats import gguf_mmproj_native as native
from bessemer.model.formats.gguf_base import GgufFamily
from bessemer.model.formats.gguf_export import add_info, add_key, encoded, export_gguf
from bessemer.model.formats.gguf_import import GgufFile, import_gguf
from bessemer.model.formats.gguf_mixtures import GGUF_DTYPES
from bessemer.model.quantisation.quantised_layers import is_quantised
from bessemer.model.storage.folder import load_model, save_model
from bessemer.model.vision.config import VisionLanguageConfig, joined_config
from bessemer.model.vision.folder import (
    PREPROCESSOR,
    PROCESSOR,
    load_vision_language,
    read_vision_language,
    save_vision_language,
)
from bessemer.model.vision.model import Vision, VisionLanguageModel
from bessemer.model.vision.preprocessing import Preprocessor, preprocessor_of, preprocessor_values
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer

ARCHITECTURE = "clip"
#: llama.cpp's names of projectors, by our types of models.
_PROJECTORS = {
    "llava": "mlp",
    "idefics3": "idefics3",
    "smolvlm": "idefics3",
    "gemma3": "gemma3",
    "qwen2_5_vl": native.PROJECTOR,
}
#: Tensors of the encoder and the projector: ours, then the file's, both without `.weight` and `.bias`.
_ENCODER = {
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "pre_layrnorm": "v.pre_ln",
    "post_layernorm": "v.post_ln",
}
_LAYER = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2", "proj": "mm.model.fc", "mm_soft_emb_norm": "mm.soft_emb_norm"}
#: Tensors that have another name whole.
_WHOLE = {
    "encoder.embeddings.class_embedding": "v.class_embd",
    "projector.mm_input_projection_weight": "mm.input_projection.weight",
}
#: Number types that llama.cpp computes encoders in, by what a user may ask for; of others the encoder stays in halves.
_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
_OF_TORCH = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
#: The layers' activations by llama.cpp's flags; without a flag it is `quick_gelu`.
_FLAGS = {"gelu_pytorch_tanh": "use_gelu", "gelu_new": "use_gelu", "gelu": "use_gelu", "silu": "use_silu"}
_DEFAULT_SCALE = {"idefics3": 2, "gemma3": 4}


class MmprojFile(GgufFile):
    """An open `mmproj` file."""

    families: ClassVar[Mapping[str, GgufFamily | None]] = {ARCHITECTURE: None}


class Mmproj(NamedTuple):
    """The encoder and projector of a file, and how pictures are prepared: `values` are as in `preprocessor_config.json`."""

    path: Path
    vision: Vision
    preprocessor: Preprocessor
    values: dict[str, Any]


# -- out


def export_vision_gguf(folder: Path, path: Path, dtype: str | None = None) -> list[str]:
    """Write the decoder of a folder's model to `path`, and its encoder and projector to `mmproj-NAME` beside it.

    Each is there whole or not at all. dtype: as of `export_gguf`; an encoder has 8 bits or more. Returns notes, a sentence
    each. Raises as `export_gguf`, and ArtefactError for what an `mmproj` has no place for.
    """
    if dtype is not None and dtype not in GGUF_DTYPES:
        raise ConfigError(f"--dtype: there is no {dtype!r}{nearest(dtype, list(GGUF_DTYPES))}")
    config = read_vision_language(folder)
    _refuse(config, folder)
    model = load_vision_language(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".bessemer-", dir=path.parent) as scratch:
        # called as the folder, whose name the file gets
        text = Path(scratch) / folder.resolve().name
        save_model(model.decoder, text, tokenizer=folder)
        notes = export_gguf(text, path, dtype, rope_sections=config.rope_sections)
    mmproj = path.with_name(f"mmproj-{path.name}")
    notes += _write(model, folder, mmproj, dtype or _OF_TORCH[model.decoder.dtype])
    return [*notes, f"{mmproj.name} beside it: the encoder of pictures and the projector, for llama.cpp's --mmproj"]


def _refuse(config: VisionLanguageConfig, folder: Path) -> None:
    """Refuse what llama.cpp has no place for."""
    lacks = []
    if config.vision.hidden_act not in (*_FLAGS, "quick_gelu"):
        lacks.append(f"activation {config.vision.hidden_act}")
    if config.model_type not in _PROJECTORS:
        lacks.append(f"form {config.model_type}")
    if config.vision.is_native:
        lacks += native.lacking(config.vision)
    if config.model_type == "llava":
        if not config.projector_bias:
            lacks.append("projector without biases")
        if not config.projector_act.startswith("gelu"):
            lacks.append(f"projector's {config.projector_act}")
        if config.vision.has_class_token and not config.drops_class:
            lacks.append("class token among the projected")
    if lacks:
        raise ArtefactError(f"{folder}: an mmproj file has no place for its {', '.join(lacks)}")


def _write(model: VisionLanguageModel, folder: Path, path: Path, dtype: str) -> list[str]:
    import gguf

    config, vision = model.config, model.config.vision
    preprocessor = preprocessor_values(folder)
    wanted = _TYPES.get(dtype, "F16")
    notes = [] if dtype in _TYPES else [f"the encoder of pictures is in f16: {dtype} is of the decoder"]
    is_llava = config.model_type == "llava"
    if vision.hidden_act == "gelu" or (is_llava and config.projector_act == "gelu"):
        notes.append("llama.cpp computes the encoder's or the projector's GELU by its tanh form")
    if is_llava and vision.has_class_token:
        notes.append("llama.cpp puts CLIP's class token behind the patches and shifts their positions: it sees otherwise")
    if vision.is_native:
        notes += native.notes_of(vision)
    ours = {name: tensor.detach() for name, tensor in model.vision.state_dict().items()}
    parts = _parts(config, ours)
    tensors = {theirs: _stored(name, ours[name][index]).contiguous() for theirs, (name, index) in parts.items()}
    kinds = {name: _kind(name, tensor, wanted) for name, tensor in tensors.items()}
    with new_file(path) as unfinished:
        writer = gguf.GGUFWriter(unfinished, ARCHITECTURE)
        writer.add_type("mmproj")
        writer.add_name(folder.resolve().name)
        writer.add_file_type(GGUF_DTYPES[dtype if dtype in _TYPES else "f16"].file_type)
        for key, value in _keys(config, preprocessor).items():
            add_key(writer, key, value)
        for name, tensor in tensors.items():
            add_info(writer, name, tuple(tensor.shape), kinds[name])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in tensors.items():
                writer.write_tensor_data(encoded(tensor, kinds[name], f"{folder}: tensor {name!r}"))
        finally:
            writer.close()
    return notes


def _keys(config: VisionLanguageConfig, preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    vision, prepared = config.vision, preprocessor_of(preprocessor)
    keys: dict[str, Any] = {
        "clip.has_vision_encoder": True,
        "clip.projector_type": _PROJECTORS[config.model_type],
        "clip.vision.projection_dim": config.text.hidden_size,
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.block_count": vision.num_hidden_layers,
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": float(vision.layer_norm_eps),
        "clip.vision.image_mean": list(prepared.mean or (0.0, 0.0, 0.0)),
        "clip.vision.image_std": list(prepared.std or (1.0, 1.0, 1.0)),
        "bessemer.model_type": config.model_type,
        "bessemer.encoder_type": vision.model_type,
        "bessemer.hidden_act": vision.hidden_act,
        "bessemer.projector_act": config.projector_act,
        "bessemer.preprocessor": json.dumps(preprocessor, sort_keys=True),
    }
    if vision.hidden_act in _FLAGS:
        keys[f"clip.{_FLAGS[vision.hidden_act]}"] = True
    if vision.is_native:
        return keys | native.keys_of(config, prepared)
    if config.model_type == "llava":
        count = vision.num_hidden_layers + 1
        keys["clip.has_llava_projector"] = True
        keys["clip.vision.feature_layer"] = [layer % count for layer in config.feature_layers]
        keys["bessemer.feature_layers"] = json.dumps(
            list(config.feature_layers) if config.feature_layer_is_list else config.feature_layers[0]
        )
    elif config.pooled_side:
        keys["clip.vision.projector.scale_factor"] = vision.grid // config.pooled_side
    else:
        keys["clip.vision.projector.scale_factor"] = config.scale_factor
        if isinstance(prepared.size, int):
            keys["clip.vision.preproc_image_size"] = prepared.size if prepared.splits else vision.image_size
    return keys


def _parts(config: VisionLanguageConfig, ours: Mapping[str, Any]) -> dict[str, tuple[str, native.Index]]:
    """Of each tensor of a file the name of ours and the part of that."""
    if config.vision.is_native:
        return {theirs: (name, index) for theirs, name, index in native.parts_of(config.vision, ours)}
    return {theirs: (name, ...) for name, theirs in _names(config, ours)}


def _names(config: VisionLanguageConfig, ours: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each tensor of ours with its name in a file."""
    for name in ours:
        part, _, rest = name.partition(".")
        module, _, ending = rest.rpartition(".")
        if name in _WHOLE:
            yield name, _WHOLE[name]
        elif part == "projector":
            yield name, f"{_PROJECTOR[module]}.{ending}"
        elif module.startswith("encoder.layers."):
            _, _, layer, inner = module.split(".", 3)
            yield name, f"v.blk.{layer}.{_LAYER[inner]}.{ending}"
        elif module != "post_layernorm" or config.model_type != "llava":
            # llama.cpp would norm what LLaVA projects
            yield name, f"{_ENCODER[module]}.{ending}"


def _stored(name: str, tensor: Tensor) -> Tensor:
    """A tensor as a file has it: Gemma's norm with 1 added."""
    return tensor + 1 if name.endswith("mm_soft_emb_norm.weight") else tensor


def _kind(name: str, tensor: Tensor, wanted: str) -> str:
    """The number type of a tensor: that of matrices where llama.cpp computes with it."""
    if tensor.dim() < 2 or "_embd" in name:
        return "F32"
    if wanted == "F32":
        return wanted
    # it transposes Gemma's projection, which is stored input by output, in halves alone
    return (
        "F16"
        if name == _WHOLE["projector.mm_input_projection_weight"] or (wanted == "Q8_0" and tensor.shape[-1] % 32)
        else wanted
    )


# -- in


def find_mmproj(model: Path) -> Path | None:
    """The `mmproj` file beside a GGUF model: `mmproj-NAME`, or the only one in a folder with no other model."""
    named = model.with_name(f"mmproj-{model.name}")
    if named.is_file():
        return named
    files = sorted(model.parent.glob("*.gguf"))
    mmprojs = [file for file in files if "mmproj" in file.name]
    return mmprojs[0] if len(mmprojs) == 1 and len(files) == 2 and model in files else None


def read_mmproj(path: Path, text: ModelConfig, tokenizer: Tokenizer) -> Mmproj:
    """The encoder and projector of an `mmproj` file, in float32, for a decoder and its tokenizer.

    Raises ArtefactError for a damaged file, one of another decoder, a projector that is not known, and a tokenizer without the
    tokens of pictures.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read ({error.strerror})") from None
    with stream:
        file = MmprojFile(path, stream)
        try:
            config = joined_config(_config_values(file, tokenizer), text)
            values = _preprocessor_values(file, config)
            preprocessor = preprocessor_of(values)
        except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtefactError(f"{path}: {error}") from None
        given = file.head.whole("vision.projection_dim", text.hidden_size)
        if given != text.hidden_size:
            raise ArtefactError(f"{path}: it is of a decoder {given:,} wide, and this one is {text.hidden_size:,} wide")
        with torch.device("meta"):
            vision = Vision(config)
        weights = _weights(file, config, {name: tuple(tensor.shape) for name, tensor in vision.state_dict().items()})
    vision.load_state_dict(weights, assign=True)
    return Mmproj(path, vision.eval(), preprocessor, values)


def import_vision_gguf(path: Path, mmproj: Path, out: Path, *, dtype: torch.dtype | None = None) -> list[str]:
    """A GGUF model and its `mmproj` file as a folder in Hugging Face's form. Arguments, notes and errors as of `import_gguf`,
    and those of `read_mmproj`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".bessemer-", dir=out.parent) as scratch:
        text = Path(scratch) / "model"
        notes = import_gguf(path, text, dtype=dtype)
        decoder = load_model(text)
        assert not is_quantised(decoder)
        read = read_mmproj(mmproj, decoder.config, load_tokenizer(text))
        with torch.device("meta"):
            whole = VisionLanguageModel(read.vision.config)
        tensors = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
        own = {f"vision.{name}": tensor.to(decoder.dtype) for name, tensor in read.vision.state_dict().items()}
        whole.load_state_dict(tensors | own, assign=True)
        write_json(text / PREPROCESSOR, read.values)
        if read.vision.config.scale_factor:
            tokens = read.vision.config.tokens_per_tile
            write_json(text / PROCESSOR, {"processor_class": "Idefics3Processor", "image_seq_len": tokens})
        with new_folder(out) as folder:
            save_vision_language(whole, folder, processor=text)
    return notes


def _config_values(file: MmprojFile, tokenizer: Tokenizer) -> dict[str, Any]:
    """What `config.json` of the model would say, but for its decoder."""
    head = file.head
    projector = head.get("projector_type", head.get("vision.projector_type", "mlp"))
    known = {name: kind for kind, name in reversed(_PROJECTORS.items())}
    if projector not in known:
        raise ConfigError(f"pictures projected by {projector!r} are not read; known are {', '.join(known)}")
    kind = str(head.values.get("bessemer.model_type", known[projector]))
    if _PROJECTORS.get(kind) != projector:
        raise ConfigError(f"a {kind} has no projector {projector!r}")
    if projector == native.PROJECTOR:
        return native.config_values(head, _control(tokenizer, native.IMAGE))
    act = "gelu_pytorch_tanh" if head.get("use_gelu") else "silu" if head.get("use_silu") else "quick_gelu"
    has_class = head.has("v.class_embd")
    encoder = "clip_vision_model" if has_class else "siglip_vision_model"
    vision = {
        "model_type": head.values.get("bessemer.encoder_type", f"{kind}_vision" if projector == "idefics3" else encoder),
        "hidden_size": head.whole("vision.embedding_length"),
        "intermediate_size": head.whole("vision.feed_forward_length"),
        "num_hidden_layers": head.whole("vision.block_count"),
        "num_attention_heads": head.whole("vision.attention.head_count"),
        "image_size": head.whole("vision.image_size"),
        "patch_size": head.whole("vision.patch_size"),
        "layer_norm_eps": head.number("vision.attention.layer_norm_epsilon", 1e-6),
        "hidden_act": head.values.get("bessemer.hidden_act", act),
        "vision_use_head": False,
    }
    if vision["num_hidden_layers"] > len(file.infos):
        raise ConfigError(f"{vision['num_hidden_layers']:,} layers, and {len(file.infos):,} tensors")
    values: dict[str, Any] = {"model_type": kind, "vision_config": vision}
    if kind == "gemma3":
        grid = vision["image_size"] // vision["patch_size"]
        side = grid // max(1, head.whole("vision.projector.scale_factor", _DEFAULT_SCALE[kind]))
        names = {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": "<image_soft_token>"}
        return (
            values
            | {"mm_tokens_per_image": side**2}
            | {f"{name}_token_index": _control(tokenizer, token) for name, token in names.items()}
        )
    image = _control(tokenizer, "<image>")
    if kind != "llava":
        scale = head.whole("vision.projector.scale_factor", _DEFAULT_SCALE[projector])
        return values | {"image_token_id": image, "scale_factor": scale}
    layers = head.values.get("clip.vision.feature_layer") or [vision["num_hidden_layers"] - 1]
    own = head.values.get("bessemer.feature_layers")
    return values | {
        "image_token_index": image,
        "vision_feature_layer": json.loads(own) if own else layers[0] if len(layers) == 1 else layers,
        "vision_feature_select_strategy": "default" if has_class else "full",
        "projector_hidden_act": head.values.get("bessemer.projector_act", "gelu_pytorch_tanh"),
    }


def _control(tokenizer: Tokenizer, token: str) -> int:
    id = tokenizer.control_id(token)
    if id is None:
        raise ConfigError(f"the model's tokenizer has no control token {token}, which stands for pictures")
    return id


def _preprocessor_values(file: MmprojFile, config: VisionLanguageConfig) -> dict[str, Any]:
    """How pictures are prepared: as the file says, or as llama.cpp prepares them."""
    values, side = file.head.values, config.vision.image_size
    if "bessemer.preprocessor" in values:
        own: dict[str, Any] = json.loads(values["bessemer.preprocessor"])
        return own
    square = {"height": side, "width": side}
    normal = {f"image_{name}": list(values[f"clip.vision.image_{name}"]) for name in ("mean", "std")}
    if config.vision.is_native:
        return native.preprocessor_values(file.head, config.vision, normal)
    if config.model_type == "gemma3":
        return {"image_processor_type": "Gemma3ImageProcessor", "size": square, **normal}
    if config.scale_factor:
        longest = file.head.whole("vision.preproc_image_size", side)
        sizes = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": side}}
        return {"image_processor_type": "Idefics3ImageProcessor", "do_image_splitting": longest > side, **sizes, **normal}
    if config.vision.has_class_token:
        sizes = {"size": {"shortest_edge": side}, "crop_size": square}
        return {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": True, **sizes, **normal}
    return {"image_processor_type": "SiglipImageProcessor", "size": square, **normal}


def _weights(file: MmprojFile, config: VisionLanguageConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Our tensors. Raises ArtefactError for one that is missing, unexpected or of another shape."""
    parts = _parts(config, shapes)
    unexpected = sorted(set(file.infos) - set(parts))
    if unexpected:
        raise ArtefactError(f"{file.path}: unexpected tensor {unexpected[0]!r}; the keys describe no such part")
    # older files call what widens `ffn_down`
    first = file.infos.get("v.blk.0.ffn_up.weight")
    wide = (config.vision.intermediate_size, config.vision.hidden_size)
    if first is not None and first.shape == wide[::-1] and wide[0] != wide[1]:
        swapped = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
        parts = {_with_swapped(theirs, swapped): part for theirs, part in parts.items()}
    # LLaVA's encoder ends before its last norm, which stays so
    weights = {name: (torch.ones if name.endswith("weight") else torch.zeros)(shape) for name, shape in shapes.items()}
    for theirs, (name, index) in parts.items():
        if theirs not in file.infos:
            raise ArtefactError(f"{file.path}: tensor {theirs!r} is missing")
        part = weights[name][index]
        shape = tuple(part.shape)
        if file.infos[theirs].shape != shape:
            raise ArtefactError(f"{file.path}: tensor {theirs!r} has the shape {file.infos[theirs].shape}, {shape} is needed")
        tensor = file.read(theirs)
        part.copy_(tensor - 1 if name.endswith("mm_soft_emb_norm.weight") else tensor)
    return weights


def _with_swapped(name: str, swapped: Mapping[str, str]) -> str:
    parts = name.split(".")
    return ".".join(swapped.get(part, part) for part in parts)
