"""Presets of `select`: named limits of score columns, as the filters and edits declare them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bessemer.data.edits.registry import EDITS, OWN_EDITS, edit_plugin
from bessemer.data.filters.registry import FILTERS, OWN_FILTERS, PERPLEXITY, filter_plugin
from bessemer.data.plugins import Column, EditPlugin, FilterPlugin, Limit, limits_of
from bessemer.data.thresholds.languages import EVERY_LANGUAGE, MeantFor

#: Presets of several filters or of none; every other preset is the filter or edit of its name.
COMBINED: dict[str, tuple[str, ...]] = {"all": (), "gopher": ("gopher_repetition", "gopher_quality")}
#: The presets of Bessemer's own filters and edits.
OWN_PRESETS = (*COMBINED, *(plugin.name for plugin in (*OWN_FILTERS, *OWN_EDITS) if limits_of(plugin.columns)))

_OWN = {plugin.name for plugin in (*OWN_FILTERS, *OWN_EDITS)}
_OWN_COLUMNS = {name: column for plugin in (*OWN_FILTERS, *OWN_EDITS) for name, column in plugin.columns.items()} | PERPLEXITY


def preset_names() -> list[str]:
    """Every preset, then the filters and edits of other packages, of which those with limits are presets. None is loaded."""
    return [*OWN_PRESETS, *(name for names in (FILTERS, EDITS) for name in names if name not in _OWN)]


def is_preset(name: str) -> bool:
    """Whether there is a preset of this name."""
    return name in OWN_PRESETS or any(plugin.name == name and limits_of(plugin.columns) for plugin in _of_others(name))


def scores_of(name: str) -> tuple[str, ...]:
    """The scores that a preset needs, by their names in a recipe."""
    return COMBINED.get(name, (name,))


def preset(name: str) -> dict[str, Limit]:
    """The limits of a preset, by column. Raises ConfigError for a name that is none."""
    limits: dict[str, Limit] = {}
    for score in scores_of(name):
        limits |= limits_of((filter_plugin(score) if score in FILTERS else edit_plugin(score)).columns)
    return limits


def meant_for(column: str) -> MeantFor:
    """The languages for which a column's usual limit is meant; every one where its filter declares none."""
    declared = declared_column(column)
    return EVERY_LANGUAGE if declared is None else declared.languages


def by_language(column: str) -> Mapping[str, Limit]:
    """The usual limits of the languages that have another than the column's, as its filter declares them."""
    declared = declared_column(column)
    return {} if declared is None else declared.by_language


def declared_column(name: str) -> Column | None:
    """What the filter or edit that adds a column declares of it; None for a column of the user's own.

    Of other packages those filters and edits are asked with whose name the column begins.
    """
    if name in _OWN_COLUMNS:
        return _OWN_COLUMNS[name]
    return next((plugin.columns[name] for plugin in _of_others(name) if name in plugin.columns), None)


def _of_others(column: str) -> Iterator[FilterPlugin | EditPlugin]:
    """The filters and edits of other packages with whose name a column begins."""
    for name in FILTERS:
        if name not in _OWN and (column == name or column.startswith(f"{name}_")):
            yield filter_plugin(name)
    for name in EDITS:
        if name not in _OWN and (column == name or column.startswith(f"{name}_")):
            yield edit_plugin(name)
