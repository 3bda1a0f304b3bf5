"""A fine-tuning from a model and a file to an adapter or a model, with the losses that tell whether it was worth it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bessemer.core.errors import ArtefactError, ConfigError, SourceError
from bessemer.core.hashing import hash_file
from bessemer.core.progress import Progress
from bessemer.core.store import read_json, write_json
from bessemer.inference.engine import Engine, EngineConfig
from bessemer.inference.sampling.params import SamplingParams
from bessemer.model.adapter_folder import read_adapter
from bessemer.model.adapters import adapted
from bessemer.model.decoder import Decoder
from bessemer.model.device import choose_device, is_fast
from bessemer.model.folder import load_model
from bessemer.model.folder_config import holds_codes, read_model_config
from bessemer.model.formats.exchange import ModelSource
from bessemer.model.quantised_linear import is_quantised
from bessemer.model.trained_adapters import adapter_of, adapters_of, without_adapters
from bessemer.posttraining.config import SFTConfig, Truncate
from bessemer.posttraining.conversations import Conversation
from bessemer.posttraining.finetuning.base import prepare_base
from bessemer.posttraining.finetuning.columns import find_columns
from bessemer.posttraining.finetuning.config import FULL_LEARNING_RATE, FinetuneConfig, Method
from bessemer.posttraining.finetuning.held_out import conversation_losses
from bessemer.posttraining.finetuning.method import choose_method, free_bytes
from bessemer.posttraining.packing import Example, fit_conversations, pack_conversations
from bessemer.posttraining.sft import gather_conversations, sft
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.training.checkpoint.manager import CHECKPOINTS
from bessemer.training.data.packing import best_fit
from bessemer.training.runtime import Runtime
from bessemer.training.starting_model import starting_model

#: What the command writes down of itself in the folder that it makes.
RECORD = "finetune.json"
#: Bounds of a row's length where the data decide, what it is a multiple of, and how many of the longest conversation fit.
_SHORTEST, _LONGEST, _STEP = 64, 2048, 32
_FACTORS = (1, 2, 3, 4)
#: Conversations of a batch, and validations of a run, where nothing is said.
_CONVERSATIONS, _VALIDATIONS = 8, 4
#: Fewest conversations held out that tell anything of a difference.
_FEWEST = 2
#: Held-out questions that the model answers while it learns, and the tokens of an answer.
_SAMPLES, _SAMPLE_TOKENS = 2, 48


@dataclass(frozen=True)
class Finetuned:
    """What came out. before_N, after_N: mean loss of each conversation held out, in nats a token. base: the folder that an
    adapter is for. adapter, model: what was written of the two."""

    method: Method
    base: Path
    adapter: Path | None
    model: Path | None
    before_N: np.ndarray
    after_N: np.ndarray
    metrics: dict[str, Any]


def finetune(
    config: FinetuneConfig, source: ModelSource, data: Path, out: Path, *, seed: int, device: str, progress: Progress
) -> Finetuned:
    """Fine-tune a model on a file of questions and answers; the same call goes on where it was stopped.

    Writes below `out`: `adapter/` or `model/`, what `sft` writes, `base/` where the model had to be made ready, and
    `finetune.json`. Raises SourceError or ArtefactError for data and models that cannot be used, ConfigError for settings,
    and a model that memory does not hold. `finished` is asked before.
    """
    settings = settings_of(config, data)
    training, held_out = gather_conversations(SFTConfig.parse(settings), None, Path(), seed)
    # a conversation that the file has ten times is one piece of evidence
    held_out = list({one.id: one for one in held_out}.values())
    if len(held_out) < _FEWEST or not training:
        raise SourceError(
            f"{data}: of {len(training) + len(held_out):,} rows {len(held_out):,} different ones would be held out, too few to "
            "tell whether the model got better; give more rows, or a larger --held-out"
        )
    out.mkdir(parents=True, exist_ok=True)
    if not (out / RECORD).exists():
        write_json(out / RECORD, {"asked": asked_of(config, source, data, seed)})
    if "prompt_column" in settings:
        progress.say(f"{data}: questions in {settings['prompt_column']!r}, answers in {settings['answer_column']!r}")
    base = prepare_base(source, out / "base", progress)
    tokenizer, chosen_device = load_tokenizer(base), choose_device(device)
    limit = read_model_config(base).max_position_embeddings
    longest = config.context_length or min(_LONGEST, limit)
    lengths = [len(one.tokens) for one in fit_conversations([*training, *held_out], tokenizer, longest, config.truncate)[0]]
    context = config.context_length or _row_length(lengths, limit)
    rows = max(1, pack_conversations(training, tokenizer, context, config.truncate).rows)
    batch_size = config.batch_size or max(1, round(_CONVERSATIONS * rows / len(training)))
    record = read_json(out / RECORD, "record of a fine-tuning")
    if "method" not in record:
        # once: another time memory may hold more, or less
        chosen = _method(config, base, batch_size * context, chosen_device)
        record |= dict(zip(("method", "reason"), chosen, strict=True))
        write_json(out / RECORD, record)
    method: Method = record["method"]
    progress.say(f"  {method}: {record['reason']}")
    progress.say(
        f"  {len(training):,} conversations to learn from, {len(held_out):,} different ones held out; {batch_size} rows of "
        f"{context:,} tokens a step"
    )
    tuning = SFTConfig.parse(
        settings | _training_settings(config, method, context, batch_size, rows, chosen_device), lambda path: f"--{path[0]}"
    )
    measure = partial(
        conversation_losses,
        examples=_within(held_out, tokenizer, context, config.truncate),
        context_length=context,
        padding_id=tokenizer.bos_id,
        progress=progress,
    )
    runtime = Runtime.of(tuning, chosen_device)

    def measured(model: Decoder, description: str) -> np.ndarray:
        """As training computes: what is frozen may lie in half precision."""
        with runtime.evaluating(model):
            return measure(model, description=description)

    before_N = measured(starting_model(base, tuning, chosen_device, seed), "loss before")
    samples = _Samples(held_out, tokenizer, read_model_config(base).max_position_embeddings, progress)
    metrics = sft(tuning, base, None, out, seed=seed, device=device, progress=progress, on_validation=samples.show)
    if method == "full":
        after_N = measured(load_model(out / "model", device=chosen_device), "loss after")
        return Finetuned(method, base, None, out / "model", before_N, after_N, metrics)
    tuned = starting_model(base, tuning, chosen_device, seed)
    adapter = read_adapter(out / "adapter", load_model(base)).to(chosen_device, torch.float32).fitted(tuned)
    with torch.no_grad(), adapted(tuned, [(adapter, None)]):
        after_N = measured(tuned, "loss after")
    return Finetuned(method, base, out / "adapter", out / "model" if config.merge else None, before_N, after_N, metrics)


def settings_of(config: FinetuneConfig, data: Path) -> dict[str, Any]:
    """The settings of `sft` that say which conversations it reads.

    Raises SourceError for a file whose columns cannot be told, ConfigError where files call them differently.
    """
    columns = find_columns(data, config.prompt_column, config.answer_column)
    others = {Path(name).resolve(): weight for name, weight in config.also.items()}
    for other in others:
        if (found := find_columns(other, config.prompt_column, config.answer_column)) != columns:
            raise ConfigError(f"{other}: its columns are {found}, and those of {data} are {columns}; call them alike")
    settings: dict[str, Any] = {
        "data": [str(path) for path in (data.resolve(), *others)],
        "weights": {str(path): weight for path, weight in others.items()},
        "validation_share": config.held_out,
    }
    if columns is not None:
        settings |= dict(zip(("prompt_column", "answer_column"), columns, strict=True))
    return settings


def asked_of(config: FinetuneConfig, source: ModelSource, data: Path, seed: int) -> dict[str, Any]:
    """What tells one fine-tuning from another."""
    also = {"also": {hash_file(Path(name)): weight for name, weight in config.also.items()}}
    return {"settings": config.output_settings() | also, "model": source.name, "data": hash_file(data), "seed": seed}


def finished(out: Path, asked: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """The result of a fine-tuning that has ended in a folder; None where it is still to be made.

    Raises ArtefactError where the folder holds another fine-tuning, or something else.
    """
    record = out / RECORD
    if record.exists():
        found = read_json(record, "record of a fine-tuning")
        if found.get("asked") != asked():
            raise ArtefactError(
                f"{out}: holds another fine-tuning, of other data, another model or settings; name another folder"
            )
        result: dict[str, Any] | None = found.get("result")
        return result
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtefactError(f"{out}: exists already and is not empty; name another folder")
    return None


def finish(out: Path, result: dict[str, Any]) -> None:
    """Write the result down, and remove the checkpoints, which nothing needs any more."""
    write_json(out / RECORD, {**read_json(out / RECORD, "record of a fine-tuning"), "result": result})
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def _row_length(lengths: Sequence[int], most: int) -> int:
    """The length of rows, within the model's context, that hold the longest conversation and leave the fewest tokens empty: a
    few times that conversation's length, rounded up."""
    shortest = max(_SHORTEST, -(-max(lengths, default=1) // _STEP) * _STEP)
    tried = [length for factor in _FACTORS if (length := shortest * factor) <= min(_LONGEST, most)]
    if not tried:
        return min(shortest, _LONGEST, most)
    return min(tried, key=lambda length: (int(best_fit(lengths, length).max(initial=-1)) + 1) * length)


def _method(config: FinetuneConfig, base: Path, tokens: int, device: torch.device) -> tuple[Method, str]:
    model = read_model_config(base)
    quantised = None
    if holds_codes(base):
        if config.method in ("full", "lora"):
            raise ConfigError(f"--method: {config.method} is of whole weights, and {base} is quantised; take qlora")
        quantised = float(sum(path.stat().st_size for path in base.glob("*.safetensors")))
    if config.method != "auto":
        return config.method, "as asked"
    dtype, kind = _product_dtype(device), device.type
    return choose_method(model, config.rank, tokens, free_bytes(device), quantised, dtype=dtype, device=kind)


def _product_dtype(device: torch.device) -> torch.dtype:
    """In which dtype products are computed."""
    return torch.bfloat16 if is_fast(torch.bfloat16, device) else torch.float32


def _training_settings(
    config: FinetuneConfig, method: Method, context: int, batch_size: int, rows: int, device: torch.device
) -> dict[str, Any]:
    """The settings of `sft` that suit a real model."""
    steps = max(1, -(-round(config.epochs * rows) // batch_size))
    found: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "context_length": context,
        "truncate": config.truncate,
        "evaluate_every": max(1, -(-steps // _VALIDATIONS)),
        "optimizer": "adamw",
        "beta2": 0.999,
        "weight_decay": 0.0,
        "schedule": "cosine",
        "warmup_fraction": 0.1,
        "diagnostics_every": 0,
        "dtype": str(_product_dtype(device)).removeprefix("torch."),
        "compile": False,
    }
    if method == "full":
        return found | {"learning_rate": config.learning_rate or FULL_LEARNING_RATE}
    quantize = "int4" if method == "qlora" else None
    found["adapter"] = {"rank": config.rank, "alpha": 2.0 * config.rank, "quantize": quantize, "merge": config.merge}
    return found | ({} if config.learning_rate is None else {"learning_rate": config.learning_rate})


def _within(conversations: Sequence[Conversation], tokenizer: Tokenizer, context: int, truncate: Truncate) -> list[Example]:
    """The conversations that have something to learn within a row."""
    examples = fit_conversations(conversations, tokenizer, context, truncate)[0]
    if len(examples) < _FEWEST:
        raise SourceError(
            f"{len(examples):,} conversations held out have an answer within {context:,} tokens; raise --context-length"
        )
    return examples


class _Samples:
    """Answers to some questions held out, said at each validation."""

    def __init__(self, held_out: Sequence[Conversation], tokenizer: Tokenizer, context: int, progress: Progress) -> None:
        """context: tokens that the model reads; a question that leaves no room for an answer is not asked."""
        self._asked: list[tuple[str, list[int]]] = []
        for one in held_out:
            *before, last = one.messages or [{"role": ""}]
            if last["role"] != "assistant" or not before or not (question := before[-1].get("content")):
                continue
            ids = tokenizer.apply_chat_template(before, add_generation_prompt=True, tools=one.tools or None)
            if len(ids) + _SAMPLE_TOKENS <= context:
                self._asked.append((question, ids))
            if len(self._asked) == _SAMPLES:
                break
        self._tokenizer = tokenizer
        self._progress = progress

    def show(self, finished: int, model: Decoder) -> None:
        """Say what a model in training answers. An adapter stays beside the weights: merged, it would take a second copy."""
        if not self._asked:
            return
        prompts = [ids for _, ids in self._asked]
        config = EngineConfig(
            max_model_len=max(map(len, prompts)) + _SAMPLE_TOKENS,
            max_num_seqs=len(prompts),
            # which would pack the weights, another copy, and over codes round activations as the trainer does not
            cpu_kernels="off",
            # beside codes the engine keeps keys and values in half precision, which the trainer does not
            kv_cache_dtype="float32" if is_quantised(model) else "auto",
        )
        with without_adapters(model):
            engine = Engine(model, self._tokenizer, config=config)
            name = None
            if adapters_of(model):
                name = "trained"
                engine.load_adapter(name, adapter_of(model))
            # beside each other: every token of the two reads the weights once
            answers = engine.generate(prompts, SamplingParams(max_tokens=_SAMPLE_TOKENS, temperature=0.0), adapter=name)
        for (question, _), answer in zip(self._asked, answers, strict=True):
            self._progress.say(f"  step {finished:,}: {_line(question)} → {_line(answer.text)}")


def _line(text: str) -> str:
    """The beginning of a text, on one line."""
    words = " ".join(text.split())
    return words if len(words) <= 70 else f"{words[:69]}…"
