"""The stage `ai_preferences`: pairs of answers with a model's preference, and how sure it is, to be learnt from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from bessemer.core.policy import Policy
from bessemer.core.progress import Progress, Silent
from bessemer.posttraining.chat_models.config import CUT_REASON
from bessemer.posttraining.constitution.answering import GivenAnswer, Speakers, answered
from bessemer.posttraining.constitution.comparison import Comparison, SoftLabel, mean_label, soft_labels
from bessemer.posttraining.constitution.config import AIPreferencesConfig
from bessemer.posttraining.constitution.drawing import drawn_principles
from bessemer.posttraining.constitution.prompts import Asked
from bessemer.posttraining.constitution.working import work_through
from bessemer.posttraining.formats import conversation_text

#: The file of pairs that `preference` and `reward` read.
PREFERENCES_FILE = "preferences.jsonl"
#: What is of no use to those who learn from a pair.
_INTERNAL = ("dropped", "place_bias", "consistent")
#: Distance from the least confidence that is rounding.
_ROUNDING = 1e-6


def ai_preferences(
    config: AIPreferencesConfig,
    model: Path,
    out: Path,
    *,
    seed: int,
    device: str = "auto",
    progress: Progress | None = None,
    folder: Path = Path(),
) -> dict[str, Any]:
    """Write pairs of answers of the model of a folder, or of the data, with a critic's preference; goes on behind the rows in
    `out`.

    Writes `preferences.jsonl` below `out`: {prompt, chosen, rejected, confidence}, the confidence being the probability that
    the critic gives the chosen answer, and beside it the principles and the critic. Files that the settings name are relative
    to `folder`. Returns the headline metrics, the critic's bias to a place among them. Raises SourceError for prompts that are
    malformed and where no pair is left, ConfigError for the policy and the critic, ApiError where a critic at a URL fails for
    good.
    """
    worked = work_through(
        config,
        model,
        out / PREFERENCES_FILE,
        partial(_compared_rows, config, seed),
        description="compare",
        unit="pairs",
        without_any="pairs has a preference",
        internal=_INTERNAL,
        seed=seed,
        device=device,
        progress=progress or Silent(),
        folder=folder,
    )
    kept = worked.kept
    judged = [row for row in worked.rows if row["place_bias"] is not None]
    return {
        "prompts": len(worked.rows),
        "pairs": len(kept),
        "dropped": worked.dropped,
        "reasons": worked.reasons,
        "mean_confidence": fmean(row["confidence"] for row in kept),
        "place_bias": fmean(row["place_bias"] for row in judged),
        "consistent_share": fmean(row["consistent"] for row in judged),
    }


def _compared_rows(
    config: AIPreferencesConfig, seed: int, speakers: Speakers, policy: Policy, asked: Sequence[Asked], rows: Sequence[int]
) -> list[dict[str, Any]]:
    chosen = [asked[row] for row in rows]
    answers = answered(speakers, chosen, rows, 2, seed)
    principles = policy.chosen_principles(config.principles)
    drawn = [drawn_principles(principles, seed, row, config.principles_per_pair) for row in rows]
    compared = {place: of_row for place, of_row in enumerate(answers) if not _not_comparable(of_row)}
    labels = soft_labels(
        speakers.critic,
        [
            Comparison(conversation_text(chosen[place].prompt), first.text, second.text, principles[name].comparison)
            for place, (first, second) in compared.items()
            for name in drawn[place]
        ],
    )
    each = config.principles_per_pair
    of_place = {place: mean_label(labels[number * each : (number + 1) * each]) for number, place in enumerate(compared)}
    critic = None if config.critic is None else config.critic.model
    return [
        {
            **_pair(chosen[place], answers[place], of_place.get(place), config.least_confidence),
            "principles": drawn[place],
            "critic": critic,
        }
        for place in range(len(chosen))
    ]


def _not_comparable(answers: Sequence[GivenAnswer]) -> str:
    """Why two answers are not shown to a critic; empty where they are."""
    first, second = answers
    if first.is_cut or second.is_cut:
        return CUT_REASON
    if first.text == second.text:
        return "the answers are the same"
    return "" if first.text.strip() and second.text.strip() else "an answer is empty"


def _pair(asked: Asked, answers: Sequence[GivenAnswer], label: SoftLabel | None, least: float) -> Mapping[str, Any]:
    first, second = (one.text for one in answers)
    readable = label is not None and label.readable
    probability = label.probability if label is not None and readable else 0.5
    confidence = max(probability, 1 - probability)
    dropped = ""
    if label is None:
        dropped = _not_comparable(answers)
    elif not readable:
        dropped = "the critic gave no letter"
    elif confidence <= least + _ROUNDING:
        dropped = "the critic is not sure enough"
    return {
        "prompt": list(asked.prompt),
        "chosen": first if probability >= 0.5 else second,
        "rejected": second if probability >= 0.5 else first,
        "confidence": confidence,
        "place_bias": label.place_bias if label is not None and readable else None,
        "consistent": label.consistent if label is not None and readable else None,
        "dropped": dropped,
    }
