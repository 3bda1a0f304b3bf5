"""Preview of what a run would learn from rows: their tokens, which of them are targets, and where turns end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from bessemer.assistant.tool_formats import format_name_of
from bessemer.core.errors import RequestError
from bessemer.posttraining.data.encoding import Encoded, RowCounts, RowFitter
from bessemer.posttraining.data.examples import Conversation
from bessemer.posttraining.data.packing import encode_conversation
from bessemer.posttraining.data.turns import NothingLearntError, RowError
from bessemer.tokenization.chat_templates import template_name
from bessemer.tokenization.tokenizer import Tokenizer


class MaskedToken(NamedTuple):
    """A token. is_end: it ends a turn and is learnt."""

    text: str
    is_learnt: bool
    is_end: bool


@dataclass(frozen=True)
class MaskedRow:
    """A row as the examples that it gives. place: its file and line. reason: why it gives none; else empty."""

    place: str
    examples: tuple[tuple[MaskedToken, ...], ...]
    reason: str = ""


@dataclass(frozen=True)
class MaskPreview:
    """The masks of some rows, and totals of all rows. template: a sentence on how the model's chat template is used in
    training. counts, conversations, examples, tokens, learnt, ends: of all rows.
    """

    template: str
    rows: tuple[MaskedRow, ...]
    counts: RowCounts
    conversations: int
    examples: int
    tokens: int
    learnt: int
    ends: int

    @property
    def sentences(self) -> list[str]:
        """The figures in words."""
        return [
            self.template,
            f"{self.conversations:,} rows give {self.examples:,} examples of {self.tokens:,} tokens, of which {self.learnt:,} "
            f"are learnt, {self.ends:,} of them end tokens",
            *(sentence.strip() for sentence in self.counts.sentences(f"{self.conversations:,} rows")),
        ]

    @property
    def figures(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "template": self.template,
            "rows": self.conversations,
            "examples": self.examples,
            "tokens": self.tokens,
            "learnt": self.learnt,
            "end_tokens": self.ends,
            **self.counts.figures,
            "left_out": [{"place": one.place, "reason": one.reason} for one in self.counts.unrendered],
            "shown": [
                {
                    "place": row.place,
                    "reason": row.reason,
                    "examples": [[token._asdict() for token in example] for example in row.examples],
                }
                for row in self.rows
            ],
        }


def preview_masks(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, shown: Sequence[int], longest: int
) -> MaskPreview:
    """The masks of the conversations whose numbers are `shown`, counted from 0. longest: tokens of a row.

    Raises SourceError as a run does: where nothing is learnt, or the template cannot write many of them.
    """
    fitter = RowFitter(longest)
    rows: list[MaskedRow] = []
    examples = tokens = learnt = ends = 0
    for number, conversation in enumerate(conversations):
        encoded: list[Encoded] = []
        failure: RequestError | None = None
        try:
            encoded = encode_conversation(conversation, tokenizer)
        except (RowError, NothingLearntError) as error:
            failure = error
        fitted = fitter.fit_turns(partial(_given, encoded, failure), conversation.place)
        examples += len(fitted)
        for one in encoded:
            tokens += len(one.ids)
            learnt += int(one.is_learnt.sum())
            ends += sum(map(tokenizer.is_end, one.ids[one.is_learnt].tolist()))
        if number in shown:
            masked = tuple(masked_tokens(one, tokenizer) for one in encoded)
            rows.append(MaskedRow(conversation.place, masked, "" if failure is None else str(failure)))
    counts = fitter.counts("rows")
    return MaskPreview(template_sentence(tokenizer), tuple(rows), counts, len(conversations), examples, tokens, learnt, ends)


def _given(encoded: list[Encoded], failure: RequestError | None) -> list[Encoded]:
    if failure is not None:
        raise failure
    return encoded


def template_sentence(tokenizer: Tokenizer) -> str:
    """A sentence on how a model's chat template is used in training."""
    if tokenizer.chat_template is None:
        return "the model has no chat template"
    name = template_name(tokenizer.chat_template)
    what = f"template {name or tokenizer.template_hash}, calls of tools as {format_name_of(tokenizer)}"
    marks = (
        "{% generation %} says what is learnt" if tokenizer.marks_generation else "each turn behind what is served before it"
    )
    return f"{what}: {marks}"


def masked_tokens(encoded: Encoded, tokenizer: Tokenizer) -> tuple[MaskedToken, ...]:
    """The tokens of an example. A character that spans several tokens is shown at the last of them."""
    found: list[MaskedToken] = []
    waiting = b""
    for place, (id, is_learnt) in enumerate(zip(encoded.ids.tolist(), encoded.is_learnt.tolist(), strict=True)):
        waiting += tokenizer.decode_bytes([id], skip_special=False, beginning=not place)
        try:
            text, waiting = waiting.decode(), b""
        except UnicodeDecodeError as error:
            # keep the bytes of an incomplete character for the next token, but not those of a damaged one
            is_cut = error.reason == "unexpected end of data"
            text, waiting = ("", waiting) if is_cut else (waiting.decode("utf-8", "replace"), b"")
        is_end = is_learnt and tokenizer.is_end(id) and (place + 1 == len(encoded.ids) or not encoded.is_learnt[place + 1])
        found.append(MaskedToken(text, is_learnt, is_end))
    return tuple(found)


def text_parts(encoded: Encoded, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """An example's text in parts, each with whether it is learnt."""
    parts: list[tuple[list[int], bool]] = []
    for id, is_learnt in zip(encoded.ids.tolist(), encoded.is_learnt.tolist(), strict=True):
        if not parts or parts[-1][1] != is_learnt:
            parts.append(([], is_learnt))
        parts[-1][0].append(id)
    return [
        (tokenizer.decode_bytes(ids, skip_special=False, beginning=not place).decode("utf-8", "replace"), is_learnt)
        for place, (ids, is_learnt) in enumerate(parts)
    ]
