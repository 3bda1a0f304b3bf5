"""The data set `made/mismatched`: pairs of an answer and one that belongs to another question, made from a run's conversations.

Every second wrong answer looks like the right one: it answers a question that begins with the same words, so that only what is
asked tells them apart. The others answer a question of another kind, which a model learns to tell sooner.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bessemer.core.seeds import derive_seed
from bessemer.posttraining.config import TASK
from bessemer.posttraining.conversations import Conversation
from bessemer.posttraining.dataset import read_examples
from bessemer.posttraining.formats import Pair, as_answered

#: Words of a question that say what kind it is.
_WORDS_OF_KIND = 2


def mismatched_pairs(conversations: Path, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs of the conversations that `sft` trained on and held out: one of each question and answer that
    another answer is found for, in turn of the same kind and of another one where there are several.

    Items of tasks are left out: a verifier judges these. Raises SourceError or ArtefactError for a file that is missing or
    malformed.
    """
    training, held_out = (conversations / f"{name}.jsonl" for name in ("train", "validation"))
    return _pairs(training, seed), _pairs(held_out, seed) if held_out.stat().st_size else []


def _pairs(path: Path, seed: int) -> list[Pair]:
    by_kind: dict[tuple[str, ...], list[Conversation]] = defaultdict(list)
    for conversation in read_examples(path, _conversation):
        messages = conversation.messages
        if len(messages) == 2 and not conversation.source.startswith(TASK):
            by_kind[tuple(str(messages[0]["content"]).split()[:_WORDS_OF_KIND])].append(conversation)
    pairs = []
    for kind, alike in by_kind.items():
        generator = random.Random(derive_seed(seed, "mismatched"))
        generator.shuffle(alike)
        unlike = [one for other, of_other in by_kind.items() if other != kind for one in of_other]
        for number, (conversation, next_one) in enumerate(zip(alike, [*alike[1:], alike[0]], strict=True)):
            other = generator.choice(unlike) if unlike and number % 2 else next_one
            prompt, chosen, rejected = conversation.messages[:1], conversation.messages[1:], other.messages[1:]
            # one question may have several right answers
            if chosen != rejected and other.messages[:1] != prompt:
                pairs.append(Pair(prompt, chosen, rejected))
    return pairs


def _conversation(row: Mapping[str, Any]) -> Conversation:
    return Conversation(as_answered(row), str(row.get("source", "")))
