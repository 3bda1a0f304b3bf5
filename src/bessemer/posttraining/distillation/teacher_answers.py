"""The teacher's answers to prompts: sampled before training, kept in a file, and encoded for a student of any tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.hashing import hash_value
from bessemer.core.progress import Progress
from bessemer.core.seeds import derive_seed
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.posttraining.chat_models.files import place_fingerprint
from bessemer.posttraining.conversations import Conversation
from bessemer.posttraining.distillation.config import DistillationConfig
from bessemer.posttraining.distillation.prompts import Asked
from bessemer.posttraining.encoding import Encoded, encode_answer
from bessemer.posttraining.finished_rows import FinishedRows
from bessemer.posttraining.formats import plain_turns
from bessemer.tokenization.tokenizer import Tokenizer

#: Every answer, a line a prompt.
ANSWERS = "teacher_answers.jsonl"
#: Prompts that are answered at a time, between two looks at the progress. An interrupted run goes on after the last whole lot.
_PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class TeacherAnswer:
    """is_cut: it came to the most tokens, and has not ended."""

    asked: Asked
    text: str
    is_cut: bool

    @property
    def conversation(self) -> Conversation:
        """As a row that `sft` reads."""
        return Conversation(self.asked.answered(self.text), "teacher")

    def encoded(self, tokenizer: Tokenizer) -> Encoded:
        """In the student's tokens; of an answer that was cut, the end token is no target."""
        answered = self.asked.answered(self.text)
        encoded = encode_answer(answered.prompt, answered.answer, tokenizer, answered.tools)
        if not self.is_cut:
            return encoded
        return Encoded(encoded.ids[: encoded.inputs], encoded.is_learnt[: encoded.inputs])


def sample_answers(
    config: DistillationConfig,
    teacher: Path,
    asked: Sequence[Asked],
    out: Path,
    *,
    seed: int,
    device: str,
    progress: Progress,
) -> list[TeacherAnswer]:
    """`samples_per_prompt` answers of the teacher to each prompt, those without a word left out; goes on with what an earlier
    start has left in `out`.

    Prompts are written with the teacher's own tokenizer and chat template. Raises SourceError when no answer has a word, and
    ConfigError when no prompt leaves the teacher room for an answer.
    """
    finished = FinishedRows(out / ANSWERS, _identity(config, teacher, asked, seed))
    if len(finished) < len(asked):
        # a lot is sampled together, and again together
        finished.keep(len(finished) - len(finished) % _PROMPTS_AT_ONCE)
        threads = None if config.threads == "auto" else config.threads
        engine_config = EngineConfig(cpu_kernels=config.cpu_kernels, threads=threads)
        with (
            Engine(teacher, device=device, config=engine_config) as engine,
            progress.task("teacher's answers", total=len(asked), unit="prompts", completed=len(finished)) as bar,
        ):
            for start in range(len(finished), len(asked), _PROMPTS_AT_ONCE):
                lot = asked[start : start + _PROMPTS_AT_ONCE]
                seeds = [derive_seed(seed, "teacher", start + place) for place in range(len(lot))]
                finished.append(list(_answers_of(engine, lot, config, seeds)))
                bar.advance(len(lot))
    rows = finished.rows
    too_long = sum(not row["answers"] for row in rows)
    if too_long == len(rows):
        raise ConfigError(
            f"none of the {len(asked):,} prompts leaves the teacher room for {config.max_tokens:,} tokens; lower max_tokens"
        )
    found = [
        TeacherAnswer(one, answer["text"], answer["cut"])
        for one, row in zip(asked, rows, strict=True)
        for answer in row["answers"]
    ]
    kept = [answer for answer in found if answer.text.strip()]
    if too_long or len(kept) < len(found):
        progress.say(
            f"  {too_long:,} of {len(asked):,} prompts are too long for the teacher, and {len(found) - len(kept):,} of its "
            f"{len(found):,} answers are empty; they are left out"
        )
    if not kept:
        raise SourceError(f"{teacher}: the teacher answers none of the {len(asked):,} prompts with a word")
    return kept


def _identity(config: DistillationConfig, teacher: Path, asked: Sequence[Asked], seed: int) -> dict[str, Any]:
    """What the teacher's answers depend on."""
    return {
        "teacher": place_fingerprint(teacher),
        "asked": hash_value([[plain_turns(one.prompt), list(one.tools)] for one in asked]),
        "settings": [config.sampling_temperature, config.max_tokens, config.samples_per_prompt],
        "seed": seed,
    }


def _answers_of(
    engine: Engine, lot: Sequence[Asked], config: DistillationConfig, seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """A record of each prompt, in order; without answers where it is too long."""
    encoded = [one.encoded(engine.tokenizer) for one in lot]
    fitting = [place for place, ids in enumerate(encoded) if len(ids) + config.max_tokens <= engine.longest]
    params = [
        SamplingParams(
            temperature=config.sampling_temperature,
            max_tokens=config.max_tokens,
            seed=seeds[place],
            n=config.samples_per_prompt,
        )
        for place in fitting
    ]
    completions = dict(zip(fitting, engine.generate([encoded[place] for place in fitting], params), strict=True))
    for place, one in enumerate(lot):
        given = [completions[place], *completions[place].others] if place in completions else []
        yield {
            "prompt": plain_turns(one.prompt),
            "answers": [{"text": each.text, "cut": each.finish_reason == "length"} for each in given],
        }
