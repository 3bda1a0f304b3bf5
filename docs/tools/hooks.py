"""What MkDocs calls while it builds the site: generated pages, pages that lie outside docs/, marks taken out, pages as text.

Pages are written for readers on a code host as well. Three things are made good for the site: comments that mark tables of
benchmarks are taken out, a list may follow a line without a blank one between, and formulas between dollar signs become MathML,
which browsers draw without scripts or fonts. Beside each page lies its Markdown (`data.md` beside `data.html`), and `llms.txt`
lists them all, for programs that read (llmstxt.org).
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
ROOT_PAGES = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "third-party.md": "THIRD-PARTY.md",
}
_FENCE = re.compile(r"^(```.*?^```[^\S\n]*$)", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"<!-- (?:table|figure|end|not run|needs)\b[^>]*-->\n?")
_FORMULA = re.compile(r"(?<![\\$`\w])\$(?=\S)([^$\n`]+?)(?<=\S)\$(?!\w)")
#: Of each page its title and text, in the order of the navigation.
_TEXTS: dict[str, tuple[str, str]] = {}
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
    """The text of a page as Python-Markdown reads it; code stays as it is. What it says is kept for `on_post_build`."""
    _TEXTS[page.file.src_uri] = (page.title, without_marks(markdown))
    for name, source in ROOT_PAGES.items():
        markdown = markdown.replace(f"](../{source})", f"]({name})")
    return "".join(part if part.startswith("```") else for_the_site(part) for part in _FENCE.split(markdown))


def _taken_out(text: str) -> str:
    return _MARK.sub(lambda mark: "" if not mark[0].endswith("\n") or "figure" in mark[0] else "\n", text)


def for_the_site(text: str) -> str:
    """Text between code blocks without marks, with blank lines before lists, and with formulas as MathML."""
    text = _FORMULA.sub(lambda formula: latex2mathml.converter.convert(formula[1]), _taken_out(text))
    lines: list[str] = []
    for line in text.split("\n"):
        before = lines[-1] if lines else ""
        if _LIST_ITEM.match(line) and before.strip() and not _LIST_ITEM.match(before) and not before.startswith((" ", "\t")):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def without_marks(markdown: str) -> str:
    """A page as it was written, without its marks, and with links to pages of the project's root as the site has them."""
    for name, source in ROOT_PAGES.items():
        markdown = markdown.replace(f"](../{source})", f"]({name})")
    return "".join(part if part.startswith("```") else _taken_out(part) for part in _FENCE.split(markdown))


def on_post_build(config: MkDocsConfig) -> None:
    """Write the pages as Markdown, and their list."""
    site = Path(config.site_dir)
    for name, (_, text) in _TEXTS.items():
        if name == "reference/api.md":
            text = reference.api_text()
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text, encoding="utf-8")
    about = _lines_of((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    titles = {name: title for name, (title, _) in _TEXTS.items()}
    (site / "llms.txt").write_text(llms_txt(config.nav or [], titles, about, str(config.site_description)), encoding="utf-8")


def _lines_of(index: str) -> dict[str, str]:
    """What the list of all pages says of each, by file. Of several pages in a row each has its part, between semicolons."""
    found: dict[str, str] = {}
    for pages, words in re.findall(r"^\| (\[.*?\)) \| (.+?) \|$", index.partition("## All pages")[2], re.MULTILINE):
        names = re.findall(r"\]\(([\w/.-]+\.md)\)", pages)
        parts = words.split("; ")
        for place, name in enumerate(names):
            found.setdefault(name, parts[place] if len(parts) == len(names) else words)
    return found


def llms_txt(nav: list[Any], titles: dict[str, str], about: dict[str, str], description: str) -> str:
    """The list of pages for programs that read: a heading a section of the navigation, a line a page."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for entry in nav:
        for section, pages in entry.items():
            inner = [{section: pages}] if isinstance(pages, str) else pages
            sections.setdefault("Home" if isinstance(pages, str) else section, []).extend(
                (title, name) for page in inner for title, name in page.items()
            )
    lines = ["# Bessemer", "", f"> {description}", ""]
    for section, pages in sections.items():
        lines += [f"## {section}", ""]
        for title, name in pages:
            if name in titles:
                lines.append(f"- [{title}]({name})" + (f": {about[name]}" if name in about else ""))
        lines.append("")
    return "\n".join(lines)
