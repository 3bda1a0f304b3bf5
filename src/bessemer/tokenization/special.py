"""Control tokens and their ids in the vocabulary.

One token, `<|endoftext|>`, both begins and ends a document: a document is `[<|endoftext|>] + ids`, and the next one's
ends it. The control tokens of the chat template, those
for fill-in-the-middle and the reserved ones follow it; they take the last ids of the vocabulary.
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


#: Control tokens for fill-in-the-middle as published models spell them, those of (prefix, suffix, middle); a new tokenizer
#: gets the first, Qwen2.5-Coder's. The second is StarCoder's.
FILL_IN_THE_MIDDLE_SPELLINGS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)


def control_tokens(chat_template: str, reserved: int = 0, fill_in_the_middle: bool = False) -> tuple[str, ...]:
    """All control tokens of a new tokenizer in the order of their ids: the template's, those for fill-in-the-middle where
    asked for, then `reserved` free slots."""
    middle = FILL_IN_THE_MIDDLE_SPELLINGS[0] if fill_in_the_middle else ()
    return TEMPLATE_TOKENS[chat_template] + middle + tuple(f"<|reserved_{slot}|>" for slot in range(reserved))
