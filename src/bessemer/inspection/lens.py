"""The logit lens (nostalgebraist 2020): what the model would predict if it ended after each layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bessemer.inspection.recording import Recording
from bessemer.model.decoder import Decoder

# Shapes: L layers, and one for the embedding before them; T time, k tokens, D hidden, V vocabulary.


@dataclass(frozen=True)
class LogitLens:
    """Predictions from the residual stream after the embedding (first) and after each layer; the last are the model's own.

    tokens_LTk, probabilities_LTk: the likeliest next tokens. next_rank_LT: of the token that does come next, 1 is the
    likeliest; next_probability_LT: its probability; both without the last position.
    """

    tokens_LTk: np.ndarray
    probabilities_LTk: np.ndarray
    next_rank_LT: np.ndarray
    next_probability_LT: np.ndarray

    def losses(self) -> np.ndarray:
        """The model's loss at each token but the first, (T - 1,), nats."""
        return -np.log(np.maximum(self.next_probability_LT[-1], np.finfo(np.float32).tiny))


def logit_lens(model: Decoder, recording: Recording, tokens_T: np.ndarray, top: int = 5, row: int = 0) -> LogitLens:
    """softmax(head(norm(h))) of one recorded text, with h the residual stream after each layer."""
    following_T1 = torch.as_tensor(np.asarray(tokens_T[1:], np.int64))[:, None]
    tokens, probabilities, ranks, of_next = [], [], [], []
    for hidden_BTD in recording.residual:
        probabilities_TV = lens_logits(model, hidden_BTD[row]).float().softmax(-1).cpu()
        best = probabilities_TV.topk(min(top, probabilities_TV.shape[-1]), dim=-1)
        next_T1 = probabilities_TV[:-1].gather(1, following_T1)
        tokens.append(best.indices.numpy())
        probabilities.append(best.values.numpy())
        ranks.append(((probabilities_TV[:-1] > next_T1).sum(-1) + 1).numpy())
        of_next.append(next_T1[:, 0].numpy())
    return LogitLens(*map(np.stack, (tokens, probabilities, ranks, of_next)))


@torch.no_grad()
def lens_logits(model: Decoder, hidden_TD: np.ndarray) -> Tensor:
    """The logits that the model's last norm and head make of states of the residual stream, (T, V)."""
    head = model.head_weight
    return model.logits(model.norm(torch.from_numpy(hidden_TD).to(head.device, head.dtype)))
