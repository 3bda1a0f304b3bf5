"""A conversation that is longer than the context, with summaries by the model in place of text (`context_overflow: summarise`).

Earlier turns become one summary, which stands above the first message that stays: the last ones stay as far as they fit beside
it. Below the summary stand, word for word, the sentences of these turns that share most with the question by BM25, since a
summary leaves out what was said in passing. Where the last question itself holds texts that are too long, each becomes a
summary in its place; what asks, its first and last paragraphs or the one of them with a question mark, stays.

A text that does not fit is summarised in pieces, and the summaries together, until they are short enough (Wu et al. 2021). What
the model writes is data, as what it read was: a summary of anything tainted is a part of origin `memory`, `document` or `tool`,
and control tokens in it are plain text.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from bessemer.assistant.messages import Message, MessagePart
from bessemer.retrieval.chunks import cut_document, sentences
from bessemer.retrieval.long_documents import LONG_TEXT, Place, TextPassage, asking_passages, passages_of_text, with_texts
from bessemer.retrieval.word_index import bm25_scores

#: Most tokens of a summary, its largest share of the budget, and the fewest with which one says something.
_MOST, _SHARE, _FEWEST = 512, 6, 24
#: Tokens that an instruction's pieces are counted too few by: blanks between them.
_SLACK = 16
#: Most bytes of a character, and so tokens.
_WIDEST = 4
_KEEP = "Keep names, numbers and what was decided. Write the summary alone, in at most {words} words.\n\n"
OF_TURNS = f"Summarise this earlier part of a conversation. {_KEEP}"
OF_TEXT = f"Summarise this text. {_KEEP}"
#: What stands above a summary.
ABOVE_TURNS, ABOVE_TEXT = "Earlier in this conversation, summarised:\n", "(A summary of a text that is too long:)\n"
_NOW = "\n\nNow: "
#: What stands between a summary of turns and sentences of them, and most of these.
ABOVE_QUOTES, _QUOTES = "\n\nSaid then, word for word:\n", 12
#: Source of the part that stands for earlier turns.
_OF_TURNS = "earlier turns"
_NAMES = {"user": "User", "assistant": "Assistant", "tool": "Tool"}


class SummaryRequest(NamedTuple):
    """What the model is to summarise: a message with the instruction, and most tokens of the summary."""

    message: Message
    most_tokens: int


@dataclass(frozen=True)
class Measure:
    """How long things are. of_messages: tokens of the conversation as the model reads it, with its tools and a source, up to
    where it answers; of_request: of a message alone; of_text: of a text. budget: most tokens of the conversation; context: most
    of a request and its answer."""

    of_messages: Callable[[Sequence[Message]], int]
    of_request: Callable[[Message], int]
    of_text: Callable[[str], int]
    budget: int
    context: int


#: Gives requests, takes their texts, and ends in a result.
Summarising = Generator[SummaryRequest, str, list[Message]]


def summarised(messages: Sequence[Message], measure: Measure) -> Summarising:
    """The conversation with summaries in place of what does not fit; as it is where it fits, where it has pictures, whose
    places a summary would lose, and where no summary would do."""
    asked = max((number for number, message in enumerate(messages) if message.role == "user"), default=-1)
    has_pictures = any(part.is_image for message in messages for part in message.parts)
    if asked < 0 or has_pictures or measure.of_messages(messages) <= measure.budget:
        return list(messages)
    begin = next(number for number, message in enumerate(messages) if message.role != "system")
    most = min(_MOST, measure.budget // _SHARE)
    start, later = messages[:begin], messages[begin:]
    # a turn begins with a user's message, and its calls and their results stay together
    places = [number for number, message in enumerate(later) if message.role == "user" and number > 0]
    first = asked - begin
    for number in reversed(places):
        frame = _below_summary(later[number], "", ABOVE_TURNS)
        # a third of what stands for earlier turns is quoted
        if measure.of_messages([*start, frame, *later[number + 1 :]]) + most + most // 2 + _SLACK > measure.budget:
            break
        first = number
    kept = list(later[first:])
    if first > 0:
        summary = yield from _summary(_transcript(later[:first]), OF_TURNS, _part_of(later[:first]), most, measure)
        if not summary.text:
            return list(messages)
        with_summary = [*start, _below_summary(kept[0], summary.text, ABOVE_TURNS, summary), *kept[1:]]
        left = min(most // 2, measure.budget - measure.of_messages(with_summary) - _SLACK)
        text = summary.text + _quoted(later[:first], messages[asked].text, left, measure)
        kept[0] = _below_summary(kept[0], text, ABOVE_TURNS, summary)
    if measure.of_messages([*start, *kept]) > measure.budget:
        kept = yield from _with_short_texts(start, kept, measure)
    return [*start, *kept]


def _with_short_texts(start: Sequence[Message], kept: Sequence[Message], measure: Measure) -> Summarising:
    """Messages with summaries in place of their longest texts."""
    passages = {
        Place(number, place): passages_of_text(part.text)
        for number, message in enumerate(kept)
        if message.role in ("user", "tool")
        for place, part in enumerate(message.parts)
        if part.origin != "system" and part.source != _OF_TURNS and len(part.text) > LONG_TEXT
    }
    _, asking = asking_passages(kept, passages)
    ends = {place: sorted(number for own, number in asking if own == place) for place in passages}
    bodies = {
        place: _joined([one for number, one in enumerate(own) if number not in ends[place]]) for place, own in passages.items()
    }

    def with_bodies(bodies: dict[Place, str]) -> list[Message]:
        texts = {}
        for place, body in bodies.items():
            own, asks = passages[place], ends[place]
            before = [own[number].text for number in asks if number == 0]
            behind = [own[number].text for number in asks if number > 0]
            texts[place] = "\n\n".join([*before, body, *behind])
        return with_texts(kept, texts)

    left = measure.budget - measure.of_messages([*start, *with_bodies(dict.fromkeys(bodies, ABOVE_TEXT))]) - _SLACK
    lengths = sorted((measure.of_text(body), place) for place, body in bodies.items())
    short: dict[Place, str] = {}
    for number, (length, place) in enumerate(lengths):
        share = left // (len(lengths) - number)
        if length <= share:
            short[place] = bodies[place]
        else:
            most = min(_MOST, share, measure.budget // _SHARE)
            if most < _FEWEST:
                return list(kept)
            part = kept[place.message].parts[place.part]
            summary = yield from _summary([TextPassage((), bodies[place])], OF_TEXT, part, most, measure)
            if not summary.text:
                return list(kept)
            short[place] = ABOVE_TEXT + summary.text
        left -= measure.of_text(short[place])
    return with_bodies(short)


def _summary(
    passages: Sequence[TextPassage], instruction: str, part: MessagePart, most: int, measure: Measure
) -> Generator[SummaryRequest, str, MessagePart]:
    """A summary of up to that many tokens, as a part of the origin and source of `part`; without text where the context does
    not hold an instruction with enough of it."""

    def request(text: str, most: int) -> SummaryRequest:
        asked = MessagePart(instruction.format(words=max(10, most // 2)), "system")
        return SummaryRequest(Message("user", (asked, replace(part, text=text))), most)

    budget = measure.context - measure.of_request(request("", most).message) - most - _SLACK
    if most < _FEWEST or budget < 3 * most:
        return replace(part, text="")
    pieces = _pieces(passages, budget, measure)
    while True:
        texts = []
        for piece in pieces:
            written = yield request(piece, most)
            texts.append(_cut(_whole_sentences(written), most, measure) or piece[: most // _WIDEST])
        whole = "\n\n".join(texts)
        if len(pieces) == 1 or measure.of_text(whole) <= most:
            break
        # at most half as many, since each holds two of these texts
        pieces = _pieces([TextPassage((), text) for text in texts], budget, measure)
    return replace(part, text=_cut(whole, most, measure))


def _pieces(passages: Sequence[TextPassage], budget: int, measure: Measure) -> list[str]:
    """Texts of passages, each of up to that many tokens, as few as fit in their order."""
    pieces: list[str] = []
    current: list[TextPassage] = []
    used = 0
    for passage in _small(passages, budget, measure):
        tokens = measure.of_text(_joined([passage])) + 2
        if current and used + tokens > budget:
            pieces.append(_joined(current))
            current, used = [], 0
        current.append(passage)
        used += tokens
    return [*pieces, _joined(current)] if current else pieces


def _small(passages: Sequence[TextPassage], budget: int, measure: Measure) -> list[TextPassage]:
    """The passages, those of more than half of the budget's tokens cut, so that each has at most as many: the larger a passage,
    the fewer sentences are torn apart. Headings that leave nothing for the text go."""

    def fits(passage: TextPassage) -> bool:
        return 2 * measure.of_text(_joined([passage])) <= budget

    small: list[TextPassage] = []
    for passage in passages:
        if fits(passage):
            small.append(passage)
            continue
        text = passage.text.encode(errors="replace").decode()
        longest = max(1, min(LONG_TEXT, budget))
        while True:
            chunks = cut_document(text, longest=longest, overlap=0)
            cut = [TextPassage(chunk.headings or passage.headings, chunk.text) for chunk in chunks]
            cut = [one if fits(one) else one._replace(headings=()) for one in cut]
            if longest == 1 or all(map(fits, cut)):
                break
            longest //= 2
        small += cut
    return small


def _joined(passages: Sequence[TextPassage]) -> str:
    parts: list[str] = []
    headings: tuple[str, ...] = ()
    for passage in passages:
        if passage.headings and passage.headings != headings:
            parts.append(f"# {' › '.join(passage.headings)}")
        parts.append(passage.text)
        headings = passage.headings
    return "\n\n".join(parts)


def _whole_sentences(text: str) -> str:
    """A text without the sentence that it breaks off in, where that is not most of it."""
    text = text.strip()
    if text.endswith(tuple('.!?…。！？।॥؟۔"”»)')):
        return text
    *whole, last = [text[span.start : span.end] for span in sentences(text)] or [""]
    before = "".join(whole).strip()
    return before if 2 * len(before) >= len(last) else text


def _cut(text: str, most: int, measure: Measure) -> str:
    while text and measure.of_text(text) > most:
        text = text[: len(text) * 9 // 10]
    return text


def _transcript(messages: Sequence[Message]) -> list[TextPassage]:
    """What was said, message by message."""
    said = []
    for message in messages:
        calls = "".join(f" (calls {call.name} with {dict(call.arguments)})" for call in message.calls)
        if text := f"{message.text}{calls}".strip():
            said.append(TextPassage((), f"{_NAMES.get(message.role, message.role)}: {text}"))
    return said


def _quoted(messages: Sequence[Message], question: str, most: int, measure: Measure) -> str:
    """The sentences of messages that share most words with a question, in their order, below a line that says so, in up to
    `most` tokens; nothing where none shares any."""
    said = [
        f"{_NAMES.get(message.role, message.role)}: {sentence}"
        for message in messages
        for span in sentences(message.text)
        if (sentence := " ".join(message.text[span.start : span.end].split()))
    ]
    scores = bm25_scores(question, said)
    chosen: list[int] = []
    text = ""
    for number in np.argsort(-scores, kind="stable")[:_QUOTES].tolist():
        longer = ABOVE_QUOTES + "\n".join(said[one] for one in sorted([*chosen, number]))
        if scores[number] > 0 and measure.of_text(longer) <= most:
            chosen.append(number)
            text = longer
    return text


def _part_of(messages: Sequence[Message]) -> MessagePart:
    """Of what origin a summary of messages is: tainted if any of them is."""
    return MessagePart("", "memory" if any(message.is_tainted for message in messages) else "user", _OF_TURNS)


def _below_summary(message: Message, text: str, above: str, part: MessagePart | None = None) -> Message:
    """A message with a summary above it. part: of which origin and source the summary is."""
    summary = MessagePart(text, "user") if part is None else replace(part, text=text)
    return replace(message, parts=(MessagePart(above, "system"), summary, MessagePart(_NOW, "system"), *message.parts))
