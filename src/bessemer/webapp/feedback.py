"""Thumbs and edits of the chat page, stored as rows for post-training."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Request
from pydantic import Field, model_validator

from bessemer.core.errors import ConfigError
from bessemer.core.store import person_folder, write_text
from bessemer.serving.runtime.bodies import ApiError, Body, misfit, read_body
from bessemer.serving.runtime.clients import caller_of

#: Files below the folder: rows of `preference` and of KTO, in TRL's conversational form.
PAIRS, LABELS = "pairs.jsonl", "labels.jsonl"
FeedbackId = Annotated[str, Field(pattern=r"^[0-9a-zA-Z-]{1,64}$")]


class FeedbackMessage(Body):
    """A message of the prompt."""

    role: Literal["system", "user", "assistant"]
    content: str


class Feedback(Body):
    """Either a pair of answers, one better than the other, or one answer with a label. id: of the answer, whose label takes the
    place of an earlier one."""

    prompt: Annotated[list[FeedbackMessage], Field(min_length=1, max_length=1000)]
    chosen: str | None = Field(None, min_length=1)
    rejected: str | None = None
    completion: str | None = Field(None, min_length=1)
    label: bool | None = None
    id: FeedbackId | None = None

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
        named = {} if self.id is None else {"id": self.id}
        return {"prompt": prompt, "completion": _answer(self.completion or ""), "label": self.label, **named}


class FeedbackApi:
    """The route, and the folder of its files."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/feedback", self.take, methods=["POST"])
        router.add_api_route("/feedback/{identity}", self.withdraw, methods=["DELETE"])
        return router

    async def take(self, request: Request) -> dict[str, str]:
        body = await read_body(Feedback, request)
        folder = self.kept_in(request)
        name = PAIRS if body.chosen is not None else LABELS
        with self._lock:
            folder.mkdir(parents=True, exist_ok=True)
            if name == LABELS and body.id is not None:
                _remove(folder / LABELS, body.id)
            with (folder / name).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(body.row(), ensure_ascii=False) + "\n")
        return {"kept": name}

    async def withdraw(self, identity: str, request: Request) -> dict[str, bool]:
        folder = self.kept_in(request)
        with self._lock:
            return {"deleted": _remove(folder / LABELS, identity)}

    def kept_in(self, request: Request) -> Path:
        """The folder of the caller: with keys that of the key's user, so that one person's feedback can be learnt and deleted
        apart. Raises ApiError (403) where nothing is kept."""
        if self._folder is None:
            raise ApiError("this server keeps no feedback; start it with --feedback FOLDER", status=403, code="not_allowed")
        principal = caller_of(request).client.principal
        if not principal.key:
            return self._folder
        try:
            return person_folder(self._folder, principal.user)
        except ConfigError as error:
            raise ApiError(f"no feedback is kept: {error}", status=403, code="not_allowed") from None


def _remove(path: Path, identity: str) -> bool:
    """Remove the rows of an answer from a file of labels. Returns whether there were any."""
    if not path.is_file():
        return False
    lines = path.read_text(encoding="utf-8").split("\n")
    # a line that another program wrote stays as it is
    staying = [line for line in lines if identity not in line or _id_of(line) != identity]
    if len(staying) < len(lines):
        write_text(path, "\n".join(staying))
    return len(staying) < len(lines)


def _id_of(line: str) -> Any:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row.get("id") if isinstance(row, dict) else None


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
