"""Tools that a question needs: BM25 over names and descriptions, within a budget of tokens.

BM25 (Robertson and Zaragoza 2009, section 3.2) with the usual k₁ and b; the inverse document frequency is Lucene's, which is
never negative. A tool's document is its name, cut into words, its description and its parameters' names and descriptions.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from bessemer.assistant.tools import Tool

_K1, _B = 1.2, 0.75
#: Characters of a token of JSON, where no tokenizer counts.
_CHARACTERS_PER_TOKEN = 3.5
#: `getCurrent` and `HTTPServer` are two words each.
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+")


def tokens_of(tool: Tool) -> int:
    """The tokens of a tool's description in a prompt, estimated from its characters."""
    return math.ceil(len(json.dumps(tool.description_in_chat, ensure_ascii=False)) / _CHARACTERS_PER_TOKEN)


def choose_tools(
    tools: Sequence[Tool],
    question: str,
    budget: int,
    *,
    kept: Collection[str] = (),
    count: Callable[[Tool], int] = tokens_of,
) -> list[Tool]:
    """The tools to offer for a question, in their own order.

    budget: tokens of their descriptions together, as `count` gives them. All of them where they fit. Else those of `kept`,
    which were offered before, then by their BM25 score for the question, as many as fit; tools without a word of the question
    come last.
    """
    costs = [count(tool) for tool in tools]
    if sum(costs) <= budget:
        return list(tools)
    scores = bm25_scores([_document(tool) for tool in tools], question)
    order = sorted(range(len(tools)), key=lambda place: (tools[place].name not in kept, -scores[place], place))
    chosen, left = set(), budget
    for place in order:
        if costs[place] <= left:
            chosen.add(place)
            left -= costs[place]
    return [tool for place, tool in enumerate(tools) if place in chosen]


def bm25_scores(documents: Sequence[str], query: str) -> list[float]:
    """The BM25 score of each document for a query."""
    counts = [Counter(_words(document)) for document in documents]
    lengths = [sum(count.values()) for count in counts]
    mean_length = max(sum(lengths) / max(len(lengths), 1), 1e-9)
    scores = [0.0] * len(documents)
    for word in set(_words(query)):
        holding = sum(word in count for count in counts)
        idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
        for place, count in enumerate(counts):
            if frequency := count[word]:
                norm = _K1 * (1 - _B + _B * lengths[place] / mean_length)
                scores[place] += idf * frequency * (_K1 + 1) / (frequency + norm)
    return scores


def _document(tool: Tool) -> str:
    return " ".join([tool.name, tool.description, *_texts(tool.parameters)])


def _texts(schema: Any) -> Iterator[str]:
    """Names and descriptions of a schema's parameters."""
    if not isinstance(schema, Mapping):
        return
    properties = schema.get("properties")
    for name, inner in properties.items() if isinstance(properties, Mapping) else ():
        yield str(name)
        if isinstance(inner, Mapping):
            yield str(inner.get("description", ""))


def _words(text: str) -> list[str]:
    """Words in lower case, a plural's `s` left out, so that `times` finds `time`."""
    words = [word.lower() for word in _WORDS.findall(text)]
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words]
