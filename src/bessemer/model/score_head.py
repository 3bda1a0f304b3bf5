"""Models with a scalar head in place of the language head: reward models, and critics.

The head is a linear layer without bias over the states after the last norm, `score.weight` in the folder, as Hugging Face's
`…ForSequenceClassification` stores it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.folder import load_model
from bessemer.model.initialisation import empty_decoder, fill, initial_weight

SCORE = "score.weight"


def scorer_config(config: ModelConfig) -> ModelConfig:
    """The config of a model with a scalar head in place of its language head and MTP modules; that of one with scores as it
    is."""
    return config if config.num_scores else config.with_changes(num_scores=1, num_nextn_predict_layers=0)


def new_head(config: ModelConfig, seed: int) -> Tensor:
    """The weight of a head of a config with scores, before training: small, so that rewards begin near 0."""
    return initial_weight(SCORE, (config.num_scores, config.hidden_size), config, seed)


def as_scorer(model: Decoder, seed: int) -> Decoder:
    """A language model as one with a new scalar head, which shares its other tensors; one with scores as it is."""
    if model.config.num_scores:
        return model
    config = scorer_config(model.config)
    scorer = empty_decoder(config)
    weights = model.state_dict()
    kept = {name: weights[name] for name in scorer.state_dict() if name != SCORE}
    return fill(scorer, kept | {SCORE: new_head(config, seed).to(model.device, model.dtype)}).to(model.device)


def load_scorer(
    folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, *, seed: int
) -> Decoder:
    """The model of a folder with its scalar head; of a language model, or a GGUF file, with a new one drawn from `seed`.

    Raises ArtefactError as `load_model`.
    """
    return as_scorer(load_model(folder, device, dtype, scores=True), seed)
