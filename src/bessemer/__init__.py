"""Bessemer makes a language model from raw text to a deployed assistant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bessemer.data.extraction.extract import extract
    from bessemer.inference.engine import Engine
    from bessemer.inference.sampling.sampler import SamplingParams
    from bessemer.model.folder import load_model
    from bessemer.pipeline.api import refine, run
    from bessemer.tokenization.tokenizer import load_tokenizer

#: The public API, each name with the module that it is loaded from on first use.
_PUBLIC = {
    "Engine": "bessemer.inference.engine",
    "SamplingParams": "bessemer.inference.sampling.sampler",
    "extract": "bessemer.data.extraction.extract",
    "load_model": "bessemer.model.folder",
    "load_tokenizer": "bessemer.tokenization.tokenizer",
    "refine": "bessemer.pipeline.api",
    "run": "bessemer.pipeline.api",
}

__all__ = ["Engine", "SamplingParams", "__version__", "extract", "load_model", "load_tokenizer", "refine", "run"]


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that `import bessemer` alone loads none of the heavy libraries."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bessemer' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
