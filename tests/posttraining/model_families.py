"""Small tokenizers with the true chat templates of other people's models."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from bessemer.tokenization.tokenizer import load_tokenizer

TEMPLATES = Path(__file__).parent / "templates"

_THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Family:
    """special: control tokens; added: other added tokens. ends: of turns, as `generation_config.json` lists them. kind: of the
    vocabulary."""

    special: tuple[str, ...]
    ends: tuple[str, ...]
    added: tuple[str, ...] = ()
    bos: str | None = None
    kind: str = "bytes"
    has_system: bool = True
    has_tools: bool = True
    notes: dict[str, str] = field(default_factory=dict)


FAMILIES = {
    "qwen2_5": Family(_CHATML, ("<|im_end|>", "<|endoftext|>"), ("<tool_call>", "</tool_call>")),
    "qwen3": Family(_CHATML, ("<|im_end|>", "<|endoftext|>"), _THINK),
    "llama3_1": Family(
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
        ("<|eot_id|>", "<|end_of_text|>"),
        bos="<|begin_of_text|>",
    ),
    "gemma2": Family(
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        ("<eos>", "<end_of_turn>"),
        bos="<bos>",
        kind="pieces",
        has_system=False,
        has_tools=False,
    ),
    "mistral_nemo": Family(
        (
            "<s>",
            "</s>",
            *(f"[{mark}{name}]" for name in ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS") for mark in ("", "/")),
            "[TOOL_CALLS]",
        ),
        ("</s>",),
        bos="<s>",
    ),
    "smollm3": Family(_CHATML, ("<|im_end|>", "<|endoftext|>"), _THINK),
    "gpt_oss": Family(
        tuple(
            f"<|{name}|>"
            for name in ("startoftext", "endoftext", "start", "end", "message", "channel", "constrain", "return", "call")
        ),
        ("<|return|>", "<|endoftext|>", "<|call|>"),
        bos="<|startoftext|>",
    ),
    "deepseek_r1": Family(
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        ("<｜end▁of▁sentence｜>",),
        (
            *("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁sep｜>"),
            *(f"<｜tool▁{what}▁{end}｜>" for what in ("calls", "call", "outputs", "output") for end in ("begin", "end")),
        ),
        bos="<｜begin▁of▁sentence｜>",
    ),
    "deepseek_v31": Family(
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        ("<｜end▁of▁sentence｜>",),
        (
            *("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁sep｜>"),
            *(f"<｜tool▁{what}▁{end}｜>" for what in ("calls", "call", "outputs", "output") for end in ("begin", "end")),
        ),
        bos="<｜begin▁of▁sentence｜>",
    ),
    "glm4_6": Family(
        ("[gMASK]", "<sop>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        (*_THINK, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
}

_WORDS = ["the user asks a question about the weather in Paris and the assistant answers it in a sentence"] * 4


def write_family(name, folder):
    """A tokenizer's folder with the template of a family."""
    family = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    if family.kind == "pieces":
        alphabet = ["▁", *map(chr, range(33, 127)), *(f"<0x{byte:02X}>" for byte in range(256))]
        tokenizer = tokenizers.Tokenizer(
            models.BPE({piece: number for number, piece in enumerate(alphabet)}, [], byte_fallback=True, fuse_unk=True)
        )
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(
                    tokenizers.Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"),
                    "isolated",
                ),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
        tokenizer.train_from_iterator([*_WORDS, "\n\n", "\n\n\n"] * 2, trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in family.special])
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in family.added])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": family.ends[0]}
    config |= {"bos_token": family.bos} if family.bos else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    ends = [tokenizer.token_to_id(token) for token in family.ends]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    (folder / "chat_template.jinja").write_text((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"), encoding="utf-8")
    return load_tokenizer(folder)
