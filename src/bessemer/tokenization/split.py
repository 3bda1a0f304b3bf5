"""The regexes that cut a text into pieces before BPE: only those that llama.cpp knows by name.

BPE never merges across a cut, so the regex decides what a token can be: whether digits stand alone, whether a word
takes its space along. A regex of one's own could not be exported to GGUF, which stores the name and not the regex.
The names are llama.cpp's (`tokenizer.ggml.pre`); each regex is the one in the `tokenizer.json` of the model it is named after.
"""

from __future__ import annotations

SPLIT_REGEXES: dict[str, str] = {
    # GPT-2: digits in runs of any length, contractions in lower case only
    "gpt-2": r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    # Llama 3: digits in threes, a word may take any one character before it along
    "llama-bpe": (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
        r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    ),
    # Qwen2 and Qwen3: as Llama 3, but every digit alone, so that numbers look the same at every length
    "qwen2": (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"""
        r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    ),
}
