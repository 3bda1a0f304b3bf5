"""Canaries: random texts that are planted in a corpus a known number of times, to measure what a model memorises.

A canary is a run of words, each drawn evenly from a list, so that nothing but its copies in the corpus makes it likely (Carlini
et al. 2019, "The secret sharer"). It is asked for by its *prefix*, and what may be memorised is the rest, its *suffix*. It
stands in the corpus 1 to 64 times: *exact*, every time the same, or *near*, once as it is and otherwise with some of its words
replaced (Shilov et al. 2024, "Mosaic memory", arXiv 2405.15523). Canaries with higher numbers than those planted are never
planted: they are the candidates that a planted one is compared with.

A canary is a function of the settings and its number, and every planted document carries both in its metadata, so
the corpus alone says what to ask a model for.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import derive_seed
from bessemer.core.progress import Progress
from bessemer.data.sources.registry import CanariesSource
from bessemer.data.sources.source import Document, PositionedDocument, Tally, Unit, counted

#: Metadata of a planted document: the number of its canary, and the settings of them all.
NUMBER, SETTINGS = "canary", "canaries"
#: Group of all planted documents. Its hash lies in the training split for any `validation_share` up to 0.8.
GROUP = "canary"
Kind = Literal["exact", "near", "unseen"]

#: 256 short words that any tokenizer of English has seen.
_WORDS = """
able acid aged also arch area army away baby back ball band bank base bath bear beat bell belt bend bird blue boat body bone
book boot born both bowl brave bread brick bring broad brown brush build burn bush busy cake calm camp card care cart case cash
cave chain chair cheap chest chief child city claim class clean clear climb clock cloth cloud coal coast coat cold cook cool
copper corn cost count court cover crop cross crowd crown dance dark dawn deep deer desk dirt dish door down dream dress drink
drive dry duck dust early earth east edge eight empty enemy even event face fair farm fast field fight fire fish flag flat floor
flow fold food foot forest form four free fresh front fruit full game garden gate gift girl glass goat gold good grain grand
grass gray green ground group grow guard guest hair half hall hand happy harvest hard head heat heavy hill hold hole home honey
hope horse hotel hour house hunt idea inch iron island jacket join judge juice jump keep kind king kitchen knife lady lake lamp
land large last late laugh leaf learn left lemon letter level light lion list long loud lunch magic mail main march mark market
meal metal milk mind mirror moon morning mother mouth music narrow neck nest night noise north ocean offer old open orange order
oven paint palm paper park party path pencil piano place plain plant plate poem point porch queen quiet rabbit rain river road
rope salt
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Canary:
    """number: among those of its settings. kind, repetitions: how it was planted; unseen ones were not. cluster: the draw that
    it belongs to, which holds one canary of every kind and number of repetitions."""

    number: int
    prefix: str
    suffix: str
    kind: Kind = "unseen"
    repetitions: int = 0
    cluster: int = 0

    @property
    def text(self) -> str:
        """The whole canary."""
        return self.prefix + self.suffix

    @property
    def record(self) -> dict[str, Any]:
        """As a JSON object, which `read_canaries` reads."""
        return {
            "prefix": self.prefix,
            "suffix": self.suffix,
            "kind": self.kind,
            "repetitions": self.repetitions,
            "cluster": self.cluster,
        }


def vocabulary(settings: CanariesSource) -> Sequence[str]:
    """The words that canaries are made of."""
    return settings.vocabulary or _WORDS


def planted_canaries(settings: CanariesSource) -> list[Canary]:
    """The canaries that the source plants, in the order of their numbers: draw by draw, exact ones before near ones."""
    kinds: tuple[Kind, ...] = ("exact", "near") if settings.replaced else ("exact",)
    wanted = [
        (cluster, kind, repetitions)
        for cluster in range(settings.draws)
        for kind in kinds
        for repetitions in settings.repetitions
        if kind == "exact" or repetitions > 1
    ]
    return [_canary(settings, number, kind, repetitions, cluster) for number, (cluster, kind, repetitions) in enumerate(wanted)]


#: Numbers from which canaries are kept while others are unlearnt: beyond those that planted ones are compared with.
_ALIKE = 1 << 20


def unseen_canaries(settings: CanariesSource, count: int) -> list[Canary]:
    """Canaries of the same kind that are never planted, each a cluster of its own."""
    return _unseen(settings, len(planted_canaries(settings)), count)


def alike_canaries(settings: CanariesSource, count: int) -> list[Canary]:
    """Others that are never planted either, for a model to keep while it unlearns those that were."""
    return _unseen(settings, _ALIKE, count)


def _unseen(settings: CanariesSource, first: int, count: int) -> list[Canary]:
    return [_canary(settings, number, "unseen", 0, number) for number in range(first, first + count)]


def _canary(settings: CanariesSource, number: int, kind: Kind, repetitions: int, cluster: int) -> Canary:
    draw = random.Random(derive_seed(settings.seed, "canary", number))
    words = draw.choices(vocabulary(settings), k=settings.words)
    place = settings.words - settings.suffix_words
    return Canary(number, " ".join(words[:place]), " " + " ".join(words[place:]), kind, repetitions, cluster)


def copies(settings: CanariesSource, canary: Canary) -> Iterator[str]:
    """The texts that are planted for a canary: the first is the canary, and of a near one the others are near-copies, in which
    the same number of words at places of their own is replaced."""
    known, words = vocabulary(settings), canary.text.split(" ")
    replaced = max(1, round(settings.replaced * len(words)))
    yield canary.text
    for copy in range(1, canary.repetitions):
        if canary.kind == "exact":
            yield canary.text
            continue
        draw = random.Random(derive_seed(settings.seed, "near-copy", canary.number, copy))
        near = list(words)
        for place in draw.sample(range(len(words)), replaced):
            near[place] = draw.choice([word for word in known if word != words[place]])
        yield " ".join(near)


@dataclass(frozen=True)
class Canaries:
    """The planted documents, as one unit."""

    settings: CanariesSource

    def units(self, progress: Progress | None = None) -> list[Unit]:
        return [Unit("canaries", 0)]

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        yield from counted(self._documents, start, tally)

    def _documents(self, tally: Tally) -> Iterator[Document]:
        described = json.dumps(self.settings.model_dump(), ensure_ascii=False, sort_keys=True)
        for canary in planted_canaries(self.settings):
            for copy, text in enumerate(copies(self.settings, canary)):
                metadata = {NUMBER: str(canary.number), SETTINGS: described}
                yield Document(f"{canary.number}/{copy}", text, group=GROUP, metadata=metadata)

    def fingerprint(self) -> Any:
        return None


def open_canaries(settings: CanariesSource, folder: Path, cache: Path) -> Canaries:
    """The source `canaries`."""
    return Canaries(settings)


def settings_in(metadata: Mapping[str, str]) -> CanariesSource | None:
    """The settings that a document's metadata carry; None for a document that is no canary."""
    described = metadata.get(SETTINGS)
    return None if described is None else CanariesSource.model_validate(json.loads(described))


def read_canaries(path: Path) -> list[Canary]:
    """Canaries of a file of JSON lines: `prefix`, `suffix`, `repetitions` (0: never planted), and perhaps `kind` and `cluster`.

    Raises ArtefactError for a file or a line that is none of this, and ConfigError for one without canaries of either kind.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from None
    canaries = [_read_line(line, number, path) for number, line in enumerate(lines, start=1) if line.strip()]
    planted = sum(canary.repetitions > 0 for canary in canaries)
    if not planted or planted == len(canaries):
        wanted = "planted ones" if not planted else "canaries with repetitions 0, with which planted ones are compared"
        raise ConfigError(f"{path}: it holds no {wanted}")
    return canaries


def _read_line(line: str, number: int, path: Path) -> Canary:
    place = f"{path}:{number}"
    try:
        row = json.loads(line)
    except ValueError:
        raise ArtefactError(f"{place}: is not JSON") from None
    if not isinstance(row, dict) or not all(
        isinstance(row.get(name), str) and row[name].strip() for name in ("prefix", "suffix")
    ):
        raise ArtefactError(f"{place}: a canary has a prefix and a suffix, both texts")
    repetitions: Any = row.get("repetitions")
    cluster: Any = row.get("cluster", number)
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in (repetitions, cluster)):
        raise ArtefactError(f"{place}: repetitions, and cluster if there is one, are whole numbers from 0")
    kind: Any = row.get("kind", "exact") if repetitions else "unseen"
    if kind not in ("exact", "near", "unseen"):
        raise ArtefactError(f"{place}: kind is exact or near, not {kind!r}")
    return Canary(number, row["prefix"], row["suffix"], kind, repetitions, cluster)
