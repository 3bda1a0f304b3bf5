"""Texts with the fields of a row in braces: `Question: {query}`; `{{` is a brace."""

from __future__ import annotations

from string import Formatter
from typing import Annotated

from pydantic import AfterValidator

from bessemer.core.records import Record


def _parts(text: str) -> list[tuple[str, str | None]]:
    """(literal text, name of the field behind it) in turn. Raises ValueError for anything else in braces."""
    parts = []
    for literal, name, spec, conversion in Formatter().parse(text):
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise ValueError(f"braces hold the name of a field, not {name!r}; write {{{{ for a brace")
        parts.append((literal, name))
    return parts


def _checked(text: str) -> str:
    _parts(text)
    return text


#: A setting that is a template.
Template = Annotated[str, AfterValidator(_checked)]


def fill(template: str, record: Record) -> str:
    """The template with a row's fields. Raises ArtefactError where the row lacks one."""
    return "".join(literal + (record.text(name) if name is not None else "") for literal, name in _parts(template))
