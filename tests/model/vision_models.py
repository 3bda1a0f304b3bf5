"""Tiny models that read pictures, and encoders alone, made by `transformers`, with every parameter drawn at random."""

from __future__ import annotations

import torch
import transformers

_TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
IMAGE = 5


def _siglip(**others):
    return transformers.SiglipVisionConfig(**_VISION | others)


def _llava(vision, text, **others):
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, **others)
    return transformers.LlavaForConditionalGeneration(config)


def _llama():
    return transformers.LlamaConfig(**_TEXT)


def _idefics3(text=None, **others):
    config = transformers.Idefics3Config(
        vision_config=dict(_VISION), text_config=text or _llama(), image_token_id=IMAGE, scale_factor=2, **others
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def _smolvlm():
    config = transformers.SmolVLMConfig(
        vision_config=dict(_VISION),
        text_config=_llama(),
        image_token_id=IMAGE,
        scale_factor=4,
        tie_word_embeddings=True,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def _gemma3():
    """Gemma 3 with a window shorter than a picture, in layers of both kinds."""
    text = transformers.Gemma3TextConfig(
        **_TEXT | {"num_hidden_layers": 3, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5},
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    config = transformers.Gemma3Config(
        vision_config=_siglip(vision_use_head=False),
        text_config=text,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=3,
        eoi_token_index=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


#: Models with a decoder, and the number of tokens that a picture of 16 × 16 pixels takes.
MODELS = {
    "llava-clip-qwen2": lambda: _llava(transformers.CLIPVisionConfig(**_VISION), transformers.Qwen2Config(**_TEXT)),
    "llava-siglip-layers": lambda: _llava(
        _siglip(),
        _llama(),
        vision_feature_select_strategy="full",
        vision_feature_layer=[1, -1],
        multimodal_projector_bias=False,
    ),
    "idefics3": _idefics3,
    "smolvlm-tied": _smolvlm,
    "gemma3": _gemma3,
}
TOKENS = {"llava-clip-qwen2": 16, "llava-siglip-layers": 16, "idefics3": 4, "smolvlm-tied": 1, "gemma3": 4}

#: Encoders alone.
ENCODERS = {
    # as so400m-patch14-384: a side is no whole number of patches
    "siglip": lambda: transformers.SiglipVisionModel(_siglip(image_size=18)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**_VISION)),
    "siglip2": lambda: transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(
            **{key: value for key, value in _VISION.items() if key != "image_size"}, num_patches=16
        )
    ),
}


@torch.no_grad()
def make(case):
    """A model of a case, in evaluation mode."""
    model = (MODELS | ENCODERS)[case]().eval()
    generator = torch.Generator().manual_seed(11)
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and "norm" in name and name.endswith("weight"):
            weight.copy_(1 + 0.2 * torch.randn(weight.shape, generator=generator))
        else:
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.3 if weight.dim() > 1 else 0.1))
    return model


def pictures(count, side=16, seed=3):
    """Random pixels, (count, 3, side, side)."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def row(tokens, before=3, after=4, seed=3, images=1):
    """A row of random tokens with places for pictures, (1, T)."""
    text = torch.randint(6, 97, (1, before + after), generator=torch.Generator().manual_seed(seed))
    parts = [text[:, :before]]
    for _ in range(images):
        parts += [torch.full((1, tokens), IMAGE), text[:, before:]]
    return torch.cat(parts, dim=1)
