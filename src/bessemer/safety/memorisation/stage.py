"""The stage `memorisation`: finds the canaries in a corpus, and tests what models have memorised of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.core.stage import StageContext
from bessemer.core.store import write_json, write_text
from bessemer.data.corpus.reader import TRAIN, iterate_documents
from bessemer.data.corpus.remote import documents_of
from bessemer.data.sources.canaries import NUMBER, SETTINGS, Canary, planted_canaries, settings_in, unseen_canaries
from bessemer.data.sources.registry import CanariesSource
from bessemer.safety.memorisation.config import MemorisationConfig
from bessemer.safety.memorisation.ledger import CANARIES, LEDGER, ledger_of


def canaries_in(documents: Path) -> tuple[CanariesSource, list[Canary], int]:
    """The settings of the canaries in a corpus, those of which it has a copy to train on, and the number of all their copies.

    Raises SourceError for a corpus without canaries, and for one with canaries of different settings.
    """
    counts: Counter[int] = Counter()
    settings: CanariesSource | None = None
    described: set[str] = set()
    for batch in iterate_documents(documents, ["metadata"], TRAIN):
        for entries in batch.column("metadata").to_pylist():
            metadata = dict(entries or ())
            if NUMBER in metadata:
                counts[int(metadata[NUMBER])] += 1
                if metadata[SETTINGS] not in described:
                    described.add(metadata[SETTINGS])
                    settings = settings_in(metadata)
    if settings is None:
        raise SourceError(f"{documents}: no canary is among the documents; add {{source: canaries}} to collect")
    if len(described) > 1:
        raise SourceError(f"{documents}: it holds canaries of {len(described)} sources; give one that has all of them")
    return settings, [canary for canary in planted_canaries(settings) if counts[canary.number]], counts.total()


def write_canaries(path: Path, canaries: Sequence[Canary]) -> None:
    """Write a file that `read_canaries` reads."""
    write_text(path, "".join(json.dumps(canary.record, ensure_ascii=False) + "\n" for canary in canaries))


def memorisation(context: StageContext) -> dict[str, Any]:
    """Test models, and write `ledger.json` and `canaries.jsonl`; returns the former.

    Inputs: `model:STAGE`, and the `documents` that the canaries were planted in. Raises SourceError as `canaries_in`.
    """
    config: MemorisationConfig = context.config
    documents = documents_of(context)
    assert documents is not None, "it is needed"
    settings, planted, copies = canaries_in(documents)
    unseen = unseen_canaries(settings, config.candidates)
    models = {role.removeprefix("model:"): path for role, path in context.inputs.items() if role.startswith("model:")}
    ledger = ledger_of(models, planted, unseen, config, device=context.device, progress=context.progress)
    write_canaries(context.out / CANARIES, [*planted, *unseen])
    write_json(context.out / LEDGER, ledger)
    return {"planted": len(planted), "copies": copies, **ledger}
