"""The stage `sft`: supervised fine-tuning of a pretrained model on conversations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bessemer.core.errors import SourceError
from bessemer.core.progress import Progress, Silent
from bessemer.core.seeds import derive_seed
from bessemer.data.corpus.reader import TRAIN, VALIDATION
from bessemer.model.folder import load_model
from bessemer.posttraining.config import DOCS_QUESTIONS, SFTConfig
from bessemer.posttraining.conversations import Conversation, read_conversations, write_conversations
from bessemer.posttraining.packing import PackedBatches
from bessemer.posttraining.questions import make_questions
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.autotune import prepare_run
from bessemer.training.checkpoint.export import save_trained
from bessemer.training.monitoring.peak_flops import device_peak
from bessemer.training.trainer import train


def sft(
    config: SFTConfig,
    model: Path,
    documents: Path | None,
    out: Path,
    *,
    seed: int,
    device: str = "auto",
    progress: Progress | None = None,
    folder: Path = Path(),
    card_flops: Callable[[str], float | None] = lambda name: None,
) -> dict[str, Any]:
    """Fine-tune the model of folder `model` on conversations; resumes from `out`.

    Writes below `out`: `model/`, `metrics.jsonl`, `autotune.json`, `checkpoints/`, and the training and held-out
    conversations, `conversations/{train,validation}.jsonl`. Files named in the settings are relative to `folder`. Returns the
    headline metrics. Raises SourceError for conversations that are missing or malformed, and what `train` raises.
    """
    progress = progress or Silent()
    tokenizer = load_tokenizer(model)
    training, held_out = gather_conversations(config, documents, folder, seed)
    write_conversations(out / "conversations" / "train.jsonl", training)
    write_conversations(out / "conversations" / "validation.jsonl", held_out)
    batches = PackedBatches(
        training,
        tokenizer,
        batch_size=config.batch_size,
        context_length=config.context_length,
        seed=derive_seed(seed, "batches"),
    )
    if batches.skipped:
        progress.say(
            f"  {batches.skipped:,} of {len(training):,} conversations are left out: the assistant says nothing within "
            f"{config.context_length:,} tokens"
        )
    if config.steps is None:
        config = config.with_changes(steps=math.ceil(config.epochs * batches.rows / config.batch_size))
    config, runtime, mesh = prepare_run(config, model, out, device=device, progress=progress, folder=folder)
    decoder = load_model(model, device=runtime.device, dtype=torch.float32)
    summary = train(
        decoder,
        batches,
        config,
        out,
        runtime=runtime,
        seed=seed,
        progress=progress,
        description="fine-tune",
        mesh=mesh,
        folder=folder,
        peak_flops=device_peak(out, runtime, card_flops) if mesh.leads else None,
    )
    save_trained(decoder, out, tokenizer=model, mesh=mesh, config=config)
    return {
        "conversations": len(training),
        "held_out": len(held_out),
        "skipped": batches.skipped,
        "rows": batches.rows,
        "filled": round(batches.filled, 4),
        **summary,
    }


def gather_conversations(
    config: SFTConfig, documents: Path | None, folder: Path, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(training, held-out) conversations of all data that the settings name. Raises SourceError."""
    training: list[Conversation] = []
    held_out: list[Conversation] = []
    for name in config.data:
        if name == DOCS_QUESTIONS:
            if documents is None:
                raise SourceError(f"{DOCS_QUESTIONS} is made from documents, and no stage of this recipe makes any")
            made = make_questions(documents, TRAIN, config.train_questions, seed)
            if not made:
                raise SourceError(
                    f"{documents}: no question can be made from it; {DOCS_QUESTIONS} needs documentation of functions and "
                    "classes, as the sources wheels and python_docs give it"
                )
            training += made
            held_out += make_questions(documents, VALIDATION, config.validation_questions, seed)
            continue
        for conversation in read_conversations(folder / name):
            chance = derive_seed(seed, "validation", conversation.id) / 2**63
            (held_out if chance < config.validation_share else training).append(conversation)
    return training, held_out
