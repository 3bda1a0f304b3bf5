"""The usual limits of the scores beyond rules, apart from what computes them: a recipe is checked without loading that."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bessemer.data.thresholds.presets import Limit

TOXICITY: dict[str, Limit] = {"toxicity_score": (None, 0.5), "toxicity_nsfw": (None, 0.5)}
SPAM: dict[str, Limit] = {"spam_score": (None, 0.5)}
MODEL_WRITTEN: dict[str, Limit] = {"model_written_score": (None, 0.5)}
URLS: dict[str, Limit] = {"urls_score": (None, 0.9)}
#: Counts of edits: documents in which there was any are dropped.
PERSONAL_DATA: dict[str, Limit] = {f"personal_data_{name}": (None, 0) for name in ("emails", "ips", "phones", "cards", "ibans")}
SECRETS: dict[str, Limit] = {f"secrets_{name}": (None, 0) for name in ("keys", "private_keys", "tokens", "passwords")}
#: MLCommons' categories by our names, with their numbers.
HAZARD_CATEGORIES = {
    "violent_crimes": "S1",
    "non_violent_crimes": "S2",
    "sex_crimes": "S3",
    "child_exploitation": "S4",
    "defamation": "S5",
    "specialized_advice": "S6",
    "privacy": "S7",
    "intellectual_property": "S8",
    "indiscriminate_weapons": "S9",
    "hate": "S10",
    "self_harm": "S11",
    "sexual_content": "S12",
    "elections": "S13",
    "code_interpreter_abuse": "S14",
}
HAZARDS: dict[str, Limit] = {f"hazards_{name}": (None, 0.6) for name in HAZARD_CATEGORIES}

#: Lowest probability of the language to keep a text in it.
USUAL_LANGUAGE_SCORE = 0.65
#: The same where the usual one is wrong by much: for languages of which the model is never sure, and those that it takes others
#: for. Measured on Django's translations (docs/scores.md).
LANGUAGE_SCORES = {
    "af": 0.35,
    "ast": 0.35,
    "br": 0.35,
    "ca": 0.35,
    "cs": 0.8,
    "cy": 0.35,
    "da": 0.85,
    "eo": 0.85,
    "es": 0.85,
    "et": 0.35,
    "eu": 0.35,
    "ga": 0.35,
    "gd": 0.35,
    "gl": 0.35,
    "hi": 0.8,
    "ia": 0.35,
    "is": 0.35,
    "kk": 0.35,
    "ky": 0.35,
    "mn": 0.35,
    "ne": 0.35,
    "nl": 0.9,
    "nn": 0.35,
    "pl": 0.75,
    "ru": 0.9,
    "sk": 0.35,
    "sl": 0.45,
    "sr": 0.7,
    "sw": 0.35,
    "tg": 0.35,
    "tk": 0.35,
    "tr": 0.8,
    "uz": 0.4,
    "vi": 0.9,
}
