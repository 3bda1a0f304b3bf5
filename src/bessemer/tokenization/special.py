"""The control tokens, and where they stand in the vocabulary.

One token, `<|endoftext|>`, both begins and ends a document: a document is `[<|endoftext|>] + ids`, and the next one's
ends it. They take the last ids of the vocabulary, after the merges.
"""

from __future__ import annotations

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

#: In the order of their ids.
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
