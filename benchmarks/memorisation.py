"""What a small model memorises of canaries, before and after deduplication and unlearning, in three formats of its weights.

    python benchmarks/memorisation.py                  # the recipe `memorisation`: ten minutes of one core
    python benchmarks/memorisation.py --runs FOLDER    # keep the runs there; what has been made is not made again

The recipe plants canaries among the standard library's documentation: random texts of 32 words, of which 8 are asked for, 1 to
64 times, exactly or with a tenth of the words replaced in every copy but one; four draws of each. One model is trained on all
of it, one on what exact and near deduplication leave, and the first unlearns by NPO. Every model is tested with its weights as
they are, in int8 and in int4. Checked are the claims of the page: extraction grows with the number of copies, near-copies
count, deduplication brings it down, and after unlearning exposure is at most that of canaries never planted and a bit. Each is
said to hold or not to. The first three compare two cells of four canaries by intervals of 95 % that have to be apart: Wilson's
of the shares extracted, and beside them those of mean exposure, which end at the 7 bits of 127 candidates: four draws that all
reach the end say little of a mean.

How much a near-copy counts: with the mean nats of the suffix after k near-copies, and at which number e of exact copies they
are the same (interpolated in log₂), (e − 1) / (k − 1).

Nothing is timed, so other work may run. Result: `memorisation.json`.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import recording
from bessemer.core.store import Artefact, read_json
from bessemer.data.corpus.reader import iterate_documents
from bessemer.data.sources.canaries import NUMBER, planted_canaries
from bessemer.pipeline.api import run
from bessemer.safety.memorisation.stage import canaries_in
from bessemer.safety.memorisation.verdict import FORGOTTEN_BITS, is_forgotten

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/safety/memorisation",
    "src/bessemer/data/sources/canaries.py",
    "src/bessemer/recipes/memorisation.yaml",
    "src/bessemer/posttraining/preference/objective.py",
)

LABELS = {
    "pretrain": "all of the text",
    "deduplicated": "deduplicated text",
    "unlearned": "all of the text, then NPO",
}


def cells(entry: Mapping[str, Any], kind: str) -> dict[int, Mapping[str, Any]]:
    """The figures of a kind of canary by the number of its copies."""
    return {cell["repetitions"]: cell for cell in entry["by"] if cell["kind"] == kind}


def worth_of_near_copies(entry: Mapping[str, Any]) -> dict[str, float | None]:
    """(e − 1) / (k − 1) by k, as the docstring says; None where no number of exact copies gives as many nats."""
    exact = [(math.log2(copies), cell["nats"]) for copies, cell in cells(entry, "exact").items()]
    worth: dict[str, float | None] = {}
    for copies, cell in cells(entry, "near").items():
        worth[str(copies)] = None
        for (low, more), (high, less) in pairwise(exact):
            if more >= cell["nats"] >= less and more > less:
                equal = 2 ** (low + (high - low) * (more - cell["nats"]) / (more - less))
                worth[str(copies)] = (equal - 1) / (copies - 1)
                break
    return worth


def wilson(hits: int, number: int) -> tuple[float, float]:
    """Wilson's interval of 95 % of a share."""
    z, share = 1.96, hits / number
    centre, half = share + z * z / (2 * number), z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return (centre - half) / (1 + z * z / number), (centre + half) / (1 + z * z / number)


def extracted(cell: Mapping[str, Any]) -> tuple[float, float]:
    """The interval of the share of a cell's canaries that are extracted."""
    return wilson(cell["extracted"], cell["canaries"])


def exposure(cell: Mapping[str, Any]) -> tuple[float, float]:
    """The interval of a cell's mean exposure, bits."""
    return cell["exposure"][1], cell["exposure"][2]


def claims(models: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    """Whether each claim holds, of the models in their first format but for those that name one."""
    exact, near = (cells(models["pretrain"]["original"], kind) for kind in ("exact", "near"))
    exact_left, near_left = (cells(models["deduplicated"]["original"], kind) for kind in ("exact", "near"))
    most = max(exact)
    held = {}
    for name, interval in (("extraction", extracted), ("exposure", exposure)):
        (exact_low, _), (near_low, _) = interval(exact[most]), interval(near[most])
        once_high = interval(exact[1])[1]
        held |= {
            f"{name}_grows_with_copies": exact_low > once_high,
            f"{name}_grows_with_near_copies": near_low > once_high,
            f"{name}_of_exact_copies_falls_by_deduplication": exact_low > interval(exact_left[most])[1],
            f"{name}_of_near_copies_falls_by_deduplication": near_low > interval(near_left[most])[1],
        }
    return held | {f"forgotten_in_{weights}": is_forgotten(entry) for weights, entry in models["unlearned"].items()}


def by_copies(models: Mapping[str, Mapping[str, Any]]) -> list[Sequence[Any]]:
    """Rows: kind and number of copies, then mean exposure and extracted canaries of every model as it is stored."""
    first = models["pretrain"]["original"]["by"]
    rows: list[Sequence[Any]] = []
    for place, cell in enumerate(first):
        row: list[Any] = [cell["kind"], cell["repetitions"]]
        for entries in models.values():
            there = entries["original"]["by"][place]
            row += [there["exposure"][0], f"{there['extracted']} of {there['canaries']}"]
        rows.append(row)
    return rows


def by_format(models: Mapping[str, Mapping[str, Any]]) -> list[Sequence[Any]]:
    """Rows: model and format, what was extracted, exposure of planted and of unseen canaries, and their difference."""
    return [
        [
            LABELS[name],
            weights,
            f"{entry['extraction']['extracted']} of {entry['extraction']['planted']}",
            entry["exposure"]["planted"][0],
            entry["exposure"]["unseen"][0],
            entry["exposure"]["excess"][1:],
            entry["least_likely_share"],
            "extraction succeeds" if entry["extraction"]["succeeds"] else "forgotten" if is_forgotten(entry) else "known",
        ]
        for name, entries in models.items()
        for weights, entry in entries.items()
    ]


def bits_per_byte(stage: Path) -> float | None:
    """The last validation of a training, in bits per byte; None where it has none."""
    found = read_json(stage / "manifest.json", "manifest")["metrics"].get("bits_per_byte")
    return None if found is None else float(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = arguments.runs or Path(scratch)
        made = run("memorisation", runs=runs, name="memorisation")
        stages = {one.stage.name: one.artefact for one in made.made}
        usual = run("memorisation", {"deduplicate": ["exact", "minhash"]}, runs=runs, name="usual", until="deduplicate")
        report(stages, usual.made[-1].artefact.folder)


def copies_left(documents: Path) -> dict[str, int]:
    """Copies of canaries in a corpus, by kind."""
    settings, _, _ = canaries_in(documents)
    kinds = {str(canary.number): canary.kind for canary in planted_canaries(settings)}
    counts: Counter[str] = Counter({"exact": 0, "near": 0})
    for batch in iterate_documents(documents, ["metadata"]):
        for entries in batch.column("metadata").to_pylist():
            if (number := dict(entries or ()).get(NUMBER)) is not None:
                counts[kinds[number]] += 1
    return dict(counts)


def report(stages: Mapping[str, Artefact], usual: Path) -> None:
    """Write the result of a finished run. usual: the corpus that deduplication with its defaults leaves."""
    ledger = read_json(stages["memorisation"].folder / "ledger.json", "ledger")
    metrics = stages["memorisation"].manifest["metrics"]
    models = ledger["models"]
    held = claims(models)
    figures = {
        "planted": metrics["planted"],
        "copies": metrics["copies"],
        "candidates": ledger["candidates"],
        "attempts": ledger["attempts"],
        "probability": ledger["probability"],
        "forgotten_bits": FORGOTTEN_BITS,
        "documents": {name: stages[name].manifest["metrics"]["documents_out"] for name in ("collect", "deduplicate")},
        "copies_left": {
            "collected": copies_left(stages["collect"].folder / "documents"),
            "usual": copies_left(usual / "documents"),
            "deduplicated": copies_left(stages["deduplicate"].folder / "documents"),
        },
        "bits_per_byte": {name: bits_per_byte(stages[name].folder) for name in ("pretrain", "deduplicated")},
        "dtypes": {name: stages[name].manifest["metrics"].get("dtype") for name in LABELS},
        "models": models,
        "worth_of_near_copies": worth_of_near_copies(models["pretrain"]["original"]),
        "claims": held,
    }
    for name, holds in held.items():
        print(f"{name}: {'holds' if holds else 'DOES NOT HOLD'}")
    copies = [("", ""), ("copies", ",d")]
    for name in models:
        copies += [(f"{LABELS[name]}: exposure, bits", ".1f"), ("extracted", "")]
    formats = [
        *(("trained on", ""), ("weights", ""), ("extracted", ""), ("exposure, bits", ".2f"), ("never planted", ".2f")),
        *(("difference, 95 %", "+.2f"), ("among the least likely eighth", ".0%"), ("", "")),
    ]
    recording.save(
        "memorisation",
        figures,
        tables={
            "copies": recording.table(copies, by_copies(models)),
            "formats": recording.table(formats, by_format(models)),
        },
    )


if __name__ == "__main__":
    sys.exit(main())
