"""The control tokens, and where they stand in the vocabulary.

One token, `<|endoftext|>`, both begins and ends a document: a document is `[<|endoftext|>] + ids`, and the next one's
ends it. The control tokens of the chat template and the reserved ones follow it; they take the last ids of the vocabulary.
"""

from __future__ import annotations

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
START_HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
END_OF_TURN = "<|eot_id|>"

#: The control tokens of each chat template, in the order of their ids.
TEMPLATE_TOKENS: dict[str, tuple[str, ...]] = {
    "chatml": (END_OF_TEXT, IM_START, IM_END),
    "llama3": (END_OF_TEXT, START_HEADER, END_HEADER, END_OF_TURN),
    "plain": (END_OF_TEXT,),
}

#: ChatML's, the default.
SPECIAL_TOKENS = TEMPLATE_TOKENS["chatml"]

#: Tokens that end one speaker's turn: a model that writes one is done.
TURN_ENDS = (IM_END, END_OF_TURN)


def control_tokens(chat_template: str, reserved: int = 0) -> tuple[str, ...]:
    """All control tokens of a new tokenizer in the order of their ids: the template's, then `reserved` free slots."""
    return TEMPLATE_TOKENS[chat_template] + tuple(f"<|reserved_{slot}|>" for slot in range(reserved))
