"""Quantisation schemes that the setting `scheme` may name: our own, and those of other packages. Imports no PyTorch.

An implementation is a class of `schemes.base.Scheme`. Another package adds one by an entry point of the group
`bessemer.quantisation`, whose object is a `SchemePlugin`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bessemer.core.errors import ConfigError
from bessemer.core.registry import Plugin, Registry

if TYPE_CHECKING:
    from bessemer.model.quantisation.schemes.base import Scheme

#: Entry points of other packages' schemes.
GROUP = "bessemer.quantisation"

_SCHEMES = "bessemer.model.quantisation.schemes"


@dataclass(frozen=True)
class SchemePlugin(Plugin["type[Scheme]"]):
    """settings_read: of the stage's settings, those that it heeds. is_calibrated: whether gptq and awq can choose its codes,
    which are then an `IntegerScheme`'s. for_ends: whether the setting `head` may name it."""

    settings_read: tuple[str, ...] = ()
    is_calibrated: bool = False
    for_ends: bool = True


SCHEMES: Registry[type[Scheme]] = Registry(
    "scheme",
    GROUP,
    [
        SchemePlugin(
            "int8",
            "weights of 8 bits, a scale for each output",
            f"{_SCHEMES}.int8:Int8",
            settings_read=("group_size", "search_clip"),
            is_calibrated=True,
        ),
        SchemePlugin(
            "int4",
            "weights of 4 bits, a scale for each group of inputs",
            f"{_SCHEMES}.int4:Int4",
            settings_read=("group_size", "symmetric", "search_clip"),
            is_calibrated=True,
        ),
        SchemePlugin(
            "w8a8",
            "as int8, and activations become int8 row by row",
            f"{_SCHEMES}.w8a8:W8A8",
            settings_read=("search_clip",),
            is_calibrated=True,
            for_ends=False,
        ),
    ],
)


def scheme_plugin(name: str) -> SchemePlugin:
    """The declaration of a scheme, ours or another package's. Raises ConfigError when there is none."""
    plugin = SCHEMES.find(name)
    if not isinstance(plugin, SchemePlugin):
        raise ConfigError(f"the entry point {name!r} of {GROUP} is not a SchemePlugin")
    return plugin


def first_scheme(ask: Callable[[type[Scheme]], Scheme | None]) -> Scheme | None:
    """What the first scheme's class that knows an answer gives, ours before others; None where none does."""
    return next((found for plugin in SCHEMES.values() if (found := ask(plugin.load())) is not None), None)
