"""Beam search: the likeliest answer that keeping several beginnings finds, not a drawn one.

As `transformers.generate(num_beams=…)` with `early_stopping=False`, tokens and scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bessemer.inference.sampling.sampler import SamplingState, no_token

# Shapes: B beams, V vocabulary, C candidates.

#: From sequences, and which of the previous call's sequences each continues by its last token, to the logits of the token
#: after each, float32 (B, V). The first call has the prompt alone, which continues none: -1.
NextLogits = Callable[[list[list[int]], list[int]], Tensor]


@dataclass(frozen=True)
class Beam:
    """An answer, its end token included; `log_prob` is the sum over its tokens, `score` what it is ranked by."""

    tokens: list[int]
    log_prob: float
    score: float


def beam_search(next_logits: NextLogits, prompt: Sequence[int], state: SamplingState, limit: int) -> list[Beam]:
    """The n best answers of at most `limit` tokens, best first, by the request's `beam_width` and `length_penalty`.

    Each step continues all beams by all tokens and keeps the best by the sum of log-probabilities: those that end, or reach
    the limit, are done with a score of `sum / length ** length_penalty`; the best others go on. It ends when `beam_width`
    are done and the best one under way, scored at its present length, is no better than the worst of them.

    Biases and bans are added to the log-probabilities, as `transformers` has it. `state` stays as it is.
    Raises RequestError when the logits are not finite or nothing may be chosen.
    """
    params, width = state.params, state.params.beam_width
    assert width > 0 and limit > 0, (width, limit)
    # so many that, whatever ends among them, enough are left to go on with
    kept = max(2, 1 + len(state.end_tokens)) * width
    running: list[list[int]] = [[]]
    parents = [-1]
    scores_B = torch.zeros(1)
    done: list[Beam] = []
    for length in range(1, limit + 1):
        logits_BV = next_logits([[*prompt, *tokens] for tokens in running], parents)
        totals_BV = _log_probs(logits_BV, running, state) + scores_B[:, None]
        vocab_size = totals_BV.shape[-1]
        values_C, places_C = totals_BV.flatten().topk(min(kept, totals_BV.numel()))
        going: list[tuple[int, int, Tensor]] = []
        ranked = zip(places_C.tolist(), values_C, strict=True)
        for rank, (place, total) in enumerate(ranked):
            beam, token = divmod(place, vocab_size)
            if total == -torch.inf:
                break
            if state.ends(token) or length == limit:
                if rank < width:  # an end that is not among the best is none
                    score = (total / length**params.length_penalty).item()
                    done.append(Beam([*running[beam], token], total.item(), score))
            elif len(going) < width:
                going.append((beam, token, total))
        done = sorted(done, key=lambda beam: -beam.score)[:width]
        if not going:
            break
        running = [[*running[beam], token] for beam, token, _ in going]
        parents = [beam for beam, _, _ in going]
        scores_B = torch.stack([total for _, _, total in going])
        if len(done) == width and (scores_B[0] / length**params.length_penalty).item() <= done[-1].score:
            break
    return done[: params.n]


def _log_probs(logits_BV: Tensor, running: Sequence[list[int]], state: SamplingState) -> Tensor:
    """Log-probabilities of the next token of each beam, with what the request changes."""
    log_probs_BV = logits_BV.detach().float().log_softmax(-1).cpu()
    for beam, tokens in enumerate(running):
        if log_probs_BV[beam].isnan().any():
            raise no_token(logits_BV[beam])
        state.adjust_beam(log_probs_BV[beam].numpy(), len(tokens))
        if (log_probs_BV[beam] == -torch.inf).all() and len(running) == 1:
            raise no_token(log_probs_BV[beam])
    return log_probs_BV
