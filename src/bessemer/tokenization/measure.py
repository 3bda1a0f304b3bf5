"""Metrics of a tokenizer: bytes per token, tokens per word and unknown tokens by kind of text, unused and longest tokens.

The samples of the languages are translations of each other, so that their token counts are comparable: how many times the
tokens of English a language needs (Petrov et al. 2023, "Language model tokenizers introduce unfairness between languages").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from bessemer.core.store import read_json
from bessemer.tokenization.fast import batches
from bessemer.tokenization.folder import TOKENIZER_FILE
from bessemer.tokenization.tokenizer import Tokenizer

#: The samples of kinds of text, in display order.
DOMAINS = ("prose", "python", "rust", "maths")
#: Languages in which the same passage is measured, English first.
LANGUAGES = ("english", "german", "french", "spanish", "russian", "arabic", "hindi", "chinese", "japanese", "korean", "thai")
#: Languages without spaces between words, for which tokens per word have no meaning.
_WITHOUT_SPACES = {"chinese", "japanese", "thai"}

_SHOWN_TOKENS = 24
_SHOWN_RUNS = 4
_CHARACTERS_OF_A_RUN = 2


def sample_text(domain: str) -> str:
    """The sample of a domain or a language, one to two kilobytes."""
    return (resources.files("bessemer.tokenization") / "samples" / f"{domain}.txt").read_text(encoding="utf-8")


@dataclass
class TextCounts:
    """UTF-8 bytes, characters and words (separated by white space) of texts."""

    bytes: int = 0
    characters: int = 0
    words: int = 0

    def add(self, text: str) -> None:
        """Count another text."""
        self.bytes += len(text.encode())
        self.characters += len(text)
        self.words += len(text.split())

    def baselines(self) -> dict[str, float | None]:
        """Bytes per token of trivial tokenizers on these texts: one token per byte, character, or word with the white space
        before it, with a vocabulary of any size."""
        return {
            "byte": 1.0 if self.bytes else None,
            "character": _ratio(self.bytes, self.characters),
            "word": _ratio(self.bytes, self.words),
        }


def by_domain(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Metrics of the samples by domain and language, as JSON values: `bytes`, `tokens`, `bytes_per_token`, `fertility`
    (tokens per word; None where words have no spaces between them), `unknown_share` (None where nothing is unknown by
    construction), `round_trip`, and for languages `tokens_to_english`."""
    metrics = {name: _sample_metrics(tokenizer, name) for name in (*DOMAINS, *LANGUAGES)}
    for language in LANGUAGES:
        metrics[language]["tokens_to_english"] = _ratio(metrics[language]["tokens"], metrics[LANGUAGES[0]]["tokens"])
    return metrics


def _sample_metrics(tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    text = sample_text(name)
    ids = tokenizer.encode(text, add_bos=False)
    counted = TextCounts()
    counted.add(text)
    return {
        "bytes": counted.bytes,
        "tokens": len(ids),
        "bytes_per_token": _ratio(counted.bytes, len(ids)),
        "fertility": None if name in _WITHOUT_SPACES else _ratio(len(ids), counted.words),
        "unknown_share": unknown_share(tokenizer, np.bincount(ids, minlength=tokenizer.vocab_size)),
        "round_trip": tokenizer.decode(ids, skip_special=False) == text,
    }


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id of the unknown token; None when there is none."""
    model: Mapping[str, Any] = read_json(tokenizer.folder / TOKENIZER_FILE)["model"]
    if "unk_id" in model:
        return model["unk_id"]
    return model["vocab"].get(model["unk_token"]) if model.get("unk_token") else None


def unknown_share(tokenizer: Tokenizer, usage: np.ndarray) -> float | None:
    """The fraction of unknown tokens. usage: occurrences by id. None where every text can be encoded: there is no unknown
    token, or byte fallback takes its place."""
    id = unknown_id(tokenizer)
    writes_bytes = read_json(tokenizer.folder / TOKENIZER_FILE)["model"].get("byte_fallback")
    return None if id is None or writes_bytes else _ratio(int(usage[id]), int(usage.sum()), digits=6)


def token_usage(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Number of occurrences of each id in the texts: int64 (vocab_size,)."""
    usage = np.zeros(tokenizer.vocab_size, np.int64)
    for batch in batches(texts):
        usage += np.bincount(tokenizer.encode_flat(batch)[0], minlength=len(usage))
    return usage


def vocabulary_metrics(tokenizer: Tokenizer, usage: np.ndarray | None = None) -> dict[str, Any]:
    """The longest tokens, and a sample from the first learned to the last; with `usage`, the number of unused ones:
    `unused_tokens` longer than a byte, `unused_bytes` whose single-byte tokens are all unused. Without control tokens and the
    unknown token."""
    tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
    excluded = {id for id in range(len(tokens)) if tokenizer.is_special(id) or not tokens[id]} | {unknown_id(tokenizer)}
    long = [id for id in range(len(tokens)) if id not in excluded and len(tokens[id]) > 1]
    longest = _longest({tokens[id] for id in long})
    evenly = np.linspace(0, max(len(long) - 1, 0), min(_SHOWN_TOKENS, len(long))).astype(int)
    metrics: dict[str, Any] = {
        "longest_tokens": [shown_token(token) for token in longest],
        "vocabulary_sample": [shown_token(tokens[long[place]]) for place in evenly],
    }
    if usage is not None:
        single = {id: tokens[id] for id in range(len(tokens)) if id not in excluded and len(tokens[id]) == 1}
        unused = [id for id in long if usage[id] == 0]
        metrics["unused_tokens"] = len(unused)
        metrics["unused_examples"] = [shown_token(tokens[id]) for id in unused[:: max(1, len(unused) // _SHOWN_TOKENS)]]
        metrics["unused_examples"] = metrics["unused_examples"][:_SHOWN_TOKENS]
        metrics["unused_bytes"] = len(set(single.values()) - {byte for id, byte in single.items() if usage[id]})
    return metrics


def _longest(tokens: Iterable[bytes]) -> list[bytes]:
    """The longest tokens, the longest first, with only a few of the runs of one or two characters (rules, indentation)."""
    by_length = sorted(tokens, key=lambda token: (-len(token), token))
    runs = [token for token in by_length if len(set(token)) <= _CHARACTERS_OF_A_RUN][_SHOWN_RUNS:]
    left_out = set(runs)
    return [token for token in by_length if token not in left_out][:_SHOWN_TOKENS]


def describe(tokenizer: Tokenizer, sample: str, texts: Sequence[str] = ()) -> dict[str, Any]:
    """Metrics of a tokenizer without a stage, as JSON values: the samples by domain, its longest tokens, the tokens of
    `sample`; with `texts`, their metrics and the tokens that they never use."""
    counted = TextCounts()
    for text in texts:
        counted.add(text)
    usage = token_usage(tokenizer, texts) if texts else None
    of_texts: dict[str, Any] = {}
    if usage is not None:
        tokens = int(usage.sum())
        of_texts = {
            "text_bytes": counted.bytes,
            "text_tokens": tokens,
            "bytes_per_token": _ratio(counted.bytes, tokens),
            "fertility": _ratio(tokens, counted.words),
        }
        share = unknown_share(tokenizer, usage)
        of_texts |= {} if share is None else {"unknown_share": share}
    return {
        "vocab_size": tokenizer.vocab_size,
        "control_tokens": sum(map(tokenizer.is_special, range(tokenizer.vocab_size))),
        "kind": tokenizer.kind,
        "lossless": tokenizer.lossless,
        **of_texts,
        **vocabulary_metrics(tokenizer, usage),
        "sample_tokens": shown_tokens(tokenizer, sample),
        "by_domain": by_domain(tokenizer),
    }


def control_tokens_of(tokenizer: Tokenizer) -> list[str]:
    """The control tokens as text, in the order of their ids."""
    return [tokenizer.decode([id], skip_special=False) for id in range(tokenizer.vocab_size) if tokenizer.is_special(id)]


def shown_tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    """A text's tokens, each as displayable text."""
    return [shown_token(tokenizer.token_bytes(id)) for id in tokenizer.encode(text, add_bos=False)]


def shown_token(token: bytes) -> str:
    r"""A token's text; bytes of incomplete characters are written as `\xe2`."""
    return token.decode("utf-8", "backslashreplace")


def _ratio(count: float, of: float, digits: int = 4) -> float | None:
    return round(count / of, digits) if of else None
