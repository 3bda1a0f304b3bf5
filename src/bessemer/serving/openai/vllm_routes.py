"""vLLM's routes: `/tokenize`, `/detokenize`, and adapters loaded and unloaded while the server runs.

`/v1/load_lora_adapter` and `/v1/unload_lora_adapter` need an admin key.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any, Self

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from pydantic import Field, model_validator

from bessemer.assistant.messages import as_messages
from bessemer.core.errors import ArtefactError, RequestError
from bessemer.inference.engine import Engine
from bessemer.serving.config import MESSAGES, TOOLS
from bessemer.serving.openai.protocol import Message
from bessemer.serving.openai.replies import token_text
from bessemer.serving.openai.tools import FunctionTool, tools_of
from bessemer.serving.runtime.bodies import ApiError, Body, Name, misfit, read_body
from bessemer.serving.runtime.clients import caller_of
from bessemer.serving.runtime.served import Served, check_encoded
from bessemer.tokenization.trained_template import check_trained_template


class TokenizeRequest(Body):
    """A text, or a conversation up to where the assistant speaks next."""

    model: Name | None = None
    prompt: str | None = None
    messages: list[Message] = Field(default_factory=list, max_length=MESSAGES.most)
    tools: list[FunctionTool] = Field(default_factory=list, max_length=TOOLS.most)
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


def tokenize(engine: Engine, body: TokenizeRequest) -> dict[str, Any]:
    """The response of `/tokenize`. Raises RequestError for a conversation that the chat template refuses."""
    tokenizer = engine.tokenizer
    check_encoded([body.prompt, body.model_dump(include={"messages", "tools"})])
    if body.prompt is not None:
        ids = tokenizer.encode(body.prompt, add_bos=body.add_special_tokens)
    else:
        messages = [message.as_template_input() for message in as_messages([one.as_template_input() for one in body.messages])]
        tools = [tool.description_in_chat for tool in tools_of(body.tools)] or None
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=body.add_generation_prompt, tools=tools)
    strings = [token_text(tokenizer, id) for id in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": engine.context_length, "tokens": ids, "token_strs": strings}


def detokenize(engine: Engine, body: DetokenizeRequest) -> dict[str, Any]:
    """The response of `/detokenize`. Control tokens are shown; ids beyond the vocabulary have no text."""
    tokenizer = engine.tokenizer
    known = [id for id in body.tokens if id < tokenizer.vocab_size]
    return {"prompt": tokenizer.decode(known, skip_special=False)}


class LoadAdapter(Body):
    """An adapter's folder, below the one that the server was started with, and the name that clients ask for it by."""

    lora_name: str = Field(min_length=1, max_length=128, pattern=r"^[\w.:-]+$")
    lora_path: str = Field(min_length=1)
    load_inplace: bool = False


class UnloadAdapter(Body):
    """A loaded adapter's name."""

    lora_name: str = Field(min_length=1)


class AdaptersApi:
    """The routes of adapters. root: the folder below which adapters lie; None: none may be loaded."""

    def __init__(self, served: Served, root: Path | None, *, other_template: bool = False) -> None:
        """other_template: whether an adapter may have been trained with another chat template."""
        self._served = served
        self._other_template = other_template
        self._root = None if root is None else root.resolve()

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1")
        router.add_api_route("/load_lora_adapter", self.load, methods=["POST"], response_model=None)
        router.add_api_route("/unload_lora_adapter", self.unload, methods=["POST"], response_model=None)
        return router

    async def load(self, request: Request) -> PlainTextResponse:
        _check_admin(request)
        body = await read_body(LoadAdapter, request)
        if body.lora_name in self._served.all_names and not (
            body.load_inplace and body.lora_name in self._served.engine.adapters
        ):
            raise _refused(f"'{body.lora_name}' is served already; unload it, or send load_inplace: true", "lora_name")
        folder = self._folder(body.lora_path)
        try:
            if not self._other_template:
                check_trained_template([folder], self._served.engine.tokenizer.chat_template)
            await asyncio.to_thread(self._served.engine.load_adapter, body.lora_name, folder)
        except ArtefactError as error:
            # the path on this machine is not for clients
            raise _refused(str(error).replace(str(self._root), "").lstrip("/"), "lora_path") from None
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: Request) -> PlainTextResponse:
        _check_admin(request)
        body = await read_body(UnloadAdapter, request)
        try:
            await asyncio.to_thread(self._served.engine.unload_adapter, body.lora_name)
        except RequestError as error:
            raise ApiError(str(error), status=404, parameter="lora_name", code="model_not_found") from None
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def _folder(self, path: str) -> Path:
        """The folder at a path below the root. Raises ApiError for a path outside, whether or not it exists."""
        if self._root is None:
            raise ApiError("this server loads no adapters; start it with --adapter-root", status=403, code="not_allowed")
        try:
            folder = (self._root / path).resolve()
        except (OSError, ValueError):
            raise _refused("not a path", "lora_path") from None
        if self._root not in folder.parents:
            raise _refused("the folder must lie below the server's --adapter-root", "lora_path")
        return folder


def _check_admin(request: Request) -> None:
    if not caller_of(request).client.is_admin:
        raise ApiError("adapters are loaded and unloaded with an admin key", status=403, code="not_allowed")


def _refused(reason: str, parameter: str) -> ApiError:
    return ApiError(f"{parameter}: {reason}", parameter=parameter, code="invalid_value")
