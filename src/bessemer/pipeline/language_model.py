"""Hands a model of ours to the data stages, which know none: they may run on machines without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bessemer.core.errors import ConfigError

if TYPE_CHECKING:
    from bessemer.data.filters.perplexity import BitsPerByte


def open_language_model(folder: Path, device: str = "auto") -> BitsPerByte:
    """From texts to bits per byte under the model of a folder.

    Raises ConfigError on a machine that lacks what models need, ArtefactError where the folder holds none.
    """
    try:
        from bessemer.evaluation.perplexity import open_document_scorer
    except ImportError as error:
        raise ConfigError(
            f"clean.perplexity: {folder} is a model for PyTorch, and the package {error.name} is missing on this machine: "
            "pip install 'bessemer[train]'"
        ) from None
    return open_document_scorer(folder, device).bits_per_byte
