"""Prompts with continuations to score, prompts for fill-in-the-middle, and decoding of ids as they arrive.

A model that was trained on rearranged documents (Bavarian et al. 2022) can fill in the middle between two texts. The prompt of
published models has the order prefix, suffix, middle (PSM); words in angle brackets stand for control tokens:

    <prefix> prefix <suffix> suffix <middle>

The model writes the middle and an end token. With the order SPM, for models trained on it, the middle continues the prefix:

    <prefix> <suffix> suffix <middle> prefix
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bessemer.core.errors import ConfigError
from bessemer.tokenization.control_tokens import FILL_IN_THE_MIDDLE_SPELLINGS
from bessemer.tokenization.tokenizer import Tokenizer


def encode_continuations(tokenizer: Tokenizer, prefix: str, continuations: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Ids of a prefix, begin tokens included, and of each continuation as it is written after the prefix.

    White space at the prefix's end moves to the continuations, because tokenizers join a space to the word after it. Prefix and
    continuation are encoded as one text. Of its ids the first n are the prefix, n being the ids of the prefix alone, and the
    rest is the continuation, which may be empty. A prefix without tokens becomes the begin token. The convention is that of
    lm-evaluation-harness. Raises RequestError for a lone surrogate.
    """
    stripped = prefix.rstrip()
    space = prefix[len(stripped) :]
    own = tokenizer.encode(stripped, add_bos=False)
    whole = [tokenizer.encode(stripped + space + each, add_bos=False) for each in continuations]
    begin = tokenizer.begin_ids or (() if own else (tokenizer.bos_id,))
    return [*begin, *own], [ids[len(own) :] for ids in whole]


@dataclass(frozen=True)
class FimTokens:
    """Ids of the control tokens before prefix, suffix and middle."""

    prefix: int
    suffix: int
    middle: int


def fim_tokens(tokenizer: Tokenizer) -> FimTokens:
    """The tokenizer's fill-in-the-middle tokens, in one of the spellings of published models.

    Raises ConfigError when it has none.
    """
    for spelling in FILL_IN_THE_MIDDLE_SPELLINGS:
        ids = [tokenizer.control_id(token) for token in spelling]
        if None not in ids:
            return FimTokens(*(id for id in ids if id is not None))
    names = ", ".join(FILL_IN_THE_MIDDLE_SPELLINGS[0])
    raise ConfigError(
        f"filling in the middle needs the control tokens {names}, which this tokenizer lacks; train it with "
        "tokenize.fim_tokens, or add them to it with `bessemer extend --special`"
    )


def infill_prompt(tokenizer: Tokenizer, prefix: str, suffix: str, *, suffix_first: bool = False) -> list[int]:
    """Ids of a prompt to fill in the middle between two texts, begin tokens included. suffix_first: the order SPM.

    Either text may be empty. Each is encoded by itself, so a middle that begins and ends at line breaks is best: most
    tokenizers have no token across them. Raises ConfigError for a tokenizer without the control tokens, RequestError for a lone
    surrogate.
    """
    control = fim_tokens(tokenizer)
    before, after = (tokenizer.encode(text, add_bos=False) for text in (prefix, suffix))
    if suffix_first:
        return [*tokenizer.begin_ids, control.prefix, control.suffix, *after, control.middle, *before]
    return [*tokenizer.begin_ids, control.prefix, *before, control.suffix, *after, control.middle]


class StreamingDecoder:
    """Decodes a growing sequence of token ids.

    What `feed` has returned so far, followed by `flush()`, equals `tokenizer.decode` of all the ids. Bytes that can
    still become a character are held back until the rest of it arrives.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, goes_on: bool = False) -> None:
        """goes_on: the ids continue a text, so a space before the first word is kept."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._beginning = not goes_on

    def feed(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        shown = self._tokenizer.shown(ids, self._skip_special)
        if self._beginning:
            new = self._tokenizer.decode_bytes(shown, skip_special=False)
        else:
            new = b"".join(map(self._tokenizer.token_bytes, shown))
        self._beginning = self._beginning and not shown
        return self._decoder.decode(new)

    def flush(self) -> str:
        """The end of the text: U+FFFD for an incomplete character, else empty."""
        self._beginning = True
        return self._decoder.decode(b"", final=True)
