"""Bounded XML parsing: no entities are expanded, no DTD and no network is read, and trees stay within libxml's limits."""

from __future__ import annotations

from typing import Any

from lxml import etree


def parse_xml(data: bytes, *, forgiving: bool = True) -> Any:
    """The root element of a document or fragment. Raises ValueError when there is none, or it is nested too deeply.

    `forgiving` reads on over mistakes as browsers do. An entity that a document defines for itself stays what it is, so
    that a few bytes cannot expand to gigabytes.
    """
    parser = etree.XMLParser(
        resolve_entities=False,
        load_dtd=False,
        no_network=True,
        huge_tree=False,
        recover=forgiving,
        remove_comments=True,
        remove_pis=True,
    )
    try:
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as error:
        raise ValueError(f"not XML ({error})") from None
    if root is None:
        raise ValueError("not XML (no element found)")
    return root


def local_name(element: Any) -> str:
    """An element's name without its namespace; `` for comments, entities and the like."""
    tag = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def children(element: Any, name: str) -> list[Any]:
    """The direct children with this local name."""
    return [child for child in element if local_name(child) == name]


def descendant_text(element: Any, name: str) -> str | None:
    """The text of the first descendant with this local name, stripped; None where there is none with text."""
    for found in element.iter():
        if local_name(found) == name and (text := "".join(found.itertext()).strip()):
            return text
    return None
