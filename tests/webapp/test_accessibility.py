"""Every page and what opens in it, as axe sees it: no fault, in light and dark, wide and narrow."""

from __future__ import annotations

import json
from importlib import resources

import pytest
from fastapi.testclient import TestClient

from bessemer.posttraining.labelling import ANSWERS, Labels
from bessemer.webapp.labelling import create_label_app
from tests.cases import slow
from tests.serving.engine import FakeEngine

_RUN = """async (themes) => {
    const found = [];
    for (const theme of themes) {
        document.documentElement.dataset.theme = theme;
        const ending = document.getAnimations().filter((one) => one.effect.getComputedTiming().iterations < Infinity);
        await Promise.allSettled(ending.map((one) => one.finished));
        const { violations } = await axe.run(document, { resultTypes: ["violations"] });
        const nodes = (one) => one.nodes.slice(0, 3).map((node) => node.html.slice(0, 160));
        found.push(...violations.map((one) => [theme, one.id, one.help, nodes(one)]));
    }
    return found;
}"""


def faults(page, themes=("light", "dark")) -> list:
    """What axe finds, of any impact, in the themes."""
    source = (resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
    page.evaluate(source + ";0")
    return page.evaluate(_RUN, list(themes))


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
    ("path", "do", "width"),
    [("", chat, 1280), slow("", chat, 400), slow("xray", xray, 1280), slow("xray", xray, 400), ("api", None, 400)],
    ids=["chat", "chat narrow", "xray", "xray narrow", "api"],
)
def test_a_page_has_no_fault(page, start, path, do, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(f"{start()}/{path}")
    page.wait_for_load_state("networkidle")
    if do:
        do(page)
    found = faults(page)
    assert not found, "\n".join(map(str, found))


@pytest.mark.slow
def test_a_page_that_asks_for_a_key_and_one_without_models_have_no_fault(page, start):
    page.goto(start(served=FakeEngine(), api_key="secret"))
    page.wait_for_selector("#key-dialog[open]")
    found = faults(page)
    assert not found, "\n".join(map(str, found))
    page.keyboard.press("Escape")
    page.wait_for_selector("#welcome .failure")
    found = faults(page)
    assert not found, "\n".join(map(str, found))
    page.wrong[:] = [line for line in page.wrong if "401" not in line]


@pytest.mark.chromium("it has no button for its theme, and Firefox is given none from outside")
@pytest.mark.slow
def test_the_page_of_labels_has_no_fault(page, tmp_path):
    item = {"id": "id0", "messages": [{"role": "user", "content": "Question?"}], "answers": ["one", "two"]}
    (tmp_path / ANSWERS).write_text(json.dumps(item) + "\n", encoding="utf-8")
    client = TestClient(create_label_app(Labels(tmp_path), tmp_path), base_url="http://localhost:8001")
    for scheme in ("light", "dark"):
        page.goto("about:blank")
        page.emulate_media(color_scheme=scheme)
        page.set_content(client.get("/").text)
        assert faults(page, [scheme]) == []


@pytest.mark.chromium("it has no button for its theme, and Firefox is given none from outside")
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_the_report_file_has_no_fault(page, tmp_path, width):
    pytest.importorskip("matplotlib")
    from bessemer.views.report import render_report
    from tests.views.sample_run import sample_run

    path = tmp_path / "report.html"
    path.write_text(render_report(sample_run()), encoding="utf-8")
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(path.as_uri())
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    assert page.locator("section").count() > 5
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = faults(page, [scheme])
        assert not found, "\n".join(map(str, found))


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
