"""Log-probabilities of a reference, computed once for a whole data set and kept beside the run.

The model that a run starts from is its reference. While its weights are those, before the first step, it says its
log-probabilities of all answers; then no second model is held in memory and no step runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bessemer.core.hashing import hash_bytes, hash_value
from bessemer.core.new_folder import new_file
from bessemer.core.progress import Progress
from bessemer.model.decoder import Decoder
from bessemer.posttraining.preference.kto import MISMATCHED_REFERENCE
from bessemer.posttraining.preference.labelled import has_mismatched, mismatched
from bessemer.posttraining.preference.objective import REFERENCE_LOG_PROBS
from bessemer.training.data.batches import Batch
from bessemer.training.model_setup import PreparedModel
from bessemer.training.objectives import POLICY
from bessemer.training.runtime import Runtime
from bessemer.training.trainee import Trainee

#: Key of a file's metadata that says what its log-probabilities are of, and what they depend on beside the reference.
_OF, _ROWS = "log_probabilities_of", ("tokens_BT", "targets_BT", "positions_BT", "document_ids_BT")


def _hash(values: Tensor | None) -> str:
    return "" if values is None else hash_bytes(str(tuple(values.shape)).encode(), values.contiguous().numpy().tobytes())


def cached(
    batch: Batch,
    name: str,
    load: Callable[[], Decoder],
    out: Path,
    runtime: Runtime,
    *,
    identity: str,
    rows_at_once: int,
    progress: Progress,
) -> Batch:
    """A packed data set, training or validation, with what its objective asks of the reference, which `load` gives, from files
    in `out`. identity: of the reference; what was computed with another one, or for other rows, is computed again."""

    def of(rows: Batch, kind: str) -> Batch:
        return with_reference(
            rows,
            load,
            out / f"reference-{name}{kind}.safetensors",
            runtime,
            identity=identity,
            rows_at_once=rows_at_once,
            description=f"reference ({name}{kind})",
            progress=progress,
        )

    found = of(batch, "")
    if not has_mismatched(batch):
        return found
    twins = of(mismatched(batch), "-mismatched")
    return found.with_values(per_token={MISMATCHED_REFERENCE: twins.per_token[REFERENCE_LOG_PROBS]})


def with_reference(
    batch: Batch,
    load: Callable[[], Decoder],
    path: Path,
    runtime: Runtime,
    *,
    identity: str,
    rows_at_once: int,
    description: str,
    progress: Progress,
) -> Batch:
    """A packed data set with the log-probabilities of the model that `load` gives, (B, T), read from `path` where an earlier
    start of the run has left them."""
    of = {_OF: hash_value([identity, *(_hash(getattr(batch, name)) for name in _ROWS)])}
    if path.exists():
        with safe_open(path, "pt") as file:
            is_ours = file.metadata() == of
        if is_ours:
            return batch.with_values(per_token=load_file(path))
    rows = batch.tokens_BT.shape[0]
    with runtime.running():
        trainee = Trainee({POLICY: PreparedModel(load(), None)}, runtime)
        parts = []
        with progress.task(description, total=rows, unit="rows") as bar, torch.no_grad():
            for start in range(0, rows, rows_at_once):
                part = batch.rows(slice(start, start + rows_at_once))
                parts.append(trainee.log_probs(part, POLICY))
                bar.advance(len(parts[-1]))
    found = {REFERENCE_LOG_PROBS: torch.cat(parts).contiguous()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as unfinished:
        save_file(found, unfinished, metadata=of)
    return replace(batch, per_token={**batch.per_token, **found})
