"""Thumbs and edits of the chat page, stored as rows for post-training."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Request
from pydantic import Field, model_validator

from bessemer.serving.runtime.bodies import ApiError, Body, misfit, read_body

#: Files below the folder: rows of `preference` and of KTO, in TRL's conversational form.
PAIRS, LABELS = "pairs.jsonl", "labels.jsonl"


class FeedbackMessage(Body):
    """A message of the prompt."""

    role: Literal["system", "user", "assistant"]
    content: str


class Feedback(Body):
    """Either a pair of answers, one better than the other, or one answer with a label."""

    prompt: Annotated[list[FeedbackMessage], Field(min_length=1, max_length=1000)]
    chosen: str | None = Field(None, min_length=1)
    rejected: str | None = None
    completion: str | None = Field(None, min_length=1)
    label: bool | None = None

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Self:
        is_pair = self.chosen is not None and self.rejected is not None
        is_label = self.completion is not None and self.label is not None
        if is_pair == is_label:
            raise misfit("chosen", "feedback is chosen and rejected, or completion and label")
        if is_pair and self.chosen == self.rejected:
            raise misfit("chosen", "both answers are the same")
        return self

    def row(self) -> dict[str, Any]:
        """The row for the file of pairs or of labels."""
        prompt = [message.model_dump() for message in self.prompt]
        if self.chosen is not None:
            return {"prompt": prompt, "chosen": _answer(self.chosen), "rejected": _answer(self.rejected or "")}
        return {"prompt": prompt, "completion": _answer(self.completion or ""), "label": self.label}


class FeedbackApi:
    """The route, and the folder of its files."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/feedback", self.take, methods=["POST"])
        return router

    async def take(self, request: Request) -> dict[str, str]:
        body = await read_body(Feedback, request)
        if self._folder is None:
            raise ApiError("this server keeps no feedback; start it with --feedback FOLDER", status=403, code="not_allowed")
        name = PAIRS if body.chosen is not None else LABELS
        with self._lock:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / name).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(body.row(), ensure_ascii=False) + "\n")
        return {"kept": name}


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
