"""The refinery's stages on prompts and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from bessemer.data.stages.refine import refine


@dataclass(frozen=True)
class Refined:
    """What is left of texts, by their numbers, and why the others are not."""

    kept: Mapping[int, str]
    reasons: Mapping[int, str]


def refined(texts: Sequence[str], stages: Mapping[str, Any], folder: Path) -> Refined:
    """Texts through stages of the refinery. Of copies the one with the smallest number stays. Raises ConfigError."""
    if not texts or not stages:
        return Refined(dict(enumerate(texts)), {})
    # ids in the order of the texts
    ids = [f"{number:032x}" for number in range(len(texts))]
    encodable = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    kept, rejected = refine(pa.table({"id": ids, "text": encodable}), stages, folder=folder)

    def numbered(table: pa.Table, column: str) -> dict[int, str]:
        return {int(row["id"], 16): row[column] for row in table.select(["id", column]).to_pylist()}

    return Refined(numbered(kept, "text"), numbered(rejected, "reason"))
