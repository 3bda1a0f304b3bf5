"""Tokens of texts that continue one prefix, so that a model can be asked how likely each is."""

from __future__ import annotations

from collections.abc import Sequence

from bessemer.tokenization.tokenizer import Tokenizer


def encode_continuations(tokenizer: Tokenizer, prefix: str, continuations: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Ids of a prefix, with what begins a text, and of each continuation as it is written behind it.

    White space at the prefix's end belongs to the continuations: tokenizers write a space with the word after it. Prefix and
    continuation are encoded as one text, and what is behind as many tokens as the prefix has by itself is the continuation;
    it is empty where the prefix by itself has as many. A prefix without tokens is the begin token, and continuations are then
    encoded alone. The convention is that of lm-evaluation-harness. Raises RequestError for a lone surrogate.
    """
    stripped = prefix.rstrip()
    space = prefix[len(stripped) :]
    own = tokenizer.encode(stripped, add_bos=False)
    whole = [tokenizer.encode(stripped + space + each, add_bos=False) for each in continuations]
    begin = tokenizer.begin_ids or (() if own else (tokenizer.bos_id,))
    return [*begin, *own], [ids[len(own) :] for ids in whole]
