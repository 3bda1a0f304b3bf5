"""Pictures as people send them, drawn here: files of many kinds, and what is wrong with some."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import tokenizers
import torch
from PIL import Image

from bessemer.model.vision.config import VisionLanguageConfig, read_vision_language_config, write_vision_language_config
from bessemer.model.vision.folder import initial_vision_language, save_vision_language
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.model.tokenizers import write_small_tokenizer

#: What Idefics3's prompts consist of besides text.
MARKS = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)
#: SmolVLM's chat template.
TEMPLATE = (
    "<|endoftext|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def drawn(width, height, seed=0, mode="RGB"):
    """A picture with edges and gradients, and noise."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    values = np.stack(
        [columns * 255 // max(1, width - 1), rows * 255 // max(1, height - 1), (rows // 3 + columns // 5) % 2 * 200]
    )
    values = (values.transpose(1, 2, 0) + random.integers(0, 40, (height, width, 3))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image, kind="PNG", **options):
    """The bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_header(width, height, depth=8):
    """A PNG that says a size and holds no such pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


#: What Gemma 3's prompts consist of besides text, and its chat template.
GEMMA3_MARKS = ("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_turn>", "<end_of_turn>")
GEMMA3_TEMPLATE = (
    "<|endoftext|>{% for message in messages %}<start_of_turn>"
    "{{ ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def write_picture_tokenizer(folder, marks=MARKS, template=TEMPLATE, *, even=True):
    """The small tokenizer with marks and a template, Idefics3's and SmolVLM's; returns its folder. even: of an even number of
    tokens, so that two processes can share them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_small_tokenizer(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    unused = ["<unused>"] * (even * (tokenizer.get_vocab_size() + len(marks)) % 2)
    tokenizer.add_special_tokens([*marks, *unused])
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"chat_template": template}), encoding="utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


#: Pictures in tiles of 16 pixels, at most 4 along a side.
TILES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}


def small_config(tokenizer, **changes) -> VisionLanguageConfig:
    """A tiny SmolVLM for a tokenizer: a tile takes 4 tokens."""
    values = {
        "model_type": "smolvlm",
        "scale_factor": 2,
        "image_token_id": tokenizer.control_id("<image>"),
        "vision_config": {
            "hidden_size": 24,
            "intermediate_size": 36,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        },
    }
    return read_vision_language_config(values | changes)


def small_gemma3_config(tokenizer) -> VisionLanguageConfig:
    """A tiny Gemma 3: a picture of 32 pixels takes 16 tokens, more than the window of most of its layers."""
    values = {
        "model_type": "gemma3",
        "mm_tokens_per_image": 16,
        "tie_word_embeddings": False,
        "boi_token_index": tokenizer.control_id("<start_of_image>"),
        "eoi_token_index": tokenizer.control_id("<end_of_image>"),
        "image_token_index": tokenizer.control_id("<image_soft_token>"),
        "vision_config": {
            "hidden_size": 24,
            "intermediate_size": 36,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "vision_use_head": False,
        },
        "text_config": {
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "max_position_embeddings": 512,
            "sliding_window": 6,
        },
    }
    return read_vision_language_config(values)


def write_gemma3_model(folder, **settings):
    """A folder with a tiny Gemma 3 of random weights whose answers depend on its pictures; settings: of their preparation."""
    write_picture_tokenizer(folder, GEMMA3_MARKS, GEMMA3_TEMPLATE)
    settings = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 32, "width": 32}} | settings
    return _write_random(folder, small_gemma3_config(load_tokenizer(folder)), settings)


def write_llava_model(folder):
    """A folder with a tiny LLaVA of random weights over a CLIP, whose answers depend on its pictures; returns the model."""
    tokenizer = load_tokenizer(write_picture_tokenizer(folder, ("<image>", "<end_of_utterance>"), TEMPLATE))
    small = small_config(tokenizer)
    values = write_vision_language_config(small) | {"model_type": "llava", "image_token_index": small.image_token_id}
    values["vision_config"] |= {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    values |= {"vision_feature_select_strategy": "default", "vision_feature_layer": -2}
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "crop_size": 16}
    return _write_random(folder, read_vision_language_config(values), settings)


#: What Qwen2.5-VL's prompts consist of besides text, and its chat template.
QWEN_MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Squares of 8 pixels, from 4 to 40 of them.
NATIVE = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 256, "max_pixels": 2560}


def write_qwen_model(folder, **settings):
    """A folder with a tiny Qwen2.5-VL of random weights whose answers depend on its pictures; returns the model."""
    tokenizer = load_tokenizer(write_picture_tokenizer(folder, QWEN_MARKS, QWEN_TEMPLATE))
    values = write_vision_language_config(small_config(tokenizer, image_token_id=tokenizer.control_id("<|image_pad|>")))
    values["text_config"] |= {"model_type": "qwen2_5_vl_text", "rope_parameters": None, "rope_theta": 10_000.0}
    values["text_config"]["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 2, 2]}
    values |= {"model_type": "qwen2_5_vl"}
    values["vision_config"] = {"hidden_size": 32, "intermediate_size": 36, "depth": 3, "num_heads": 2, "patch_size": 4}
    values["vision_config"] |= {"window_size": 16, "fullatt_block_indexes": [1]}
    settings = {"image_processor_type": "Qwen2VLImageProcessor", **NATIVE} | settings
    return _write_random(folder, read_vision_language_config(values), settings)


def write_picture_model(folder, *, even=True, **changes):
    """A folder with a tiny SmolVLM of random weights whose answers depend on its pictures; returns the model."""
    write_picture_tokenizer(folder, even=even)
    settings = {"image_processor_type": "SmolVLMImageProcessor", "do_image_splitting": True, **TILES}
    return _write_random(folder, small_config(load_tokenizer(folder), **changes), settings)


def write_colours(folder, count=64, *, even=True):
    """A folder with a tiny SmolVLM, one tile a picture, in `model`, and pictures: red and blue by turns."""
    write_picture_model(folder / "model", even=even)
    path = folder / "model" / "preprocessor_config.json"
    one_tile = {"do_image_splitting": False, "size": {"longest_edge": 16}}
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | one_tile), encoding="utf-8")
    random = np.random.default_rng(5)
    for number in range(count):
        pixels = random.integers(0, 80, (16, 16, 3))
        pixels[..., 2 * (number % 2)] += 150
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


@torch.no_grad()
def _write_random(folder, config, settings):
    model = initial_vision_language(config, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(0.0, 1.5 * weight[0].numel() ** -0.5, generator=generator)
            if "embed_tokens" in name:
                weight.normal_(0.0, 1 / config.text.embedding_multiplier, generator=generator)
    save_vision_language(model, folder, processor=None)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return model
