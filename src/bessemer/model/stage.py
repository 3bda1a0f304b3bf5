"""The stage `model`: a decoder for a tokenizer, with its weights before training: new, or those of an existing model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bessemer.core.progress import Progress, Silent
from bessemer.core.store import write_json
from bessemer.model.config import ModelStageConfig
from bessemer.model.existing import existing_decoder, existing_model
from bessemer.model.folder import save_initial_model, save_model
from bessemer.model.folder_config import GENERATION_CONFIG
from bessemer.model.summary import model_metrics
from bessemer.tokenization.tokenizer import load_tokenizer


def build_model(
    config: ModelStageConfig,
    tokenizer: Path | None,
    out: Path,
    *,
    seed: int,
    folder: Path = Path(),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `model/` below `out`: config, weights, and the tokenizer's files. Returns the model's figures.

    Weights are drawn from the seed, or taken from `init_from`, a path that starts from `folder`; the tokenizer too where none
    is given. Raises ConfigError when that model does not go with the tokenizer or with a setting.
    """
    if tokenizer is None:
        assert config.init_from is not None
        tokenizer = existing_model(config.init_from, folder)
    vocabulary, say = load_tokenizer(tokenizer), (progress or Silent()).say
    made = out / "model"
    if config.init_from is None:
        model_config = config.model_for(vocabulary.vocab_size, vocabulary.bos_id, vocabulary.bos_id)
        save_initial_model(model_config, seed, made, tokenizer=tokenizer)
    else:
        decoder = existing_decoder(config, tokenizer, folder)
        model_config = decoder.config
        say(f"  weights of {config.init_from}")
        save_model(decoder, made, tokenizer=tokenizer)
    ends = {"bos_token_id": vocabulary.bos_id, "eos_token_id": list(vocabulary.eos_ids), "pad_token_id": vocabulary.bos_id}
    write_json(made / GENERATION_CONFIG, ends)
    metrics = model_metrics(model_config)
    say(
        f"  {metrics['parameters']:,} parameters, {metrics['embedding_share']:.0%} of them in the embedding; "
        f"context of {metrics['context_length']:,} tokens"
    )
    return metrics if config.init_from is None else {"init_from": config.init_from, **metrics}
