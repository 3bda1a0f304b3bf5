"""`/tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from bessemer.assistant.messages import as_messages
from bessemer.serving import limits
from bessemer.serving.bodies import Body, Name, misfit
from bessemer.serving.log_probs import token_text
from bessemer.serving.protocol import Message
from bessemer.serving.served import check_encoded
from bessemer.serving.tools import FunctionTool, tools_of
from bessemer.serving.worker import TextEngine


class TokenizeRequest(Body):
    """A text, or a conversation up to where the assistant speaks next."""

    model: Name | None = None
    prompt: str | None = None
    messages: list[Message] = Field(default_factory=list, max_length=limits.MESSAGES.most)
    tools: list[FunctionTool] = Field(default_factory=list, max_length=limits.TOOLS.most)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise misfit("prompt", "prompt: give a text, or messages, one of the two")
        return self


class DetokenizeRequest(Body):
    """Tokens whose text is asked for."""

    model: Name | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


def tokenize(engine: TextEngine, asked: TokenizeRequest) -> dict[str, Any]:
    """The tokens. Raises RequestError for a conversation that the chat template refuses."""
    tokenizer = engine.tokenizer
    check_encoded([asked.prompt, asked.model_dump(include={"messages", "tools"})])
    if asked.prompt is not None:
        ids = tokenizer.encode(asked.prompt, add_bos=asked.add_special_tokens)
    else:
        messages = [message.as_template_input() for message in as_messages([one.as_template_input() for one in asked.messages])]
        tools = [tool.description_in_chat for tool in tools_of(asked.tools)] or None
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=asked.add_generation_prompt, tools=tools)
    strings = [token_text(tokenizer, id) for id in ids] if asked.return_token_strs else None
    return {"count": len(ids), "max_model_len": engine.context_length, "tokens": ids, "token_strs": strings}


def detokenize(engine: TextEngine, asked: DetokenizeRequest) -> dict[str, Any]:
    """The text, control tokens among it. Tokens that the tokenizer does not have have none."""
    tokenizer = engine.tokenizer
    known = [id for id in asked.tokens if id < tokenizer.vocab_size]
    return {"prompt": tokenizer.decode(known, skip_special=False)}
