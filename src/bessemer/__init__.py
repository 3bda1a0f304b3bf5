"""Bessemer makes a language model from raw text to a deployed assistant.

    import bessemer

    made = bessemer.run("quickstart")                    # a recipe: from text to a model, with a report
    engine = bessemer.Engine(made.folder / "model")      # or any model's folder, or a GGUF file
    print(engine.generate("The furnace")[0].text)

run             run a recipe, from raw text to a model
refine          clean, select and deduplicate an Arrow table of documents
extract         the main text of a web page
Engine          generate, score and embed text with a model, many requests at once
SamplingParams  how tokens are chosen, and when an answer ends
load_model      a model's folder as a PyTorch module
load_tokenizer  a model's or a tokenizer's folder as a tokenizer

Each is loaded on first use. The command line does the same and more: `bessemer --help`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bessemer.data.extraction.extract import extract
    from bessemer.inference.engine import Engine
    from bessemer.inference.sampling.sampler import SamplingParams
    from bessemer.model.storage.folder import load_model
    from bessemer.pipeline.api import refine, run
    from bessemer.tokenization.tokenizer import load_tokenizer

    __version__: str

#: The public API, each name with the module that it is loaded from on first use, and a package that this needs.
_PUBLIC = {
    "Engine": ("bessemer.inference.engine", "torch"),
    "SamplingParams": ("bessemer.inference.sampling.sampler", "torch"),
    "extract": ("bessemer.data.extraction.extract", "numba"),
    "load_model": ("bessemer.model.storage.folder", "torch"),
    "load_tokenizer": ("bessemer.tokenization.tokenizer", "tokenizers"),
    "refine": ("bessemer.pipeline.api", "pyarrow"),
    "run": ("bessemer.pipeline.api", "pydantic"),
}

__all__ = ["Engine", "SamplingParams", "__version__", "extract", "load_model", "load_tokenizer", "refine", "run"]


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that `import bessemer` alone loads none of the heavy libraries."""
    if name == "__version__":
        return _version()
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bessemer' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name][0]), name)


def _version() -> str:
    """The version of the installed package; of a checkout that is not installed, by git's tags."""
    from importlib import metadata

    try:
        return metadata.version("bessemer")
    except metadata.PackageNotFoundError:
        from bessemer.core.version import of_checkout

        return of_checkout()


def __dir__() -> list[str]:
    """The public names that this machine can load, for `help` and completion, which ask for each of them."""
    from importlib.util import find_spec

    loadable = [name for name, (_, package) in _PUBLIC.items() if find_spec(package) is not None]
    return sorted(["__version__", *loadable, *(name for name in globals() if name.startswith("__"))])
