"""Fill-in-the-middle: its control tokens, and prompts that ask a model for what stands between two texts.

A model that was trained on rearranged documents (Bavarian et al. 2022) is asked in the order prefix, suffix, middle (PSM),
as published models are:

    <prefix> prefix <suffix> suffix <middle>

with control tokens for the words in angle brackets. What it writes is the middle, and the end token ends it. Or the suffix
stands first (SPM), and the prefix right before what continues it, if the model has read documents in that order:

    <prefix> <suffix> suffix <middle> prefix
"""

from __future__ import annotations

from dataclasses import dataclass

from bessemer.core.errors import ConfigError
from bessemer.tokenization.special import FILL_IN_THE_MIDDLE_SPELLINGS
from bessemer.tokenization.tokenizer import Tokenizer


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
    """Ids of a prompt for what stands between two texts, with what begins a text. suffix_first: in the order SPM.

    Either text may be empty. Each is encoded by itself: a gap that begins and ends at line breaks cuts no token of most
    tokenizers. Raises ConfigError for a tokenizer without the control tokens, RequestError for a lone surrogate.
    """
    control = fim_tokens(tokenizer)
    before, after = (tokenizer.encode(text, add_bos=False) for text in (prefix, suffix))
    if suffix_first:
        return [*tokenizer.begin_ids, control.prefix, control.suffix, *after, control.middle, *before]
    return [*tokenizer.begin_ids, control.prefix, *before, control.suffix, *after, control.middle]
