"""Every page, as axe sees it: no fault that is serious or worse, in light and dark, wide and narrow."""

from __future__ import annotations

from importlib import resources

import pytest

from tests.cases import slow


def faults(page) -> list[str]:
    """What axe finds that is serious or critical."""
    source = (resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
    page.evaluate(source + ";0")
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {one['help']}: {[node['html'][:120] for node in one['nodes'][:3]]}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]


def chat(page):
    page.fill("#prompt", "the end")
    page.evaluate("document.querySelector('[name=max_tokens]').value = 6; document.querySelector('[name=seed]').value = 3")
    page.press("#prompt", "Enter")
    page.click("article.assistant:not(.working) >> text=Tokens")
    page.wait_for_selector("#token-lens table")
    page.click("#show-settings")


def xray(page):
    page.fill("[name=text]", "the end of the line")
    page.click("text=Look inside")
    page.wait_for_selector("#without")


@pytest.mark.parametrize(
    ("path", "do", "scheme"),
    [
        ("", chat, "dark"),
        slow("xray", xray, "light"),
        ("api", None, "light"),
        slow("", chat, "light"),
        slow("xray", xray, "dark"),
    ],
    ids=["chat dark", "xray light", "api", "chat light", "xray dark"],
)
def test_a_page_has_no_serious_fault(page, start, path, do, scheme):
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.goto(f"{start()}/{path}")
    page.wait_for_load_state("networkidle")
    if do:
        do(page)
    assert faults(page) == []


def test_a_token_that_shows_nothing_has_a_name(page, start):
    url = start()
    page.goto(url)
    pieces = ["\r", "\x00", " ", "\u200b", " \n", " a", ""]
    names = page.evaluate(f"pieces => import('{url}/static/page.js').then(page => pieces.map(page.nameOfBlank))", pieces)
    assert names == ["U+000D", "U+0000", "·", "U+200B", "·↵", None, "∅"]


def test_sliders_have_the_names_that_stand_beside_them(page, start):
    page.goto(start())
    page.click("#show-settings")
    # the value in the label is its first element with a name of its own, and would take the label
    for name in ("Temperature", "Top p", "Min p"):
        assert page.get_by_role("slider", name=name).first.is_visible()
