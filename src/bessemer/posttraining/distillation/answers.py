"""Answers to prompts: the teacher's, and the student's own.

Prompts are rows of prompts, and what stands before the last answer of a conversation. The teacher's answers are sampled
before training, kept in a file, and encoded for a student of any tokenizer. The student's are sampled during training, and
the teacher's log-probabilities of them are the signal.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.hashing import derive_seed, hash_value
from bessemer.core.progress import Progress
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.posttraining.chat_models import place_fingerprint
from bessemer.posttraining.data.encoding import Encoded, encode_answer
from bessemer.posttraining.data.examples import Conversation, RowReader, read_examples
from bessemer.posttraining.data.formats import Answered, as_answered, as_prompt, plain_turns, tools_of
from bessemer.posttraining.data.made import FinishedRows, data_path
from bessemer.posttraining.data.splitting import opening, split_examples
from bessemer.posttraining.distillation.config import DistillationConfig
from bessemer.posttraining.distillation.objective import TEACHER_LOG_PROBS, TeacherHead, mean_reverse_kl
from bessemer.posttraining.distillation.teacher_server import TeacherServer
from bessemer.posttraining.sampling.sampler import EncodedPrompt, Sampler, SamplerSettings
from bessemer.posttraining.sampling.samples import Prompt, Share, fitting_prompts, pack_samples
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batch import Batch
from bessemer.training.data.batches import rows_of_step
from bessemer.training.model_roles import ModelRoles


def before_last_answer(answered: Answered) -> Prompt | None:
    """The prompt of an example, or all before the assistant's last turn; None where nothing precedes it."""
    if isinstance(answered.prompt, str) or isinstance(answered.answer, str) or answered.prompt:
        return Prompt(answered.prompt, tools=answered.tools)
    last = max(place for place, message in enumerate(answered.answer) if message["role"] == "assistant")
    return Prompt(answered.answer[:last], tools=answered.tools) if last else None


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """A row of a prompt alone, or of one of the formats with answers. Raises ValueError or RequestError, in one line."""
    is_bare = "prompt" in row and "completion" not in row
    prompt = _bare_prompt(row) if is_bare else before_last_answer(as_answered(row))
    if prompt is None:
        raise ValueError("begins with the assistant, so that there is no prompt to answer")
    if prompt.tools and isinstance(prompt.turns, str):
        raise ValueError("tools are shown in a conversation, and the prompt is a text; give it as messages")
    return prompt


def _bare_prompt(row: Mapping[str, Any]) -> Prompt:
    """A row of a prompt alone. As with a completion, a text without a system message is continued."""
    given = row["prompt"]
    if not given or not isinstance(given, (str, list)):
        raise ValueError(f"needs messages or a text under 'prompt'; it has {given!r}"[:200])
    messages = as_prompt(row)
    if isinstance(given, str) and len(messages) == 1:
        return Prompt(given, tools=tools_of(row))
    return Prompt(messages, tools=tools_of(row))


def gather_prompts(
    config: DistillationConfig, folder: Path, seed: int, reader: RowReader | None = None
) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held out) prompts of all data, in order. Raises SourceError for bad rows that the settings refuse."""
    reader = reader or RowReader(config.on_bad_row)
    prompts = [prompt for name in config.data for prompt in read_examples(data_path(name, folder, {}), prompt_of, reader)]
    return split_examples(prompts, lambda prompt: opening(prompt.turns), config.validation_share, seed)


def encoded_prompts(prompts: Sequence[Prompt], tokenizer: Tokenizer, config: DistillationConfig) -> list[EncodedPrompt]:
    """The prompts that leave room for an answer, with their tokens."""
    return fitting_prompts(prompts, tokenizer, config.context_length - config.max_tokens)


#: File of the teacher's answers, one line per prompt.
ANSWERS = "teacher_answers.jsonl"
#: Prompts of a batch. An interrupted run continues after the last whole batch.
_PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class TeacherAnswer:
    """is_cut: it came to the most tokens, and has not ended."""

    prompt: Prompt
    text: str
    is_cut: bool

    @property
    def conversation(self) -> Conversation:
        """The answer as a row that `sft` reads."""
        return Conversation(self.prompt.answered(self.text), "teacher")

    def encoded(self, tokenizer: Tokenizer) -> Encoded:
        """The answer in the student's tokens; the end token of a cut answer is no target."""
        answered = self.prompt.answered(self.text)
        encoded = encode_answer(answered.prompt, answered.answer, tokenizer, answered.tools)
        if not self.is_cut:
            return encoded
        return Encoded(encoded.ids[: encoded.inputs], encoded.is_learnt[: encoded.inputs])


def sample_answers(
    config: DistillationConfig,
    teacher: Path,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    seed: int,
    device: str,
    progress: Progress,
) -> list[TeacherAnswer]:
    """`samples_per_prompt` answers of the teacher to each prompt, without empty ones; continues with what an earlier
    start has left in `out`.

    Prompts are written with the teacher's own tokenizer and chat template. Raises SourceError when no answer has a word, and
    ConfigError when no prompt leaves the teacher room for an answer.
    """
    finished = FinishedRows(out / ANSWERS, _identity(config, teacher, prompts, seed))
    if len(finished) < len(prompts):
        # prompts that were sampled together are sampled together again
        finished.keep(len(finished) - len(finished) % _PROMPTS_AT_ONCE)
        threads = None if config.threads == "auto" else config.threads
        engine_config = EngineConfig(cpu_kernels=config.cpu_kernels, threads=threads)
        with (
            Engine(teacher, device=device, config=engine_config) as engine,
            progress.task("teacher's answers", total=len(prompts), unit="prompts", completed=len(finished)) as bar,
        ):
            for start in range(len(finished), len(prompts), _PROMPTS_AT_ONCE):
                lot = prompts[start : start + _PROMPTS_AT_ONCE]
                seeds = [derive_seed(seed, "teacher", start + place) for place in range(len(lot))]
                finished.append(list(_answers_of(engine, lot, config, seeds)))
                bar.advance(len(lot))
    rows = finished.rows
    too_long = sum(not row["answers"] for row in rows)
    if too_long == len(rows):
        raise ConfigError(
            f"none of the {len(prompts):,} prompts leaves the teacher room for {config.max_tokens:,} tokens; lower max_tokens"
        )
    answers = [
        TeacherAnswer(prompt, answer["text"], answer["cut"])
        for prompt, row in zip(prompts, rows, strict=True)
        for answer in row["answers"]
    ]
    kept = [answer for answer in answers if answer.text.strip()]
    if too_long or len(kept) < len(answers):
        progress.say(
            f"  {too_long:,} of {len(prompts):,} prompts are too long for the teacher, and {len(answers) - len(kept):,} of its "
            f"{len(answers):,} answers are empty; they are left out"
        )
    if not kept:
        raise SourceError(f"{teacher}: the teacher answers none of the {len(prompts):,} prompts with a word")
    return kept


def _identity(config: DistillationConfig, teacher: Path, prompts: Sequence[Prompt], seed: int) -> dict[str, Any]:
    """Everything that the teacher's answers depend on."""
    return {
        "teacher": place_fingerprint(teacher),
        "asked": hash_value([[plain_turns(prompt.turns), list(prompt.tools)] for prompt in prompts]),
        "settings": [config.sampling_temperature, config.max_tokens, config.samples_per_prompt],
        "seed": seed,
    }


def _answers_of(
    engine: Engine, lot: Sequence[Prompt], config: DistillationConfig, seeds: Sequence[int]
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
    for place, prompt in enumerate(lot):
        given = [completions[place], *completions[place].others] if place in completions else []
        yield {
            "prompt": plain_turns(prompt.turns),
            "answers": [{"text": each.text, "cut": each.finish_reason == "length"} for each in given],
        }


class StudentBatches:
    """Batches of answers that the student samples with the weights of the step: a function of these and of the step's
    number. Of several processes each samples its share of the prompts, and all get all answers; where a server is the teacher,
    each lets it score its share of the answers."""

    lookahead = 0

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        tokenizer: Tokenizer,
        config: DistillationConfig,
        seed: int,
        teacher: TeacherServer | None = None,
    ) -> None:
        """teacher: that scores the answers; None: the objective does, by the run's own."""
        self._teacher = teacher
        self.batch_size = config.batch_size
        self._prompts = prompts
        self._config = config
        self._seed = seed
        self._padding_id = tokenizer.bos_id
        self._sampler = Sampler(tokenizer, sampler_settings(config, config.batch_size), seed)
        self._latest: tuple[int, Batch] | None = None
        self._tokens = 0
        self._metrics: dict[str, float] = {}
        self.fingerprint = hash_value([[ids for _, ids in prompts], seed])

    def bind(self, models: ModelRoles) -> None:
        self._sampler.bind(models)

    def batch_size_at(self, step: int) -> int:
        """Rows of the batch of `step`: its answers packed."""
        return self._batch_of(step).tokens_BT.shape[0]

    def batch(self, step: int, rows: slice, mesh: Mesh = ALONE) -> Batch:
        batch = self._batch_of(step)
        documents_BT = batch.document_ids_BT
        self._tokens += batch.tokens_BT.numel() if documents_BT is None else int((documents_BT > 0).sum())
        return batch.rows(rows)

    def state_dict(self) -> dict[str, Any]:
        """The number of tokens so far; batches need no state."""
        return {"tokens": self._tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._tokens = state["tokens"]

    def take_metrics(self) -> dict[str, float]:
        """Figures of the batch that was sampled last, and the tokens of all so far."""
        metrics, self._metrics = self._metrics, {}
        return metrics | {"tokens": self._tokens}

    def _batch_of(self, step: int) -> Batch:
        if self._latest is None or self._latest[0] != step:
            self._latest = step, self._sampled(step)
        return self._latest[1]

    def _sampled(self, step: int) -> Batch:
        start = time.perf_counter()
        places: np.ndarray = rows_of_step(step, self._config.groups, len(self._prompts), self._seed)
        prompts = [self._prompts[place] for place in places.tolist()]
        with self._sampler.sampling() as engine:
            samples = self._sampler.all_completions(engine, prompts, self._config.samples_per_prompt, seeds=("step", step))
        self._metrics = {
            "completion_tokens": statistics.fmean(len(sample.completion_ids) for sample in samples),
            "cut_share": statistics.fmean(sample.is_cut for sample in samples),
            "rollout_seconds": round(time.perf_counter() - start, 3),
        }
        mesh = self._sampler.models.mesh
        packed = pack_samples(samples, [True] * len(samples), self._padding_id, mesh.layout)
        if self._teacher is None:
            return packed.batch
        start, share, teacher = time.perf_counter(), Share(mesh), self._teacher
        scores = share.gathered(lambda: teacher.log_probs([sample.ids for sample in samples[share.places]]))
        self._metrics["teacher_seconds"] = round(time.perf_counter() - start, 3)
        values = [
            {TEACHER_LOG_PROBS: torch.tensor(of_ids)[sample.places]} for sample, of_ids in zip(samples, scores, strict=True)
        ]
        return packed.with_target_values(samples, values).batch


class HeldOutDivergence:
    """KL(student ‖ teacher) on the student's own answers to held-out prompts, which each call samples anew from the same
    random numbers."""

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        tokenizer: Tokenizer,
        config: DistillationConfig,
        teacher: TeacherHead,
        seed: int,
    ) -> None:
        self._prompts = prompts
        self._teacher = teacher
        self._temperature = config.sampling_temperature
        self._padding_id = tokenizer.bos_id
        self._sampler = Sampler(tokenizer, sampler_settings(config, len(prompts)), seed)

    def measure(self, models: ModelRoles) -> float:
        """The mean over the answers' tokens, in nats, on every process. Weights and random state stay as they are."""
        self._sampler.bind(models)
        with self._sampler.sampling() as engine:
            samples = self._sampler.all_completions(engine, self._prompts, 1)
        batch = pack_samples(samples, [True] * len(samples), self._padding_id, models.mesh.layout).batch
        return mean_reverse_kl(models, batch, self._teacher, self._temperature)


def sampler_settings(config: DistillationConfig, sequences: int) -> SamplerSettings:
    """Sampler settings of the student. sequences: most answers at once."""
    return SamplerSettings(
        config.sampling_temperature,
        config.max_tokens,
        config.context_length,
        sequences,
        cpu_kernels=config.cpu_kernels,
    )
