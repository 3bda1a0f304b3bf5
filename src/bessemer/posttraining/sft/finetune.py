"""A fine-tuning from a model and a file to an adapter or a model, with held-out losses and answers from before and after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch

from bessemer.core.environment import peak_memory_bytes, reset_peak_memory
from bessemer.core.errors import ArtefactError, RequestError
from bessemer.core.progress import Progress
from bessemer.core.store import read_json, write_json, write_text
from bessemer.inference.engine import Engine, EngineConfig
from bessemer.inference.images import PicturePrompt
from bessemer.inference.sampling.params import SamplingParams
from bessemer.model.adapters import Adapter, adapted
from bessemer.model.adapters.fingerprints import samples_of_folder
from bessemer.model.adapters.folder import read_adapter
from bessemer.model.adapters.trained import adapter_of, adapters_of, without_adapters
from bessemer.model.decoder import Decoder
from bessemer.model.device import choose_device
from bessemer.model.formats import ModelSource
from bessemer.model.quantisation.quantised_layers import is_quantised
from bessemer.model.storage.tuned_folder import ADAPTER, BASE, HELD_OUT_TASK, MODEL, RECORD, place_of_base
from bessemer.model.vision.trained import load_trained_decoder
from bessemer.posttraining.data.encoding import encode_prompt
from bessemer.posttraining.data.examples import Conversation, data_hash
from bessemer.posttraining.data.packing import EncodedExample
from bessemer.posttraining.data.picture_encoding import PictureEncoder, picture_of
from bessemer.posttraining.data.picture_rows import has_pictures, sources_in, text_of
from bessemer.posttraining.sft.config import FULL_LEARNING_RATE, FinetuneConfig, Method, SFTConfig
from bessemer.posttraining.sft.finetune_inputs import prepare_base
from bessemer.posttraining.sft.finetune_plan import FinetunePlan, Sizes, plan_finetuning, tuning_dtype
from bessemer.posttraining.sft.forgetting import GeneralTasks, ItemResults
from bessemer.posttraining.sft.report import one_line
from bessemer.posttraining.sft.stage import sft
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.training.checkpoint.manager import CHECKPOINTS
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.data.packing import pack_rows
from bessemer.training.objectives import token_losses
from bessemer.training.runtime import Runtime, release_freed_memory
from bessemer.training.starting_model import StartingModel

#: Held-out rows as a task's data.
HELD_OUT_ROWS = "held_out.jsonl"
#: Conversations read at once.
_ROWS = 4


def conversation_losses(
    model: Decoder,
    examples: Sequence[EncodedExample],
    context_length: int,
    padding_id: int,
    progress: Progress,
    description: str,
    pictures: PictureEncoder | None = None,
) -> np.ndarray:
    """Mean −log p of each example's targets, (N,) float64, in nats a token, one example a row. pictures: what has read those of
    the examples."""
    losses: list[float] = []
    with progress.task(description, total=len(examples), unit="conversations") as task:
        for start in range(0, len(examples), _ROWS):
            chosen = examples[start : start + _ROWS]
            longest = max(len(example.tokens) for example in chosen)
            batch = pack_rows([[(one.tokens, one.targets)] for one in chosen], min(longest, context_length), padding_id)
            losses += _means(model, batch if pictures is None else pictures.placed(batch))
            task.advance(len(chosen))
    return np.array(losses)


def write_task(out: Path, held_out: Sequence[Conversation], tokenizer: Tokenizer) -> None:
    """Write the held-out questions with their answers as a task for evaluations of any model; nothing if no conversation is one
    question and one answer. An answer is scored by the words that it shares with the data's, and may be a little longer than
    the longest of these. A task has one system message: the first conversation's.
    """
    rows: list[dict[str, str]] = []
    system: str | None = None
    for one in held_out:
        if has_pictures(one.messages):
            # a task's rows hold texts
            continue
        has_system = bool(one.messages) and one.messages[0]["role"] == "system"
        said = one.messages[has_system:]
        own = one.messages[0]["content"] if has_system else None
        if one.tools or [message["role"] for message in said] != ["user", "assistant"] or (rows and own != system):
            continue
        question, answer = (message.get("content") or "" for message in said)
        if question.strip() and answer.strip():
            system = own
            rows.append({"id": one.id, "question": question, "answer": answer})
    if not rows:
        return
    longest = max(len(tokenizer.encode(row["answer"], add_bos=False)) for row in rows)
    settings = {
        "kind": "generate",
        "data": HELD_OUT_ROWS,
        "id": "id",
        "prompt": "{question}",
        "answers": ["answer"],
        "chat": True,
        **({} if system is None else {"system": system}),
        "max_tokens": longest + longest // 4 + 8,
        "verifier": {"method": "overlap"},
    }
    # JSON is valid YAML
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in settings.items()]
    write_text(out / HELD_OUT_TASK, "".join(lines))
    write_text(out / HELD_OUT_ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@torch.no_grad()
def _means(model: Decoder, batch: Batch) -> list[float]:
    batch = batch.to(model.device)
    sums_B = token_losses(model, batch).double().sum(1)
    counts_B = (batch.targets_BT != IGNORE_INDEX).sum(1)
    return (sums_B / counts_B).tolist()


#: Validations of a run.
_VALIDATIONS = 4
#: Held-out questions that are answered before and after training, and the most tokens of an answer.
_QUESTIONS, _ANSWER_TOKENS = 3, 64
#: How many of these are also answered during training, and the most tokens of an answer.
_SAMPLES, _SAMPLE_TOKENS = 2, 48
#: Characters of a question or an answer that are shown on one line.
_SHOWN = 70
_WHAT = "record of a fine-tuning"


@dataclass(frozen=True)
class Finetuned:
    """Result of a fine-tuning. before_N, after_N: mean loss of each held-out conversation before and after, in nats a token;
    ids_N: ids of the conversations. answers: some of their questions with the data's answer and the model's before and after.
    base: folder of the adapter's base model; tokenizer_hash: that of its tokenizer. general: items of general tasks before and
    after; None: not measured.
    memory: bytes `announced`, and the most that the process has `taken`; None on a card, where the plan is of the card's."""

    method: Method
    base: Path
    tokenizer_hash: str
    ids_N: Sequence[str]
    before_N: np.ndarray
    after_N: np.ndarray
    answers: Sequence[dict[str, str]]
    metrics: dict[str, Any]
    general: tuple[ItemResults, ItemResults] | None = None
    memory: dict[str, int] | None = None


def finetune(
    config: FinetuneConfig,
    source: ModelSource,
    data: str,
    out: Path,
    *,
    seed: int,
    device: str,
    progress: Progress,
    general: GeneralTasks | None = None,
) -> Finetuned:
    """Fine-tune a model on a file of questions and answers; the same call continues where it was stopped.

    general: tasks that measure what the model forgets; None: that is not measured.

    Writes below `out`: `adapter/` or `model/`, what `sft` writes, `base/` where the model had to be made ready, the task
    `held_out.yaml`, and `finetune.json`. Raises SourceError, RequestError or ArtefactError for data and models that cannot be
    used, ConfigError for settings, and a model that does not fit into memory; then nothing has been written. Call `finished`
    first.
    """
    reset_peak_memory()
    with TemporaryDirectory() as scratch:
        known = ModelSource("folder", str(out / BASE)) if (out / BASE).exists() else source
        # a resumed run keeps its method, though free memory may have changed
        begun = read_json(out / RECORD, _WHAT).get("method") if (out / RECORD).exists() else None
        planned = config if begun is None else config.with_changes(method=begun)
        plan = plan_finetuning(planned, known, data, seed=seed, device=device, scratch=Path(scratch))
        example = plan.rendered_example()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / RECORD).exists():
        write_json(out / RECORD, {"asked": asked_of(config, source, data, seed)})
    for line in plan.understood:
        progress.say(line)
    base = prepare_base(source, out / BASE, progress)
    # of the plan and the import
    release_freed_memory()
    chosen = {"method": plan.method, "reason": plan.reason, "base": place_of_base(base, out)}
    record = chosen | read_json(out / RECORD, _WHAT)
    write_json(out / RECORD, record)
    method: Method = record["method"]
    progress.say(f"  {method}: {record['reason']}")
    for line in (*plan.sentences, *example):
        progress.say(line)
    tokenizer, chosen_device = load_tokenizer(base), choose_device(device)
    tuning = SFTConfig.parse(
        plan.settings
        | _training_settings(config, method, plan.sizes, chosen_device, merge=plan.base.vision is not None)
        | {
            "micro_batch_size": plan.needs[method].shape.rows,
            "activation_checkpointing": plan.needs[method].shape.recompute,
        },
        lambda path: f"--{path[0]}",
    )
    measure = partial(
        conversation_losses,
        examples=[example for _, example in plan.examples],
        context_length=plan.sizes.context_length,
        padding_id=tokenizer.bos_id,
        progress=progress,
        pictures=plan.pictures,
    )
    runtime, start = Runtime.of(tuning, chosen_device), StartingModel.of(base, tuning, seed)
    questions = _Questions(plan.held_out, tokenizer, plan.base.config.max_position_embeddings)

    def measured(model: Decoder, when: str, adapter: Adapter | None = None) -> _Measured:
        """Losses, answers and general tasks, computed as in training, where frozen weights may be in half precision."""
        with runtime.evaluating(model):
            answers = questions.answers(model, adapter)
            with adapted(model, [] if adapter is None else [(adapter, None)]):
                losses_N = measure(model, description=f"loss {when}")
                return _Measured(losses_N, answers, _general_results(general, model, tokenizer, progress, when))

    write_task(out, plan.held_out, tokenizer)
    reads_pictures = start.reads_pictures
    before = measured(load_trained_decoder(base, chosen_device) if reads_pictures else start.whole(chosen_device), "before")
    release_freed_memory()
    samples = _Samples(questions, plan.sizes.steps, progress)
    metrics = sft(
        tuning, base, None, out, seed=seed, device=device, progress=progress, on_validation=samples.show, shows_data=False
    )
    release_freed_memory()
    if method == "full" or reads_pictures:
        after = measured(load_trained_decoder(out / MODEL, chosen_device), "after")
    else:
        tuned = start.whole(chosen_device)
        # the base in its file's type would lie beside the tuned one
        adapter = read_adapter(out / ADAPTER, tuned, samples_of_folder(base)).to(chosen_device, torch.float32)
        adapter = adapter.put_whole(tuned).fitted(tuned)
        after = measured(tuned, "after", adapter)
    return Finetuned(
        method,
        base,
        tokenizer.hash,
        [one.id for one, _ in plan.examples],
        before.losses_N,
        after.losses_N,
        questions.compared(before.answers, after.answers),
        metrics,
        None if before.general is None or after.general is None else (before.general, after.general),
        _memory(plan, chosen_device),
    )


def _memory(plan: FinetunePlan, device: torch.device) -> dict[str, int] | None:
    peak = peak_memory_bytes() if device.type == "cpu" else None
    return None if peak is None else {"announced": round(plan.chosen.memory.peak), "taken": peak}


class _Measured(NamedTuple):
    """A model's losses on held-out conversations, its answers, and its results on general tasks (None: not measured)."""

    losses_N: np.ndarray
    answers: list[str]
    general: ItemResults | None


#: Most tokens of a general task's question, which is cut from the left; and sequences that are scored at once.
_GENERAL_TOKENS, _GENERAL_SEQUENCES = 2048, 16


def _general_results(
    general: GeneralTasks | None, model: Decoder, tokenizer: Tokenizer, progress: Progress, when: str
) -> ItemResults | None:
    if general is None:
        return None
    length = min(_GENERAL_TOKENS, model.config.max_position_embeddings)
    engine = Engine(model, tokenizer, config=_engine_config(model, length, _GENERAL_SEQUENCES))
    with progress.task(f"general tasks {when}", total=sum(general.counts.values()), unit="questions") as task:
        return general.results(engine, task.advance)


def _engine_config(model: Decoder, length: int, sequences: int) -> EngineConfig:
    """An engine that computes as the trainer does."""
    return EngineConfig(
        max_model_len=length,
        max_num_seqs=sequences,
        # unlike the trainer, compiled kernels copy the weights, and round activations if weights are quantised
        cpu_kernels="off",
        # with quantised weights the engine's cache would be in half precision, unlike the trainer
        kv_cache_dtype="float32" if is_quantised(model) else "auto",
    )


def asked_of(config: FinetuneConfig, source: ModelSource, data: str, seed: int) -> dict[str, Any]:
    """Everything that identifies a fine-tuning."""
    also = {"also": {data_hash(name): weight for name, weight in config.also.items()}}
    return {"settings": config.output_settings() | also, "model": source.name, "data": data_hash(data), "seed": seed}


def finished(out: Path, asked: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """The result of a finished fine-tuning in a folder; None where it is not finished.

    Raises ArtefactError where the folder holds another fine-tuning, or something else.
    """
    record = out / RECORD
    if record.exists():
        record_of_run = read_json(record, _WHAT)
        given, wanted = record_of_run.get("asked", {}), asked()
        # older records also say whether the adapter was merged, and lack the settings that came later
        given.get("settings", {}).pop("merge", None)
        defaults = {name: value for name, value in FinetuneConfig().output_settings().items() if name in wanted["settings"]}
        if given != wanted and given | {"settings": defaults | given.get("settings", {})} != wanted:
            raise ArtefactError(
                f"{out}: holds another fine-tuning, of other data, another model or settings; name another folder"
            )
        result: dict[str, Any] | None = record_of_run.get("result")
        return result
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtefactError(f"{out}: exists already and is not empty; name another folder")
    return None


def finish(out: Path, result: dict[str, Any]) -> None:
    """Write the result, and remove the checkpoints, which are no longer needed."""
    write_json(out / RECORD, {**read_json(out / RECORD, _WHAT), "result": result})
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def _training_settings(
    config: FinetuneConfig, method: Method, sizes: Sizes, device: torch.device, *, merge: bool = False
) -> dict[str, Any]:
    """The settings of `sft` that suit a real model. merge: whether an adapter is merged into the model."""
    settings: dict[str, Any] = {
        "steps": sizes.steps,
        "batch_size": sizes.batch_size,
        "context_length": sizes.context_length,
        "truncate": config.truncate,
        "evaluate_every": max(1, -(-sizes.steps // _VALIDATIONS)),
        "optimizer": "adamw",
        "beta2": 0.999,
        "weight_decay": 0.0,
        "schedule": "cosine",
        "warmup_fraction": 0.1,
        "diagnostics_every": 0,
        "dtype": str(tuning_dtype(config, device)).removeprefix("torch."),
        "compile": False,
        "track": config.track,
        "optimizer_paging": config.paged_optimizer,
    }
    if method == "full":
        return settings | {"learning_rate": config.learning_rate or FULL_LEARNING_RATE}
    settings["adapter"] = {
        "rank": config.rank,
        "alpha": 2.0 * config.rank if config.alpha is None else config.alpha,
        "dropout": config.dropout,
        "rslora": config.rslora,
        "dora": config.dora,
        "modules": config.target_modules,
        "modules_to_save": config.modules_to_save,
        "quantize": config.codes if method == "qlora" else None,
        "merge": merge,
    }
    return settings | ({} if config.learning_rate is None else {"learning_rate": config.learning_rate})


class _Questions:
    """The first held-out questions that leave room for an answer in the model's context; a model answers them."""

    def __init__(self, held_out: Sequence[Conversation], tokenizer: Tokenizer, context: int) -> None:
        self._tokenizer = tokenizer
        self._questions: list[tuple[str, str, list[int] | PicturePrompt]] = []
        for one in held_out:
            *before, last = one.messages or [{"role": ""}]
            if last["role"] != "assistant" or not before or not (question := before[-1].get("content")):
                continue
            try:
                ids = encode_prompt(tuple(before), tokenizer, one.tools, pictures=True)
                pictures = [picture_of(source, one.folder) for source in sources_in(before)]
            except RequestError:
                continue
            if len(ids) + _ANSWER_TOKENS <= context:
                prompt = PicturePrompt(ids, pictures) if pictures else ids
                self._questions.append((text_of(question), last.get("content") or "", prompt))
            if len(self._questions) == _QUESTIONS:
                break

    def answers(
        self, model: Decoder, adapter: Adapter | None = None, *, most: int = _QUESTIONS, tokens: int = _ANSWER_TOKENS
    ) -> list[str]:
        """Greedy answers of a model, or of a model with an adapter. An adapter in training is not merged, which would need a
        second copy of the weights. most: number of questions. tokens: most tokens of an answer."""
        prompts = [ids for _, _, ids in self._questions[:most]]
        shows = any(isinstance(prompt, PicturePrompt) for prompt in prompts)
        # an engine reads no prompt with pictures beside an adapter
        if not prompts or (shows and adapters_of(model)):
            return []
        longest = max(len(prompt) for prompt in prompts if not isinstance(prompt, PicturePrompt)) if not shows else 0
        length = model.config.max_position_embeddings if shows else longest + tokens
        config = _engine_config(model, length, len(prompts))
        with without_adapters(model):
            engine = Engine(model, self._tokenizer, config=config)
            name = None
            if adapter is not None or adapters_of(model):
                name = "trained"
                engine.load_adapter(name, adapter or adapter_of(model))
            # one batch, so that each step reads the weights once for all questions
            answers = engine.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0.0), adapter=name)
        return [answer.text for answer in answers]

    def shown(self, answers: Sequence[str]) -> list[str]:
        """Questions and answers, each pair on a line."""
        return [
            f"{one_line(question, _SHOWN)} → {one_line(answer, _SHOWN)}"
            for (question, _, _), answer in zip(self._questions, answers, strict=False)
        ]

    def compared(self, before: Sequence[str], after: Sequence[str]) -> list[dict[str, str]]:
        """Question, the answer of the data, and those of the model, for the record."""
        return [
            {"prompt": question, "reference": reference, "before": first, "after": second}
            for (question, reference, _), first, second in zip(self._questions, before, after, strict=True)
        ]


class _Samples:
    """Prints answers to some held-out questions at each validation except the last, after which all answers are printed."""

    def __init__(self, questions: _Questions, steps: int, progress: Progress) -> None:
        self._questions = questions
        self._steps = steps
        self._progress = progress

    def show(self, finished: int, model: Decoder) -> None:
        """Print what a model in training answers."""
        if finished >= self._steps:
            return
        answers = self._questions.answers(model, most=_SAMPLES, tokens=_SAMPLE_TOKENS)
        for line in self._questions.shown(answers):
            self._progress.say(f"  step {finished:,}: {line}")
