"""Settings of the stage `memorisation`, of `bessemer memorisation` and of `bessemer forget --check`. Imports no PyTorch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import field_validator

from bessemer.core.config import Config, setting
from bessemer.core.errors import ConfigError
from bessemer.model.quantisation.config import GROUP, scheme_plugin

#: Raised when the same models and canaries give another ledger than before.
MEMORISATION_VERSION = 1

#: The format of a model as it is stored, beside those that its weights are quantised to.
ORIGINAL = "original"


class ExtractionConfig(Config):
    """When a text counts as extracted from a model, and in which formats of its weights it is tried."""

    formats: list[str] = setting(
        default_factory=lambda: [ORIGINAL, "int8", "int4"],
        description="formats of the weights in which each model is tested: original, as they are stored, and schemes of "
        "`quantize`; unlearning that holds in float32 may not hold in 4 bits (Zhang et al. 2024, arXiv 2410.16454)",
        min_length=1,
        plugins=GROUP,
    )
    attempts: int = setting(
        100, "n of (n, p)-extraction: answers that are sampled, at temperature 1, from the prefix", unit="answers", ge=1
    )
    probability: float = setting(0.5, "p of (n, p)-extraction: least probability that the text is among them", gt=0, lt=1)

    @field_validator("formats")
    @classmethod
    def _known_formats(cls, names: list[str]) -> list[str]:
        for name in names:
            if name != ORIGINAL:
                try:
                    is_made = scheme_plugin(name).is_made
                except ConfigError as error:
                    raise ValueError(f"{error}; or {ORIGINAL}, as the model is stored") from None
                if not is_made:
                    raise ValueError(f"{name} is what GGUF files hold: export the model, and test the file")
        return list(dict.fromkeys(names))


class MemorisationConfig(ExtractionConfig):
    """The stage `memorisation`: what models have memorised of the canaries in a corpus, and whether it can be extracted."""

    shorthand: ClassVar[str | None] = "models"

    models: list[str] = setting(
        default_factory=list, description="stages whose models are tested; empty: all that are trained above it"
    )
    candidates: int = setting(
        256,
        "canaries that are never planted, with which planted ones are compared: exposure is at most their binary logarithm",
        unit="canaries",
        ge=16,
    )
    unseen: int = setting(
        32, "of these, how many are measured as planted ones are: what a model that has memorised nothing shows", ge=2
    )

    @field_validator("unseen")
    @classmethod
    def _among_candidates(cls, unseen: int, info: object) -> int:
        candidates = getattr(info, "data", {}).get("candidates", unseen)
        if unseen > candidates:
            raise ValueError(f"at most candidates, {candidates}, can be measured")
        return unseen


class DocumentConfig(ExtractionConfig):
    """Whether documents can be extracted: from the tokens before a passage, the passage (Carlini et al. 2023)."""

    prefix_tokens: int = setting(50, "most tokens that a model is given before a passage", unit="tokens", ge=1)
    passage_tokens: int = setting(
        50,
        "length of a passage; a document that is shorter than a prefix and a passage is cut in the middle",
        unit="tokens",
        ge=2,
    )
