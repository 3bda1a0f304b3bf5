"""Memory-mapped arrays: computed once in chunks and kept on disk, for arrays larger than memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike


def memmapped_arrays(
    folder: Path | None, key: str, dtypes: Mapping[str, DTypeLike], chunks: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The one-dimensional arrays named in `dtypes`, each the concatenation of its chunks.

    With a folder they are memory-mapped files below `folder/key`; an existing one holds the same chunks, and `chunks` is not
    read. It is renamed into place when complete, so that several processes may compute it at once.
    """
    if folder is None:
        parts: dict[str, list[np.ndarray]] = {name: [np.empty(0, dtype)] for name, dtype in dtypes.items()}
        for chunk in chunks:
            for name, dtype in dtypes.items():
                parts[name].append(chunk[name].astype(dtype))
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}
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
            # another process was faster
            shutil.rmtree(unfinished)
    return {name: _mapped(place / name, np.dtype(dtype)) for name, dtype in dtypes.items()}


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.stat().st_size:
        # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")
