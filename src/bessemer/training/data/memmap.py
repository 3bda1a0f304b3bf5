"""Arrays that are made part by part and too large for memory: kept on disk, mapped, and made only once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike


def stored_arrays(
    folder: Path | None, key: str, dtypes: Mapping[str, DTypeLike], chunks: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays named in `dtypes`, of one dimension, each the chunks' parts in a row.

    With a folder they are files below `folder/key`, mapped; where that exists it is what the same chunks gave before, and
    `chunks` is not read. It appears whole, so that processes that make the same at once do not meet.
    """
    if folder is None:
        parts: dict[str, list[np.ndarray]] = {name: [np.empty(0, dtype)] for name, dtype in dtypes.items()}
        for chunk in chunks:
            for name, dtype in dtypes.items():
                parts[name].append(chunk[name].astype(dtype))
        return {name: np.concatenate(found) for name, found in parts.items()}
    place = folder / key
    if not place.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=folder))
        with ExitStack() as files:
            streams = {name: files.enter_context((unfinished / name).open("wb")) for name in dtypes}
            for chunk in chunks:
                for name, dtype in dtypes.items():
                    streams[name].write(np.ascontiguousarray(chunk[name], dtype).data)
        try:
            unfinished.rename(place)
        except OSError:
            if not place.is_dir():
                raise
            shutil.rmtree(unfinished)  # another process was faster
    return {name: _mapped(place / name, np.dtype(dtype)) for name, dtype in dtypes.items()}


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.stat().st_size:  # nothing can be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")
