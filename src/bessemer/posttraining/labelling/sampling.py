"""Answers to be ranked, sampled from a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bessemer.core.progress import Progress
from bessemer.core.seeds import derive_seed
from bessemer.inference.engine import Engine, SamplingParams
from bessemer.posttraining.dataset import prompt_key, read_examples
from bessemer.posttraining.encoding import encode_prompt
from bessemer.posttraining.formats import Message
from bessemer.posttraining.labelling.rankings import ANSWERS, Answers, Labels
from bessemer.tokenization.chat import checked_messages

#: Prompts of one call of the engine, and what an interruption loses at most.
_PROMPTS_AT_ONCE = 8
#: Calls for a prompt whose answers are too much alike, after which it is given up.
_TRIES = 3


def read_prompts(path: Path, count: int) -> list[tuple[Message, ...]]:
    """The first prompts of a file: under `prompt` messages or a text, or the turns of `messages` before the last answer.

    Raises SourceError with the line of the first that is malformed.
    """
    return read_examples(path, _prompt)[:count]


def _prompt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    given = row.get("prompt", row.get("messages"))
    if isinstance(given, str) and given.strip():
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ValueError(f"needs messages or a text under 'prompt'; it has {', '.join(map(repr, row)) or 'nothing'}"[:200])
    messages = checked_messages(given, first=1)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError("nothing is asked before the assistant's turn")
    return tuple(messages)


def sample_answers(
    engine: Engine,
    prompts: Sequence[Sequence[Message]],
    out: Path,
    *,
    count: int,
    params: SamplingParams,
    seed: int,
    progress: Progress,
) -> Labels:
    """`count` different answers to each prompt, kept in `out`; those that are there already are not sampled again.

    An answer that was cut at the most tokens is none. A prompt that the model answers in fewer ways has as many answers as were
    found; with a single one there is nothing to rank, and it is left out. Raises RequestError for a prompt that is too long.
    """
    out.mkdir(parents=True, exist_ok=True)
    labels = Labels(out)
    by_id = {prompt_key(tuple(messages)): messages for messages in prompts}
    left = [(id, messages) for id, messages in by_id.items() if id not in labels.answers]
    left_out = 0
    with (
        (out / ANSWERS).open("a", encoding="utf-8") as stream,
        progress.task("answers", total=len(left), unit="prompts") as bar,
    ):
        for start in range(0, len(left), _PROMPTS_AT_ONCE):
            some = left[start : start + _PROMPTS_AT_ONCE]
            for (id, messages), texts in zip(some, _different(engine, some, count, params, seed), strict=True):
                if len(texts) > 1:
                    stream.write(json.dumps(asdict(Answers(id, list(messages), texts)), ensure_ascii=False) + "\n")
                left_out += len(texts) < 2
            stream.flush()
            bar.advance(len(some))
    if left_out:
        progress.say(
            f"  {left_out:,} prompts are left out: fewer than two of the model's answers differ and end within max_tokens; "
            "raise --temperature or --max-tokens"
        )
    return Labels(out)


def _different(
    engine: Engine, asked: Sequence[tuple[str, Sequence[Message]]], count: int, params: SamplingParams, seed: int
) -> list[list[str]]:
    """Up to `count` different answers to each of some prompts, all of which ended."""
    found: list[dict[str, None]] = [{} for _ in asked]
    for trial in range(_TRIES):
        short = [place for place, texts in enumerate(found) if len(texts) < count]
        if not short:
            break
        calls = [
            params.with_changes(seed=derive_seed(seed, "label", asked[place][0], trial, number) % 2**31)
            for place in short
            for number in range(count)
        ]
        prompts = [encode_prompt(tuple(asked[place][1]), engine.tokenizer) for place in short for _ in range(count)]
        for number, completion in enumerate(engine.generate(prompts, calls)):
            texts, text = found[short[number // count]], completion.text.strip()
            if completion.finish_reason != "length" and text and len(texts) < count:
                texts[text] = None
    return [list(texts) for texts in found]
