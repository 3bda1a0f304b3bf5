"""Beam search: the likeliest completions that keeping several beginnings finds.

Tokens and scores are those of `transformers.generate(num_beams=…)` with `early_stopping=False`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bessemer.inference.sampling.sampler import SamplingState, no_token

# Shapes: B beams, V vocabulary, C candidates.


@dataclass(frozen=True)
class Beam:
    """A completion, its end token included; `log_prob` is the sum over its tokens, `score` what it is ranked by."""

    tokens: list[int]
    log_prob: float
    score: float


class BeamSearch:
    """The n best completions of at most `limit` tokens, by the request's `beam_width` and `length_penalty`.

    Until it is `finished`, the caller computes the logits after each of `sequences` and gives them to `advance`; `best` are
    then the completions.

    Each step continues all beams by all tokens and keeps the best by the sum of log-probabilities: those that end, or reach
    the limit, are done with a score of `sum / length ** length_penalty`; the best others go on. It is finished when
    `beam_width` are done and the best one in flight, scored at its present length, is no better than the worst of them.

    Biases and bans are added to the log-probabilities, as in `transformers`. `state` stays as it is.
    """

    def __init__(self, prompt: Sequence[int], state: SamplingState, limit: int) -> None:
        assert state.params.beam_width > 0 and limit > 0, (state.params.beam_width, limit)
        self.finished = False
        #: Of each of `sequences`, which of the step before it continues by its last token; -1 of the prompt.
        self.parents = [-1]
        self._prompt = list(prompt)
        self._state = state
        self.limit = limit
        self._running: list[list[int]] = [[]]
        self._totals_B = torch.zeros(1)
        self._done: list[Beam] = []

    @property
    def sequences(self) -> list[list[int]]:
        """The beams in flight, prompt included; at first the prompt alone."""
        return [[*self._prompt, *tokens] for tokens in self._running]

    @property
    def best(self) -> list[Beam]:
        """The completions that are done, best first, at most n."""
        return self._done[: self._state.params.n]

    def ends(self, beam: Beam) -> bool:
        """Whether a beam ended at an end token, and not at the limit."""
        return self._state.ends(beam.tokens[-1])

    def advance(self, logits_BV: Tensor) -> None:
        """Take one step. logits_BV: float32, after each of `sequences`.

        Raises RequestError when the logits are not finite or nothing may be chosen.
        """
        params, width = self._state.params, self._state.params.beam_width
        length = len(self._running[0]) + 1
        # enough that, whatever ends among them, `width` are left to go on with
        kept = max(2, 1 + len(self._state.end_tokens)) * width
        totals_BV = _log_probs(logits_BV, self._running, self._state) + self._totals_B[:, None]
        vocab_size = totals_BV.shape[-1]
        values_C, places_C = totals_BV.flatten().topk(min(kept, totals_BV.numel()))
        going: list[tuple[int, int, Tensor]] = []
        ranked = zip(places_C.tolist(), values_C, strict=True)
        for rank, (place, total) in enumerate(ranked):
            beam, token = divmod(place, vocab_size)
            if total == -torch.inf:
                break
            if self._state.ends(token) or length == self.limit:
                # an end that is not among the best is none
                if rank < width:
                    score = (total / length**params.length_penalty).item()
                    self._done.append(Beam([*self._running[beam], token], total.item(), score))
            elif len(going) < width:
                going.append((beam, token, total))
        self._done = sorted(self._done, key=lambda beam: -beam.score)[:width]
        if not going:
            self.finished = True
            return
        self._running = [[*self._running[beam], token] for beam, token, _ in going]
        self.parents = [beam for beam, _, _ in going]
        self._totals_B = torch.stack([total for _, _, total in going])
        hoped = (self._totals_B[0] / length**params.length_penalty).item()
        self.finished = len(self._done) == width and hoped <= self._done[-1].score


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
