"""What a stage that learns from conversations writes next to its models: the chat template of training, the format of tools'
calls, and, if that format is JSON between tags, how `transformers` parses an answer (`response_template`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bessemer.assistant.tool_formats import ToolFormat, format_name_of, format_of
from bessemer.core.errors import RequestError
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.tokenization.trained_template import record_training

#: Formats whose calls are objects with `name` and `arguments` between tags, as `response_template` can describe them.
_JSON_IN_TAGS = ("hermes",)


def keep_template(out: Path, tokenizer: Tokenizer) -> None:
    """Write the template of a stage's training into its models and adapters. tokenizer: that of the trained model; if it has no
    chat template, nothing is written."""
    record_training(out, tokenizer.folder, format_name_of(tokenizer), response_template(tokenizer))


def response_template(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """How `transformers` parses an answer (`PreTrainedTokenizerBase.parse_response`, from 5.13 on), as our parser does.

    None where calls are not JSON between tags, and for a template without a generation prompt.
    """
    anchor = _generation_prompt(tokenizer)
    if not anchor or format_name_of(tokenizer) not in _JSON_IN_TAGS:
        return None
    form: ToolFormat = format_of(tokenizer)
    assert form.closing is not None, "calls stand between tags"
    ends = "|".join(re.escape(token) for token in sorted(tokenizer.end_tokens))
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": anchor,
        "fields": {
            "reasoning_content": {
                "open": form.thinking.opening,
                "close_pattern": rf"{re.escape(form.thinking.closing)}\s*",
                "content": "text",
            },
            "tool_calls": {
                "open": form.opening,
                "close_pattern": rf"{re.escape(form.closing)}\s*",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close_pattern": rf"(?:{ends})\s*", "content": "text"},
        },
    }


def _generation_prompt(tokenizer: Tokenizer) -> str:
    """What the template writes before the assistant's next turn; empty where that cannot be determined."""
    if tokenizer.chat_template is None:
        return ""
    question = [{"role": "user", "content": "question"}]
    try:
        without, prompt = (
            "".join(segment.text for segment in tokenizer.render_chat(question, asked)) for asked in (False, True)
        )
    except RequestError:
        return ""
    return prompt[len(without) :] if prompt.startswith(without) else ""
