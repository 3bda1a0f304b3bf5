"""A model that reads pictures from a language model that does not: an encoder, given or new, a new projector, the tokens of
pictures, and a chat template with a place for them.

The decoder keeps its weights; each new token starts as the mean of the embedding's rows. What is new must be trained before it
says anything: LLaVA trains the projector alone first (Liu et al. 2023, section 4.2).
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bessemer.core.errors import ConfigError, RequestError
from bessemer.core.hashing import hash_file
from bessemer.core.progress import Progress, Silent
from bessemer.core.store import write_json
from bessemer.model.config import ModelConfig
from bessemer.model.stage import extend_model
from bessemer.model.storage.folder import load_model
from bessemer.model.storage.model_config import huggingface_config
from bessemer.model.vision.config import VisionConfig, VisionLanguageConfig, read_vision_language_config, write_vision_config
from bessemer.model.vision.encoder import VisionEncoder
from bessemer.model.vision.folder import (
    PREPROCESSOR,
    PROCESSOR,
    initial_vision_language,
    load_vision_encoder,
    save_vision_language,
)
from bessemer.model.vision.stage_config import VisionStageConfig
from bessemer.tokenization.chat_templates import CHAT_TEMPLATES, template_name, with_place_for_pictures
from bessemer.tokenization.control_tokens import TEMPLATE_TOKENS
from bessemer.tokenization.folder import CHAT_TEMPLATE_FILE
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.tokenization.trained_template import extended_tokenizers, write_extended

IMAGE = "<image>"
#: The marks around a picture of Idefics3's form.
_AROUND = ("<fake_token_around_image>", "<global-img>")


def build_vision_model(
    config: VisionStageConfig, model: Path, out: Path, *, seed: int, folder: Path = Path(), progress: Progress | None = None
) -> dict[str, Any]:
    """Write `model/` below `out`: the language model of a folder with an encoder and a new projector. Returns its figures.

    A relative path of an encoder starts from `folder`. Raises ConfigError or ArtefactError for an encoder or a language model
    that do not go together, and for a chat template without a place for pictures that is none of ours.
    """
    given = None if config.encoder is None else load_vision_encoder(_encoder_folder(config.encoder, folder))
    made = out / "model"
    with TemporaryDirectory() as scratch:
        # a model's files fit together only as a whole
        text = Path(scratch) / "text"
        extend_model(model, text, special_tokens=_marks(config))
        write_extended(text, [load_tokenizer(model).hash, *extended_tokenizers(model)])
        tokenizer = _with_template(load_tokenizer(text))
        decoder = load_model(text, dtype=torch.float32)
        shape = _shape(config, given, decoder.config, tokenizer)
        whole = initial_vision_language(shape, seed)
        whole.decoder.load_state_dict(decoder.state_dict())
        if given is not None:
            own = whole.vision.encoder.state_dict()
            whole.vision.encoder.load_state_dict({name: tensor for name, tensor in given.state_dict().items() if name in own})
        write_json(text / PREPROCESSOR, _preprocessor(config, shape.vision))
        if shape.scale_factor:
            write_json(text / PROCESSOR, {"processor_class": "SmolVLMProcessor", "image_seq_len": shape.tokens_per_tile})
        save_vision_language(whole, made, processor=text)
    figures = {
        "parameters": sum(parameter.numel() for parameter in whole.parameters()),
        "encoder_parameters": sum(parameter.numel() for parameter in whole.vision.encoder.parameters()),
        "projector_parameters": sum(parameter.numel() for parameter in whole.vision.projector.parameters()),
        "tokens_per_tile": shape.tokens_per_tile,
        "encoder": "new" if config.encoder is None else config.encoder,
    }
    (progress or Silent()).say(
        f"  {figures['encoder_parameters']:,} parameters in the encoder, {figures['projector_parameters']:,} in the projector; "
        f"a picture of {shape.vision.image_size} pixels a side takes {shape.tokens_per_tile} tokens"
    )
    return figures


def encoder_fingerprint(config: VisionStageConfig, folder: Path) -> Any:
    """What the stage's output depends on beside its settings: the hashes of the encoder's files."""
    if config.encoder is None:
        return None
    place = _encoder_folder(config.encoder, folder)
    return {path.name: hash_file(path) for path in [place / "config.json", *sorted(place.glob("*.safetensors"))]}


def _encoder_folder(path: str, folder: Path) -> Path:
    place = folder / path
    if not (place / "config.json").is_file():
        raise ConfigError(f"vision.encoder: {path}: not an encoder's folder (it has no config.json)")
    return place


def _marks(config: VisionStageConfig) -> list[str]:
    if config.projector == "mlp":
        return [IMAGE]
    side = config.most_tiles if config.splits else 0
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, side + 1) for column in range(1, side + 1)]
    return [IMAGE, *_AROUND, *tiles]


def _shape(
    config: VisionStageConfig, given: VisionEncoder | None, text: ModelConfig, tokenizer: Tokenizer
) -> VisionLanguageConfig:
    """The settings of the whole, read as those of a published model are."""
    image = tokenizer.control_id(IMAGE)
    assert image is not None
    vision = config.encoder_values() if given is None else write_vision_config(given.config)
    kind = str(vision["model_type"])
    if config.projector == "pixel_shuffle" and kind not in ("siglip_vision_model", "smolvlm_vision", "idefics3_vision"):
        raise ConfigError(f"vision.projector: pixel_shuffle takes SigLIP's patches, and {config.encoder} is a {kind}; take mlp")
    if kind == "siglip2_vision_model":
        raise ConfigError("vision.encoder: an encoder of patches in a picture's own shape is joined to no decoder here")
    values: dict[str, Any] = {
        "text_config": huggingface_config(text, "float32"),
        "vision_config": vision,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    if config.projector == "mlp":
        has_class = kind == "clip_vision_model"
        values |= {
            "model_type": "llava",
            "image_token_index": image,
            "vision_feature_layer": -2 if has_class else -1,
            "vision_feature_select_strategy": "default" if has_class else "full",
        }
    else:
        values |= {"model_type": "smolvlm", "image_token_id": image, "scale_factor": config.scale_factor}
    return read_vision_language_config(values)


def _preprocessor(config: VisionStageConfig, vision: VisionConfig) -> dict[str, Any]:
    """`preprocessor_config.json`: pictures made squares of the encoder's size; with `splits` also tiles of it."""
    side, normal = vision.image_size, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if config.projector == "mlp":
        name = "CLIPImageProcessor" if vision.has_class_token else "SiglipImageProcessor"
        if name == "CLIPImageProcessor":
            return {"image_processor_type": name, "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        return {"image_processor_type": name, "size": {"height": side, "width": side}, "resample": 3, **normal}
    longest = side * (config.most_tiles if config.splits else 1)
    return {
        "image_processor_type": "SmolVLMImageProcessor",
        "do_image_splitting": config.splits,
        "size": {"longest_edge": longest},
        "max_image_size": {"longest_edge": side},
        "resample": 1,
        **normal,
    }


def _with_template(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a chat template that has a place for pictures: its own where it has one, else ours with one."""
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    text, image = tokenizer.chat_template, tokenizer.control_id(IMAGE)
    if text is not None and template_name(text) is None:
        try:
            if image is not None and tokenizer.apply_chat_template(asked).count(image) == 1:
                return tokenizer
        except RequestError:
            # said below
            pass
        raise ConfigError(
            f"{tokenizer.folder}: its chat template has no place for pictures, and is none of {', '.join(CHAT_TEMPLATES)}; "
            f"write {IMAGE} where a part of a content is of the type 'image'"
        )
    name = template_name(text) if text is not None else _suitable(tokenizer)
    assert name is not None
    (tokenizer.folder / CHAT_TEMPLATE_FILE).write_text(with_place_for_pictures(CHAT_TEMPLATES[name], IMAGE), encoding="utf-8")
    return load_tokenizer(tokenizer.folder)


def _suitable(tokenizer: Tokenizer) -> str:
    known = (name for name in ("chatml", "llama3") if all(map(tokenizer.control_id, TEMPLATE_TOKENS[name][1:])))
    return next(known, "plain")
