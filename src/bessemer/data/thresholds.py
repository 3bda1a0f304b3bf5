"""Which scores a document needs to be kept: named presets of limits per score column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module

#: Lowest and highest score that is kept, both inclusive; None is no limit.
Limit = tuple[float | None, float | None]


@dataclass(frozen=True)
class Languages:
    """Which languages are kept, none named means every one, and the lowest probability at which a document is in its language.

    `lowest` holds the languages whose probability is another than the `usual` one; None is no limit.
    """

    kept: tuple[str, ...] = ()
    usual: float | None = None
    lowest: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.kept or self.lowest) or self.usual is not None


_LIMITS = "bessemer.data.filters.limits"
_SCORES = "bessemer.data.filters.score_limits"

#: The limits that make up a preset, as (module, constant). Filters are not loaded to check a recipe: their limits lie apart.
PRESETS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "all": (),
    "gopher": ((_LIMITS, "GOPHER_REPETITION"), (_LIMITS, "GOPHER_QUALITY")),
    "gopher_quality": ((_LIMITS, "GOPHER_QUALITY"),),
    "gopher_repetition": ((_LIMITS, "GOPHER_REPETITION"),),
    "c4": ((_LIMITS, "C4"),),
    "fineweb": ((_LIMITS, "FINEWEB"),),
    "code": ((_LIMITS, "CODE"),),
    "spam": ((_SCORES, "SPAM"),),
    "toxicity": ((_SCORES, "TOXICITY"),),
    "model_written": ((_SCORES, "MODEL_WRITTEN"),),
    "hazards": ((_SCORES, "HAZARDS"),),
    "urls": ((_SCORES, "URLS"),),
    "personal_data": ((_SCORES, "PERSONAL_DATA"),),
    "secrets": ((_SCORES, "SECRETS"),),
}


#: The scores of which a preset has limits, where they are not called as it is.
_SCORES_OF = {"all": (), "gopher": ("gopher_repetition", "gopher_quality")}


def scores_of(name: str) -> tuple[str, ...]:
    """The scores that a preset needs, by their names in a recipe."""
    return _SCORES_OF.get(name, (name,))


def preset(name: str) -> dict[str, Limit]:
    """The limits of a preset, by column. Raises KeyError for a name that `PRESETS` does not have."""
    limits: dict[str, Limit] = {}
    for module, constant in PRESETS[name]:
        limits |= getattr(import_module(module), constant)
    return limits
