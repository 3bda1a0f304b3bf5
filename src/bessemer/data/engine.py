"""The one place where Daft is loaded and where our pure functions on Arrow arrays become its columns."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from bessemer.data.documents import document_files

if TYPE_CHECKING:
    import daft

#: Rows that one call of a function gets: small enough to spread a modest corpus over all cores.
_ROWS_PER_CALL = 1024

Columns = Mapping[str, pa.DataType]


def load_daft() -> Any:
    """Import Daft with its telemetry, and that of what it loads, switched off: a corpus is nobody's business."""
    for name, value in {
        "DAFT_ANALYTICS_ENABLED": "0",
        "DAFT_PROGRESS_BAR": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
    }.items():
        os.environ.setdefault(name, value)
    import daft

    # A function's error reaches the caller as it is; the engine's own lines about it would only repeat it.
    logging.getLogger("daft_local_execution").setLevel(logging.CRITICAL)
    return daft


def read_documents(documents: Path) -> daft.DataFrame:
    """A lazy frame over a folder of documents."""
    paths = [str(part.absolute()) for part in document_files(documents)]
    return load_daft().read_parquet([re.sub(r"([*?\[\]{}])", r"[\1]", path) for path in paths])  # it takes paths for patterns


def with_columns(
    frame: daft.DataFrame,
    inputs: list[str],
    outputs: Columns,
    function: Callable[..., Mapping[str, pa.Array]],
) -> daft.DataFrame:
    """Add (or replace) the columns `outputs`, computed from the columns `inputs` by a pure function of Arrow arrays."""
    daft = load_daft()
    types = {name: daft.DataType.from_arrow_type(kind) for name, kind in outputs.items()}

    def apply(*columns: Any) -> pa.Array:
        found = function(*(_whole(column.to_arrow()) for column in columns))
        return pa.StructArray.from_arrays([_whole(found[name]).cast(kind) for name, kind in outputs.items()], list(outputs))

    scored = daft.func.batch(return_dtype=daft.DataType.struct(types), batch_size=_ROWS_PER_CALL)(apply)
    kept = [daft.col(name) for name in frame.column_names if name not in outputs]
    frame = frame.select(*kept, scored(*(daft.col(name) for name in inputs)).alias("_computed"))
    return frame.select(*kept, *(daft.col("_computed").get(name).alias(name) for name in outputs))


def batches(frame: daft.DataFrame, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Run a frame and stream its rows, in no particular order, with our column order and types."""
    for batch in frame.to_arrow_iter():
        columns = [_whole(batch.column(field.name)).cast(field.type) for field in schema]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _whole(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One array, with strings as we have them (Daft's are `large_string`)."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return column.cast(pa.string()) if pa.types.is_large_string(column.type) else column
