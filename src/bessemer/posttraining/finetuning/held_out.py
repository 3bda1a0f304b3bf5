"""What is held out: the loss of each conversation, before and after, and a task of their questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bessemer.core.progress import Progress
from bessemer.core.store import write_text
from bessemer.model.decoder import Decoder
from bessemer.model.tuned_folder import HELD_OUT_TASK
from bessemer.posttraining.conversations import Conversation
from bessemer.posttraining.packing import Example
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batches import IGNORE_INDEX, Batch
from bessemer.training.data.packing import pack_rows
from bessemer.training.objectives import token_losses

#: Rows of the task of what is held out.
HELD_OUT_ROWS = "held_out.jsonl"
#: Conversations read at once.
_ROWS = 4


def conversation_losses(
    model: Decoder, examples: Sequence[Example], context_length: int, padding_id: int, progress: Progress, description: str
) -> np.ndarray:
    """Mean −log p of each example's targets, (N,) float64, in nats a token, one example a row."""
    losses: list[float] = []
    with progress.task(description, total=len(examples), unit="conversations") as task:
        for start in range(0, len(examples), _ROWS):
            chosen = examples[start : start + _ROWS]
            longest = max(len(example.tokens) for example in chosen)
            batch = pack_rows([[(one.tokens, one.targets)] for one in chosen], min(longest, context_length), padding_id)
            losses += _means(model, batch)
            task.advance(len(chosen))
    return np.array(losses)


def write_task(out: Path, held_out: Sequence[Conversation], tokenizer: Tokenizer) -> None:
    """Write the questions held out with their answers as a task, which any model may be evaluated on; nothing where there are
    no conversations of one question and one answer.

    An answer is scored by the words that it shares with that of the data, and may be a little longer than the longest.
    A task has one system message: the first conversation's.
    """
    rows: list[dict[str, str]] = []
    system: str | None = None
    for one in held_out:
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
    # JSON is YAML
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in settings.items()]
    write_text(out / HELD_OUT_TASK, "".join(lines))
    write_text(out / HELD_OUT_ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@torch.no_grad()
def _means(model: Decoder, batch: Batch) -> list[float]:
    batch = batch.to(model.device)
    sums_B = token_losses(model, batch).double().sum(1)
    counts_B = (batch.targets_BT != IGNORE_INDEX).sum(1)
    return (sums_B / counts_B).tolist()
