"""What supervised tuning may change in plain next-token prediction: the loss of a token, and noise on the embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bessemer.model.decoder import Decoder
from bessemer.training.head import token_log_probs


def dynamic_fine_tuning(model: Decoder, hidden_BTD: Tensor, targets_BT: Tensor, z_loss: float) -> Tensor:
    """Sum over the targets of −sg(p) log p, with sg(p) the probability without a gradient (Wu et al. 2025, arXiv 2508.05629,
    eq. 9): its gradient is that of −p. A `SummedLoss`; z_loss must be 0."""
    assert not z_loss
    log_probs_N, _ = token_log_probs(
        hidden_BTD.flatten(0, 1), model.head_weight, targets_BT.flatten(), softcap=model.logit_softcap
    )
    return -(log_probs_N.detach().exp() * log_probs_N).sum()


def add_embedding_noise(model: Decoder, alpha: float) -> None:
    """Add uniform noise within ± alpha / √(T D) to embedded tokens in training, for T tokens of a row and D channels (Jain et
    al. 2023, "NEFTune", algorithm 1)."""

    def add_noise(module: nn.Module, inputs: tuple[Tensor, ...], embedded_BTD: Tensor) -> Tensor:
        if not module.training:
            return embedded_BTD
        tokens, channels = embedded_BTD.shape[-2:]
        return embedded_BTD + torch.empty_like(embedded_BTD).uniform_(-1, 1) * (alpha / (tokens * channels) ** 0.5)

    model.embed_tokens.register_forward_hook(add_noise)
