"""The stage `model`: a decoder for a tokenizer, with its weights before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bessemer.core.progress import Progress, Silent
from bessemer.core.store import write_json
from bessemer.model.config import ModelStageConfig
from bessemer.model.folder import GENERATION_CONFIG, save_model
from bessemer.model.initialisation import initial_decoder
from bessemer.model.summary import model_metrics
from bessemer.tokenization.tokenizer import load_tokenizer


def build_model(
    config: ModelStageConfig, tokenizer: Path, out: Path, *, seed: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Write `model/` below `out`: config, weights drawn from the seed, and the tokenizer's files. Returns its figures."""
    vocabulary = load_tokenizer(tokenizer)
    model_config = config.model_for(vocabulary.vocab_size, vocabulary.bos_id, vocabulary.bos_id)
    folder = out / "model"
    save_model(initial_decoder(model_config, seed), folder, tokenizer=tokenizer)
    ends = {"bos_token_id": vocabulary.bos_id, "eos_token_id": list(vocabulary.eos_ids), "pad_token_id": vocabulary.bos_id}
    write_json(folder / GENERATION_CONFIG, ends)
    metrics = model_metrics(model_config)
    (progress or Silent()).say(
        f"  {metrics['parameters']:,} parameters, {metrics['embedding_share']:.0%} of them in the embedding; "
        f"context of {metrics['context_length']:,} tokens"
    )
    return metrics
