"""Rewards that a model gives: a judge's rating, the criteria of a rubric that are met, the score of a trained reward model.

Shapes: N answers, B of a batch, T tokens of the longest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from bessemer.core.errors import ArtefactError, ConfigError, RequestError
from bessemer.model.decoder import Decoder
from bessemer.model.device import choose_device
from bessemer.model.storage.folder import load_model
from bessemer.posttraining.chat_models import model_place, open_chat_model
from bessemer.posttraining.data.encoding import encode_answer
from bessemer.posttraining.data.formats import Message, Turns, conversation_text
from bessemer.posttraining.rewards.config import JudgeReward, RewardContext, RewardFunction, RewardModelReward, RubricReward
from bessemer.posttraining.rewards.rule_based import texts_of
from bessemer.tasks.judge import Answered, Criterion, RubricJudge
from bessemer.tasks.judged import CriterionConfig
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
        # rotary frequencies of such a model depend on the length of the batch
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


GivenTurns = str | Sequence[Mapping[str, Any]]


def judge_reward(settings: JudgeReward, context: RewardContext) -> RewardFunction:
    """(rating − 1) / 4. A judgement that cannot be read is NaN: it fails, and is never guessed.

    Raises as `open_chat_model`.
    """
    ask = open_chat_model(settings.judge, context.folder).ask
    judge = RubricJudge(ask) if settings.criterion is None else RubricJudge(ask, criterion=settings.criterion)

    def reward(completions: Sequence[GivenTurns], prompts: Sequence[GivenTurns], **columns: Any) -> list[float | None]:
        return _read(judge.scores(_answered(completions, prompts, settings.reference, columns)))

    return reward


def rubric_reward(settings: RubricReward, context: RewardContext) -> RewardFunction:
    """Σ w·yes / Σ w of the criteria of the settings and of the prompt; None for a prompt without any. NaN as in `judge_reward`.

    Raises as `open_chat_model`.
    """
    ask = open_chat_model(settings.judge, context.folder).ask
    common = [_criterion(one) for one in settings.criteria]

    def reward(completions: Sequence[GivenTurns], prompts: Sequence[GivenTurns], **columns: Any) -> list[float | None]:
        answered = _answered(completions, prompts, settings.reference, columns)
        own = _column(columns, settings.column, len(answered))
        places: dict[tuple[Criterion, ...], list[int]] = {}
        for place, given in enumerate(own):
            places.setdefault((*common, *_criteria(given)), []).append(place)
        rewards: list[float | None] = [None] * len(answered)
        for criteria, of_these in places.items():
            if not criteria:
                continue
            scores = _read(RubricJudge(ask, criteria).scores([answered[place] for place in of_these]))
            for place, score in zip(of_these, scores, strict=True):
                rewards[place] = score
        return rewards

    return reward


def reward_model_reward(settings: RewardModelReward, context: RewardContext) -> RewardFunction:
    """The model's score at the end token, which a completion that was cut is given too.

    Raises ConfigError where there is no model, ArtefactError where it gives no score.
    """
    place = context.reward_model if settings.model is None else model_place(settings.model, context.folder)
    if place is None:
        raise ConfigError("reward_model: name the folder of its model; no stage above has made one")
    model = RewardModel.open(place)

    def reward(completions: Sequence[GivenTurns], prompts: Sequence[GivenTurns], **_: Any) -> list[float | None]:
        return list(model.score([_as_turns(prompt) for prompt in prompts], [_as_turns(one) for one in completions]))

    return reward


def _read(scores: Sequence[float | None]) -> list[float | None]:
    return [math.nan if score is None else score for score in scores]


def _answered(
    completions: Sequence[GivenTurns], prompts: Sequence[GivenTurns], reference: str | None, columns: Mapping[str, Any]
) -> list[Answered]:
    references = _column(columns, reference, len(completions))
    return [
        Answered(
            prompt if isinstance(prompt, str) else conversation_text([dict(one) for one in prompt]), text, str(right or "")
        )
        for prompt, text, right in zip(prompts, texts_of(completions), references, strict=True)
    ]


def _column(columns: Mapping[str, Any], name: str | None, count: int) -> Sequence[Any]:
    """A column of the data; nothing for each row where none is named. Raises ValueError for one that is not there."""
    if name is None:
        return [None] * count
    if name not in columns:
        raise ValueError(f"the data has no column {name!r}")
    values: Sequence[Any] = columns[name]
    return values


def _criteria(given: Any) -> list[Criterion]:
    """A row's own criteria. Raises ValueError for anything but a list of criteria."""
    if given is None:
        return []
    if not isinstance(given, list):
        raise ValueError(f"criteria must be a list of questions, they are {given!r}"[:200])
    return [_criterion(one if isinstance(one, str) else CriterionConfig.parse(one, "criteria")) for one in given]


def _criterion(given: CriterionConfig | str) -> Criterion:
    return Criterion(given) if isinstance(given, str) else Criterion(given.question, given.weight)


def _as_turns(given: GivenTurns) -> Any:
    return given if isinstance(given, str) else tuple(dict(message) for message in given)
