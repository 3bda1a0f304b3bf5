"""A trained reward model: scores of answers, for choosing the best of several, as rewards in reinforcement learning.

Shapes: N answers, B of a batch, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch

from bessemer.core.errors import ArtefactError, RequestError
from bessemer.model.decoder import Decoder
from bessemer.model.device import choose_device
from bessemer.model.folder import load_model
from bessemer.posttraining.encoding import encode_answer
from bessemer.posttraining.formats import Message, Turns
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer

#: Tokens of a batch, padding included.
_TOKENS_AT_ONCE = 16_384


class RewardModel:
    """A decoder with a scalar head, and its tokenizer."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, *, tokens_at_once: int = _TOKENS_AT_ONCE) -> None:
        """tokens_at_once: of a batch. Raises ArtefactError for a model that gives no score, or several."""
        if model.config.num_scores != 1:
            raise ArtefactError(f"a reward model gives one score, and this model gives {model.config.num_scores}")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._tokens_at_once = tokens_at_once
        # whose frequencies depend on the length of the batch
        self._alone = model.config.rope_scaling.rope_type == "dynamic"

    @classmethod
    def open(cls, folder: Path | str, *, device: str = "auto", dtype: torch.dtype | None = None) -> Self:
        """The reward model of a folder. Raises ArtefactError where there is none."""
        model = load_model(folder, choose_device(device), dtype, scores=True)
        if not model.config.num_scores:
            raise ArtefactError(
                f"{folder}: a language model, which gives no scores; train a reward model with the stage reward"
            )
        return cls(model, load_tokenizer(Path(folder)))

    def score(self, prompts: Sequence[Turns], answers: Sequence[Turns], tools: Sequence[Message] = ()) -> list[float]:
        """The reward of each answer to its prompt, in messages or texts; a text that answers messages is the assistant's.

        A batch gives the scores that each answer has alone, to rounding. Raises RequestError for an answer that does not fit in
        the model's context, or cannot be rendered.
        """
        return self.score_tokens(
            [
                encode_answer(prompt, _turns(answer, prompt), self.tokenizer, tools).through_end()
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
        )

    @torch.no_grad()
    def score_tokens(self, sequences: Sequence[np.ndarray | Sequence[int]]) -> list[float]:
        """The score at the last token of each sequence: of a prompt and an answer, whose end token that is."""
        ids = [torch.as_tensor(np.asarray(sequence, np.int64)) for sequence in sequences]
        longest = self.model.config.max_position_embeddings
        for number, one in enumerate(ids, start=1):
            if not 1 <= len(one) <= longest:
                raise RequestError(f"answer {number} has {len(one):,} tokens with its prompt; the model reads 1 to {longest:,}")
        scores = [0.0] * len(ids)
        for chosen in self._batches([len(one) for one in ids]):
            # padding on the right: no token attends to what follows it
            tokens_BT = torch.nn.utils.rnn.pad_sequence([ids[index] for index in chosen], batch_first=True)
            hidden_BTD = self.model.hidden(tokens_BT.to(self.model.device))
            ends_B = torch.tensor([len(ids[index]) - 1 for index in chosen], device=hidden_BTD.device)
            last_B1D = hidden_BTD.gather(1, ends_B[:, None, None].expand(-1, 1, hidden_BTD.shape[-1]))
            for index, score in zip(chosen, self.model.scores(last_B1D).flatten().tolist(), strict=True):
                scores[index] = score
        return scores

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of sequences by batch, the longest first, so that batches hold little padding."""
        batches: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            if batches and not self._alone and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= self._tokens_at_once:
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches


def _turns(answer: Turns, prompt: Turns) -> Turns:
    if isinstance(answer, str) and not isinstance(prompt, str):
        return ({"role": "assistant", "content": answer},)
    return answer
