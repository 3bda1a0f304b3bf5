"""Which scores a document needs to be kept: named presets of limits per score column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

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


@dataclass(frozen=True)
class MeantFor:
    """The languages, as ISO 639 codes, for which a limit is meant: `only` some, or every one `but` some."""

    only: tuple[str, ...] = ()
    but: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is a language for which it is not meant."""
        return bool(self.only or self.but)

    def holds_for(self, languages: pa.Array) -> pa.Array:
        """Which documents, by their languages, it is for. One whose language nobody knows is judged by all limits."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not self:
            return pa.repeat(pa.scalar(True), len(languages))
        named = pc.is_in(languages, pa.array(self.only or self.but, pa.string()))
        return pc.or_(pc.is_null(languages), named if self.only else pc.invert(named))


EVERY_LANGUAGE = MeantFor()

_LIMITS = "bessemer.data.thresholds.rule_limits"
_SCORES = "bessemer.data.thresholds.score_limits"

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


def meant_for(column: str) -> MeantFor:
    """The languages for which a column's usual limit is meant; every one where its rule says nothing."""
    found: Mapping[str, MeantFor] = import_module(_LIMITS).MEANT_FOR
    return found.get(column, EVERY_LANGUAGE)
