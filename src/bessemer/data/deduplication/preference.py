"""Preference among copies: by licence, then by quality, then by the smallest id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.config import nearest
from bessemer.core.errors import ConfigError
from bessemer.data.corpus.reader import SCHEMA


@dataclass(frozen=True)
class Preference:
    """`licenses`: the best first; then come other stated ones, and last of all documents that state none.

    `quality`: score columns, asked one after the other; the highest is the best, of `-COLUMN` the lowest. A missing score is
    the worst.
    """

    licenses: Sequence[str] = ()
    quality: Sequence[str] = ()

    @property
    def columns(self) -> list[str]:
        """The documents' columns that decide."""
        return ["license", *(name.removeprefix("-") for name in self.quality)]

    def check(self, schema: pa.Schema) -> None:
        """Raises ConfigError for a quality that is no score of the documents."""
        scores = [
            field.name
            for field in schema
            if field.name not in SCHEMA.names and (pa.types.is_floating(field.type) or pa.types.is_integer(field.type))
        ]
        for name in self.columns[1:]:
            if name not in scores:
                raise ConfigError(f"deduplicate.keep.quality: the documents have no score {name!r}{nearest(name, scores)}")

    def keys(self, batch: pa.RecordBatch) -> np.ndarray:
        """For each document, (N, columns) float64, what it is compared by: smaller is better, column after column."""
        stated = batch.column("license")
        place = pc.fill_null(pc.index_in(stated, pa.array(self.licenses, stated.type)), len(self.licenses))
        unstated = pc.is_null(stated).to_numpy(zero_copy_only=False)
        keys = [place.to_numpy(zero_copy_only=False) + unstated]
        for name in self.quality:
            values = pc.fill_null(pc.cast(batch.column(name.removeprefix("-")), pa.float64()), np.nan)
            found = values.to_numpy(zero_copy_only=False)
            keys.append(np.where(np.isnan(found), np.inf, found if name.startswith("-") else -found))
        return np.column_stack(keys).astype(np.float64)
