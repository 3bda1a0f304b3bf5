"""Declarations of the deduplication methods. Pure Python: a recipe is checked without the methods' code."""

from __future__ import annotations

from bessemer.core.errors import ConfigError
from bessemer.core.registry import Registry
from bessemer.data.deduplication.config import MinHashConfig, PassagesConfig, SemanticConfig
from bessemer.data.plugins import MethodFunction, MethodPlugin

_CODE = "bessemer.data.deduplication.methods"

OWN_METHODS = (
    MethodPlugin("exact", "documents with the same text", f"{_CODE}:exact"),
    MethodPlugin("url", "documents of the same address", f"{_CODE}:url"),
    MethodPlugin("minhash", "near duplicates (Broder 1997)", f"{_CODE}:minhash", MinHashConfig, section="minhash"),
    MethodPlugin("lines", "lines that stand in an earlier document", f"{_CODE}:lines", PassagesConfig, section="passages"),
    MethodPlugin(
        "paragraphs", "paragraphs that stand in an earlier document", f"{_CODE}:paragraphs", PassagesConfig, section="passages"
    ),
    MethodPlugin(
        "sentences", "runs of sentences that stand elsewhere too", f"{_CODE}:sentences", PassagesConfig, section="passages"
    ),
    MethodPlugin(
        "substrings", "long runs of words that stand elsewhere too", f"{_CODE}:substrings", PassagesConfig, section="passages"
    ),
    MethodPlugin(
        "semantic", "documents about the same (Abbas et al. 2023)", f"{_CODE}:semantic", SemanticConfig, section="semantic"
    ),
)
METHODS: Registry[MethodFunction] = Registry("method", "bessemer.deduplication", OWN_METHODS)


def method_plugin(name: str) -> MethodPlugin:
    """The declaration of a method, ours or another package's. Raises ConfigError when there is none."""
    plugin = METHODS.find(name)
    if not isinstance(plugin, MethodPlugin):
        raise ConfigError(f"the entry point {name!r} of {METHODS.group} is not a MethodPlugin")
    return plugin
