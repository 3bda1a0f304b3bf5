"""What MkDocs calls while it builds the site: generated pages, pages that lie outside docs/, and marks taken out.

Pages are written for readers on a code host as well. Three things are made good for the site: comments that mark tables of
benchmarks are taken out, a list may follow a line without a blank one between, and formulas between dollar signs become MathML,
which browsers draw without scripts or fonts.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import reference

ROOT = Path(__file__).resolve().parents[2]
#: Pages of the site that lie at the project's root, where code hosts look for them.
ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "security.md": "SECURITY.md"}
_FENCE = re.compile(r"^(```.*?^```[^\S\n]*$)", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"<!-- (?:table|figure|end|not run|needs)\b[^>]*-->\n?")
_FORMULA = re.compile(r"(?<![\\$`\w])\$(?=\S)([^$\n`]+?)(?<=\S)\$(?!\w)")
_LIST_ITEM = re.compile(r"\s*(?:[-*+]|\d+\.) ")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and those of the project's root."""
    for name, make in reference.PAGES.items():
        files.append(File.generated(config, name, content=make()))
    for name, source in ROOT_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=linked_from_the_site(text)))
    return files


def linked_from_the_site(text: str) -> str:
    """A page of the project's root with the links that it has as a page of the site; examples are no pages."""
    for name, source in ROOT_PAGES.items():
        text = text.replace(f"]({source})", f"]({name})")
    text = re.sub(r"\[([^\]]*)\]\(examples/[^)]*\)", r"\1", text)
    return re.sub(r"\]\(docs/", "](", text)


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """The text of a page as Python-Markdown reads it; code stays as it is."""
    for name, source in ROOT_PAGES.items():
        markdown = markdown.replace(f"](../{source})", f"]({name})")
    return "".join(part if part.startswith("```") else for_the_site(part) for part in _FENCE.split(markdown))


def for_the_site(text: str) -> str:
    """Text between code blocks without marks, with blank lines before lists, and with formulas as MathML."""
    text = _MARK.sub(lambda mark: "" if not mark[0].endswith("\n") or "figure" in mark[0] else "\n", text)
    text = _FORMULA.sub(lambda formula: latex2mathml.converter.convert(formula[1]), text)
    lines: list[str] = []
    for line in text.split("\n"):
        before = lines[-1] if lines else ""
        if _LIST_ITEM.match(line) and before.strip() and not _LIST_ITEM.match(before) and not before.startswith((" ", "\t")):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)
