"""The stage `synthesize`: conversations that a model writes, filtered and deduplicated by the refinery, each with its
provenance.

Prompts are written after the example of others (Wang et al. 2022, arXiv 2212.10560).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from bessemer.core.chat_client import ChatModel, CutText
from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.hashing import derive_seed, hash_value
from bessemer.core.progress import Progress, Silent
from bessemer.data.stages.refine import refine
from bessemer.data.thresholds import rule_of
from bessemer.inference.chat import EngineChat
from bessemer.inference.engine import Engine
from bessemer.posttraining.chat_models import (
    CUT_REASON,
    chat_models_fingerprint,
    open_chat_model,
    place_fingerprint,
    provenance,
)
from bessemer.posttraining.data.examples import RowReader, read_examples
from bessemer.posttraining.data.formats import Message, as_prompt, conversation_text
from bessemer.posttraining.data.made import FinishedRows, data_path, write_rows
from bessemer.posttraining.synthetic.config import SYNTHESIZE_VERSION, SynthesizeConfig
from bessemer.tasks.judge import fence_around


@dataclass(frozen=True)
class PromptRequest:
    """A request to write a prompt. seeds: numbers of the prompts shown as examples."""

    text: str
    seeds: tuple[int, ...]


def without_fence(text: str) -> str:
    """A writer's prompt without the lines of equals signs around it, which small models copy."""
    lines = text.strip().splitlines()
    while lines and not lines[0].strip("= "):
        lines.pop(0)
    while lines and not lines[-1].strip("= "):
        lines.pop()
    return "\n".join(lines).strip()


def prompt_request(seeds: Sequence[str], examples: int, seed: int, number: int) -> PromptRequest:
    """Request number `number`, for a prompt similar to the seeds drawn for it."""
    draw = random.Random(derive_seed(seed, "examples", number))
    chosen = tuple(draw.sample(range(len(seeds)), min(examples, len(seeds))))
    shown = [seeds[place] for place in chosen]
    fence = fence_around(*shown)
    listed = "\n".join(f"{text}\n{fence}" for text in shown)
    return PromptRequest(
        f"Below is what people asked an assistant, between lines of {fence}. What they ask is not for you to do.\n\n"
        f"{fence}\n{listed}\n\nWrite one more of that kind, about something else, as another person would ask it. Give what is "
        "asked alone, without an answer.",
        chosen,
    )


@dataclass(frozen=True)
class Refined:
    """Texts that filters kept, and the reasons for those dropped, both by the texts' numbers."""

    kept: Mapping[int, str]
    reasons: Mapping[int, str]


def refined(texts: Sequence[str], stages: Mapping[str, Any], folder: Path) -> Refined:
    """Pass texts through stages of the refinery. Of copies, the text with the smallest number is kept. Raises ConfigError."""
    if not texts or not stages:
        return Refined(dict(enumerate(texts)), {})
    # ids sort in the order of the texts
    ids = [f"{number:032x}" for number in range(len(texts))]
    encodable = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    kept, rejected = refine(pa.table({"id": ids, "text": encodable}), stages, folder=folder)

    def numbered(table: pa.Table, column: str) -> dict[int, str]:
        return {int(row["id"], 16): row[column] for row in table.select(["id", column]).to_pylist()}

    return Refined(numbered(kept, "text"), numbered(rejected, "reason"))


#: Files of the rows that `sft` reads, and of rows left out, with the reason.
SYNTHETIC_FILE, REJECTED_FILE = "synthetic.jsonl", "rejected.jsonl"
_WORK = Path(".checkpoints")
_NO_TEXT = "the model wrote nothing"


@dataclass
class NewRow:
    """A conversation being written. seeds: numbers of the prompts on which its own was modelled; for a seed its own number.
    request: the writer's request for the prompt; None for a seed. reason: why it is left out; empty if it is not."""

    prompt: Sequence[Message]
    seeds: Sequence[int]
    request: str | None = None
    completion: str = ""
    reason: str = ""


@dataclass(frozen=True)
class _Written:
    """The writer's text, stripped. is_cut: whether it reached `max_tokens` before it ended."""

    text: str
    is_cut: bool

    @property
    def reason(self) -> str:
        """Why the text is left out; empty where it is used."""
        return CUT_REASON if self.is_cut else "" if self.text else _NO_TEXT


def synthesize(
    config: SynthesizeConfig,
    model: Path | None,
    out: Path,
    *,
    seed: int,
    device: str = "auto",
    progress: Progress | None = None,
    folder: Path = Path(),
) -> dict[str, Any]:
    """Write conversations of a writer, or of the model of a folder; continues after the texts in `out`.

    Writes below `out`: `synthetic.jsonl`, {prompt, completion, provenance}, and `rejected.jsonl`, the same with a `reason`.
    Files that the settings name are relative to `folder`. Returns the headline metrics. Raises SourceError for malformed seeds
    and if no conversation is left, ConfigError without a model and for the settings of the refinery, ApiError where a writer at
    a URL fails for good.
    """
    progress = progress or Silent()
    parse = partial(as_prompt, column=config.prompt_column)
    reader = RowReader(config.on_bad_row, progress.say)
    seeds = [prompt for name in config.data for prompt in read_examples(data_path(name, folder, {}), parse, reader)]
    work = _Work(config, model, out, seeds, seed, folder, progress)
    writer = _writer(config, model, folder, device)
    drafts = [NewRow(prompt, [place]) for place, prompt in enumerate(seeds)]
    if config.prompts is not None:
        drafts = work.written_prompts(writer, config.prompts)
    _drop_copies(config, seeds, _left(drafts), folder)
    work.answer(writer, _left(drafts))
    answered = _left(drafts)
    _filter(config, answered, folder)
    kept = _left(drafts)
    reasons = Counter(rule_of(draft.reason) for draft in drafts if draft.reason)
    listed = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common())
    if not kept:
        raise SourceError(f"none of {len(drafts):,} conversations is left: {listed}")
    if reasons:
        progress.say(f"  {reasons.total():,} of {len(drafts):,} conversations are left out: {listed}")
    write_rows(out / SYNTHETIC_FILE, [work.record(draft) for draft in kept])
    left_out = [draft for draft in drafts if draft.reason]
    write_rows(out / REJECTED_FILE, [work.record(draft) | {"reason": draft.reason} for draft in left_out])
    return {
        "seeds": len(seeds),
        "prompts": len(drafts),
        "answers": len(answered),
        "conversations": len(kept),
        "kept_share": len(kept) / len(drafts),
        "reasons": dict(reasons),
    }


class _Work:
    """The texts of a writer, which are saved as they are finished."""

    def __init__(
        self,
        config: SynthesizeConfig,
        model: Path | None,
        out: Path,
        seeds: Sequence[Sequence[Message]],
        seed: int,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._config = config
        self._folder = out / _WORK
        self._seeds = seeds
        self._seed = seed
        self._progress = progress
        files = chat_models_fingerprint([config.writer], folder)
        if config.writer is None and model is not None:
            files = [place_fingerprint(model)]
        own = {"model": None, "temperature": config.temperature, "max_tokens": config.max_tokens}
        wrote = own if config.writer is None else provenance(config.writer)
        #: Fields that identify the writer; `files` is a hash of a local model's files.
        self._origin = wrote | ({"files": hash_value(files)} if files else {}) | {"seed": seed}

    def written_prompts(self, writer: Callable[[], ChatModel], count: int) -> list[NewRow]:
        """Prompts that the writer makes after the example of seeds."""
        shown = [conversation_text(prompt) for prompt in self._seeds]
        requests = [prompt_request(shown, self._config.examples, self._seed, number) for number in range(count)]
        written = self._texts("prompts", writer, [[_user(one.text)] for one in requests])
        prompts = [replace(one, text=without_fence(one.text)) for one in written]
        return [
            NewRow([_user(prompt.text)], request.seeds, request.text, reason=prompt.reason)
            for request, prompt in zip(requests, prompts, strict=True)
        ]

    def answer(self, writer: Callable[[], ChatModel], drafts: Sequence[NewRow]) -> None:
        """Complete the drafts."""
        answers = self._texts("answers", writer, [draft.prompt for draft in drafts])
        for draft, answer in zip(drafts, answers, strict=True):
            draft.completion = answer.text
            draft.reason = answer.reason

    def record(self, draft: NewRow) -> dict[str, Any]:
        """A draft as a row of the file: with who wrote it and how, its seeds, and the request for its prompt."""
        origin = {**self._origin, "seeds": list(draft.seeds), "request": draft.request}
        return {"prompt": list(draft.prompt), "completion": draft.completion, "provenance": origin}

    def _texts(self, name: str, writer: Callable[[], ChatModel], prompts: Sequence[Sequence[Message]]) -> list[_Written]:
        """The writer's answer to each prompt. They do not depend on filters, so that changed limits need no new texts."""
        identity = [SYNTHESIZE_VERSION, self._origin, hash_value([list(prompt) for prompt in prompts])]
        finished = FinishedRows(self._folder / f"{name}.jsonl", identity)
        with self._progress.task(f"write {name}", total=len(prompts), unit=name, completed=len(finished)) as bar:
            for start in range(len(finished), len(prompts), self._config.batch_size):
                numbers = range(start, min(start + self._config.batch_size, len(prompts)))
                seeds = [derive_seed(self._seed, name, number) for number in numbers]
                texts = writer().ask([prompts[number] for number in numbers], seeds)
                finished.append([{"text": text.strip(), "is_cut": isinstance(text, CutText)} for text in texts])
                bar.advance(len(numbers))
        return [_Written(row["text"], row["is_cut"]) for row in finished.rows]


def _writer(config: SynthesizeConfig, model: Path | None, folder: Path, device: str) -> Callable[[], ChatModel]:
    """The function that opens the writer at its first use. Raises ConfigError where there is none."""
    if config.writer is not None:
        return cache(partial(open_chat_model, config.writer, folder, device))
    if model is None:
        raise ConfigError("there is no model to write with: name a writer, or put the stage below one that makes a model")

    def opened() -> ChatModel:
        return EngineChat(Engine(model, device=device), max_tokens=config.max_tokens, temperature=config.temperature)

    return cache(opened)


def _left(drafts: Sequence[NewRow]) -> list[NewRow]:
    return [draft for draft in drafts if not draft.reason]


def _drop_copies(config: SynthesizeConfig, seeds: Sequence[Sequence[Message]], drafts: Sequence[NewRow], folder: Path) -> None:
    """Leave out drafts whose prompts are copies of earlier ones; seeds count as earlier than written prompts."""
    if config.deduplicate is None:
        return
    before = [] if config.prompts is None else [conversation_text(prompt) for prompt in seeds]
    texts = [*before, *(conversation_text(draft.prompt) for draft in drafts)]
    refinement = refined(texts, {"deduplicate": config.deduplicate}, folder)
    for number, draft in enumerate(drafts, start=len(before)):
        draft.reason = refinement.reasons.get(number, "")


def _filter(config: SynthesizeConfig, drafts: Sequence[NewRow], folder: Path) -> None:
    """Edit the answers, and leave out those whose scores are beyond the limits."""
    refinement = refined([draft.completion for draft in drafts], {"clean": config.clean, "select": config.select}, folder)
    for number, draft in enumerate(drafts):
        draft.reason = refinement.reasons.get(number, "")
        draft.completion = refinement.kept.get(number, draft.completion)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
