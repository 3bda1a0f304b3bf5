"""The site: it builds strictly and offline, its references are complete, and its pages ask no other machine for anything.

By default its pages are looked at as they are written; the build, a quarter of a minute, is slow, and `make docs` does it too.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "tools"))

import reference
import terminal

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the built site."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Loaded(HTMLParser):
    """Addresses that a browser loads for a page: scripts, styles, images, frames; not those that a reader may follow."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video") or (tag == "link" and given.get("rel") != "canonical"):
            self.addresses += [value for name in ("src", "href") if (value := given.get(name))]


@pytest.mark.slow
def test_no_page_loads_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert [address for address in loaded.addresses if re.match(r"(https?:)?//", address)] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.slow
def test_tables_of_benchmarks_are_tables_of_the_site(site):
    text = (site / "data.html").read_text(encoding="utf-8")
    assert "<!-- table" not in text and "<!-- figure" not in text
    assert text.count("<table>") >= (ROOT / "docs" / "data.md").read_text(encoding="utf-8").count("<!-- table")


@pytest.mark.slow
def test_every_page_lies_there_as_markdown_too_and_a_list_leads_to_all(site):
    pages = {path.relative_to(site).with_suffix(".md").as_posix() for path in site.rglob("*.html") if path.name != "404.html"}
    listed = re.findall(r"^- \[[^\]]+\]\(([^)]+)\)", (site / "llms.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(listed) == pages and len(listed) == len(pages)
    for name in pages:
        text = (site / name).read_text(encoding="utf-8")
        assert text.lstrip().startswith(("#", "<a", "---")) and "<!-- figure" not in text and "<!-- table" not in text, name
    assert "### Engine.generate" in (site / "reference" / "api.md").read_text(encoding="utf-8")


def test_the_list_for_programs_that_read_has_a_line_for_each_page_of_the_navigation():
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    import hooks

    about = hooks._lines_of(
        "## All pages\n\n| page | |\n|---|---|\n| [a](a.md), [b](b.md) | one; two |\n| [c](d/c.md) | x; y |\n"
    )
    assert about == {"a.md": "one", "b.md": "two", "d/c.md": "x; y"}
    nav = [{"Home": "index.md"}, {"Some": [{"A": "a.md"}, {"C": "d/c.md"}, {"Gone": "gone.md"}]}]
    made = hooks.llms_txt(nav, {"index.md": "Home", "a.md": "A", "d/c.md": "C"}, about, "What it is")
    assert (
        made
        == "# Bessemer\n\n> What it is\n\n## Home\n\n- [Home](index.md)\n\n## Some\n\n- [A](a.md): one\n- [C](d/c.md): x; y\n"
    )


@pytest.mark.slow
def test_formulas_are_mathml(site):
    assert "<math" in (site / "scheduling.html").read_text(encoding="utf-8")


PAGES = sorted(ROOT.joinpath("docs").rglob("*.md"))
_FENCE = re.compile(r"^( *)(```+).*?^\1\2[^\S\n]*$", re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


@cache
def anchors(page: Path) -> set[str]:
    """The addresses within a page: of its headings as the site makes them, and those that it names itself."""
    slugify = pytest.importorskip("pymdownx.slugs", reason="the extra docs is not installed").slugify(case="lower")
    text = prose(page)
    headings = re.findall(r"^#+ +(.+?) *#*$", text, flags=re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "") for heading in headings]
    return {slugify(heading, "-") for heading in plain} | set(re.findall(r'id="([^"]+)"', text))


def test_links_to_a_place_within_a_page_lead_there():
    for page in PAGES:
        for name, anchor in re.findall(r"\]\(([\w./-]+\.md)?#([\w-]+)\)", prose(page)):
            target = (page.parent / name).resolve() if name else page
            if target.is_file():
                assert anchor in anchors(target), f"{page.name}: {name}#{anchor}"


def test_no_page_as_it_is_written_loads_anything_from_elsewhere():
    for page in PAGES:
        loaded = Loaded()
        loaded.feed(re.sub(r"`[^`\n]*`", "", prose(page)))
        addresses = loaded.addresses + re.findall(r"!\[[^\]]*\]\(([^)\s]+)", prose(page))
        assert [address for address in addresses if re.match(r"(https?:)?//", address)] == [], page
    assert "  font: false" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_marks_of_tables_are_taken_out_and_formulas_become_mathml():
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    import hooks

    assert hooks.for_the_site("<!-- table speed -->\n| a |\n|---|\n<!-- end -->\nas\n- one") == "\n| a |\n|---|\n\nas\n\n- one"
    assert hooks.for_the_site("a share of $1/n$, or `$HOME`").startswith("a share of <math")
    assert "<math" in hooks.for_the_site((ROOT / "docs" / "scheduling.md").read_text(encoding="utf-8"))


def test_every_command_and_option_is_in_the_reference():
    import typer

    from bessemer.cli.main import app

    page = reference.cli_page()
    for name, command in reference.leaf_commands(typer.main.get_command(app)):
        section = re.search(rf"^### bessemer {name} .*?(?=^###? |\Z)", page, flags=re.DOTALL | re.MULTILINE)
        assert section is not None, name
        for parameter in (one for one in command.params if not getattr(one, "hidden", False)):
            assert f"`{reference.shown_name(parameter)}`" in section[0], f"{name}: {parameter.name}"


def test_every_setting_of_every_stage_is_in_the_reference():
    from bessemer.pipeline.stages import STAGES

    page = reference.settings_page()
    for name, spec in STAGES.items():
        section = re.search(rf"^## {name}\n.*?(?=^## )", page, flags=re.DOTALL | re.MULTILINE)[0]
        table = section.partition("\n### ")[0]
        for setting, field in spec.config.model_fields.items():
            assert re.search(rf"^\| `{setting}`", table, flags=re.MULTILINE), f"{name}.{setting}"
            assert field.description and len(field.description) > 3, f"{name}.{setting} has no description"


def test_links_within_the_settings_lead_to_a_section():
    page = reference.settings_page()
    headings = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ ([\w -]+)$", page, flags=re.MULTILINE)}
    anchors = re.findall(r'<a id="([\w-]+)"></a>', page)
    assert set(re.findall(r"\]\(#([\w-]+)\)", page)) <= headings | set(anchors)
    assert len(anchors) == len(set(anchors))


def test_the_settings_of_a_checkout_are_those_of_the_code():
    made = reference.settings_page().splitlines()
    assert reference.SETTINGS.read_text(encoding="utf-8").splitlines() == made, "python docs/tools/reference.py writes it anew"


def test_the_reference_of_the_api_names_what_is_public():
    import bessemer

    page = reference.api_page()
    assert all(f".{name}\n" in page for name in bessemer.__all__ if not name.startswith("_"))


PICTURES = sorted((ROOT / "docs" / "images").glob("*.svg"))


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_a_picture_is_small_and_needs_nothing_else(path):
    text = path.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert len(text.encode()) < 300_000
    assert "<script" not in text and not re.search(r"(?:src|href|url\()=?[\"'(]?https?://", text)


def test_a_recording_becomes_frames_and_a_moving_picture():
    pytest.importorskip("pyte", reason="the extra docs is not installed")
    typed = [terminal.Event(0, 0.0, "$ l"), terminal.Event(0, 0.1, "s"), terminal.Event(0, 0.2, "\r\n")]
    printed = [terminal.Event(0, 0.3, "\x1b[31mred\x1b[0m 1%"), terminal.Event(0, 100.2, "\r\x1b[2K\x1b[31mred\x1b[0m 99%\r\n")]
    shown = terminal.frames([*typed, *printed], [10.0])
    assert shown[-1].time == pytest.approx(10.2)  # a hundred seconds in ten, and the typing
    assert [run.text for run in shown[-1].rows[1]] == ["red", " 99%"]
    svg = terminal.picture(shown, "a & b")
    ElementTree.fromstring(svg)
    assert "@keyframes" in svg and "a &amp; b" in svg and "prefers-reduced-motion" in svg
    assert "@keyframes" not in terminal.picture(shown[-1:], "still")


def test_a_command_is_recorded_with_what_is_typed_into_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "print(input('name> ')[::-1])"
    step = {"run": f"{shlex.quote(sys.executable)} -c {json.dumps(code)}", "answers": [{"after": "name> ", "type": "steel"}]}
    text = "".join(event.text for event in terminal.record([step]))
    assert "name> steel" in text and "leets" in text


def test_a_command_that_fails_is_no_recording():
    with pytest.raises(ChildProcessError, match="exit code 3"):
        list(terminal.record([{"run": "exit 3"}]))
