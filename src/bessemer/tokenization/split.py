"""Split regexes, which cut a text into pieces before BPE: only those that llama.cpp knows by name.

BPE never merges across a cut, so the regex decides what a token can be: whether digits stand alone, whether a word
takes its space along. A regex of one's own could not be exported to GGUF, which stores the name and not the regex.
The names are llama.cpp's (`tokenizer.ggml.pre`); each regex is the one in the `tokenizer.json` of the model it is named
after, or, where that cuts in several steps, one regex that gives the same pieces. The spelling matters: fastokens has code of
its own for the published spellings, five times faster than its regex engine.
"""

from __future__ import annotations

from typing import Any

_GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_CONTRACTIONS = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)"""
_UPPER = r"""[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"""
_LOWER = r"""[\p{Ll}\p{Lm}\p{Lo}\p{M}]"""
_LINES_AND_SPACES = r"""\s*[\r\n]+|\s+(?!\S)|\s+"""

#: The splits for new tokenizers: llama.cpp cuts as they do (but for U+017F, the long s, in 'ſ for 's). Every regex matches at
#: every character, so that no text lies between its pieces.
SPLIT_REGEXES: dict[str, str] = {
    # GPT-2: digits in runs of any length, contractions in lower case only
    "gpt-2": _GPT2,
    # Llama 3 (and GPT-4): digits in threes, a word may take any one character before it along
    "llama-bpe": (
        rf"""{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES_AND_SPACES}"""
    ),
    # Qwen2 and Qwen3: as Llama 3, but every digit alone, so that numbers look the same at every length
    "qwen2": rf"""{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES_AND_SPACES}""",
    # Qwen3.5: as Qwen2, but a mark (a vowel sign of Hindi or Thai, a combining accent) belongs to its word
    "qwen35": (
        rf"""{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"""
        rf"""| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES_AND_SPACES}"""
    ),
    # SmolLM2, StarCoder, Command R: digits alone, then GPT-2's regex on what lies between them
    "smollm": r"""\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+""",
}

#: Splits that llama.cpp knows by name but cuts otherwise than the models do, at every combining mark ("é" in NFD, the vowel
#: signs of Hindi): to read and write the tokenizers that have them, and not for new ones.
APPROXIMATED_REGEXES: dict[str, str] = {
    # GPT-4o: a word also ends where lower case turns to upper (camelCase), and keeps its contraction
    "gpt-4o": (
        rf"""[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"""
        rf"""|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES_AND_SPACES}"""
    ),
    # Mistral's Tekken: as GPT-4o, but every digit alone and no contractions
    "tekken": (
        rf"""[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"""
        rf"""|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES_AND_SPACES}"""
    ),
}

#: llama.cpp's other names for the same cuts, as GGUF files hold them.
OTHER_NAMES: dict[str, str] = {
    **dict.fromkeys(("mpt", "olmo", "jais", "phi-2", "exaone4", "trillion", "granite-docling"), "gpt-2"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), "llama-bpe"),
    **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez", "grok-2"), "qwen2"),
    **dict.fromkeys(("llama4", "kanana2"), "gpt-4o"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
}

#: Regexes of published `pre_tokenizer` sections, in the order of their steps → the split that cuts the same.
_STEPS: dict[tuple[str, ...], str] = {
    (r"\p{N}", _GPT2): "smollm",
    # tiktoken's spellings
    (r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+""",): (
        "llama-bpe"
    ),
    (r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",): "gpt-2",
    (r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",): "gpt-2",
}


def pre_tokenizer(split: str) -> dict[str, Any]:
    """The `pre_tokenizer` section of a byte-level tokenizer that cuts by a named regex."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": split == "gpt-2"}
    if split == "gpt-2":
        # as in GPT-2's own files; fastokens needs a quarter of the time that it needs for the regex
        return byte_level
    regex = (SPLIT_REGEXES | APPROXIMATED_REGEXES)[split]
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            byte_level,
        ],
    }


def split_name(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """llama.cpp's name for the cuts of a `tokenizer.json`'s byte-level `pre_tokenizer`, ours or a published model's.

    None for any other: another regex, no byte level, or a space put before the text.
    """
    if pre_tokenizer is None:
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space", True):
        return None
    regexes = [_regex(step) for step in steps[:-1]]
    if steps[-1].get("use_regex", True):
        regexes.append(_GPT2)
    return split_of_regexes(regexes)


def split_of_regexes(regexes: list[str | None]) -> str | None:
    """The name of the split that cuts as these regexes do one after the other; None where none does."""
    if None in regexes:
        return None
    known = {(regex,): name for name, regex in (SPLIT_REGEXES | APPROXIMATED_REGEXES).items()} | _STEPS
    return known.get(tuple(regex for regex in regexes if regex is not None))


def _regex(step: dict[str, Any]) -> str | None:
    """The regex of a `pre_tokenizer` step whose matches become pieces; None for any other step."""
    if step["type"] == "Digits":
        return r"\p{N}" if step["individual_digits"] else None
    if step["type"] != "Split" or "Regex" not in step["pattern"]:
        return None
    regex: str = step["pattern"]["Regex"]
    isolated = step["behavior"] == "Isolated"
    # "Removed" with `invert` keeps only the matches: the same pieces if the matches cover the text
    only_matches = step["behavior"] == "Removed" and step["invert"] and regex != r"\p{N}"
    return regex if isolated or only_matches else None
