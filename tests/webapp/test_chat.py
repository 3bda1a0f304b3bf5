"""The chat page in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bessemer.core.records import json_lines
from tests.cases import slow
from tests.serving.engine import FakeEngine

ANSWER = "article.assistant:not(.working) .below button"
# The highlighter is loaded when the first block of code is drawn: its colours come after the text.
COLOURED = "article.assistant pre code span[class^=hljs]"


def ask(page, text):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def opened(page, url):
    page.goto(url)
    page.wait_for_selector("[name=model] option", state="attached")
    page.evaluate("document.querySelector('[name=max_tokens]').value = 12; document.querySelector('[name=seed]').value = 3")


@pytest.mark.chromium("Playwright is told of no download there")
def test_a_conversation_is_asked_edited_branched_kept_and_taken_elsewhere(page, start, tmp_path):
    url = start(web={"feedback": tmp_path / "said", "suggestions": ["the end"]})
    opened(page, url)
    page.click("text=the end")
    page.wait_for_selector(ANSWER)
    first = page.inner_text("article.assistant .text")
    assert first and "tokens" in page.inner_text(".facts-of-answer")

    page.click("article.assistant >> text=Again")
    page.wait_for_selector("article.assistant:not(.working) .place >> text=2 / 2")
    page.get_by_role("button", name="Good", exact=True).click()
    page.click("article.assistant >> text=Edit")
    page.fill("article.assistant textarea", "As it should be")
    page.get_by_role("button", name="Keep", exact=True).click()
    page.wait_for_selector("text=3 / 3")
    page.get_by_role("button", name="Earlier branch").click()
    page.get_by_role("button", name="Earlier branch").click()
    assert page.inner_text("article.assistant .text") == first

    page.click("article.user >> text=Edit")
    page.fill("article.user textarea", "the thin")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_selector("article.user .place >> text=2 / 2")
    page.wait_for_selector(ANSWER)
    page.reload()
    page.wait_for_selector("article.user >> text=the thin")
    page.get_by_role("button", name="Earlier branch").first.click()
    page.wait_for_selector("article.user >> text=the end")

    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    kept = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))["conversations"]
    assert len(kept) == 1 and len(kept[0]["nodes"]) == 6
    page.once("dialog", lambda dialog: dialog.accept())
    page.hover("#conversations li")
    page.get_by_role("button", name="Delete").click()
    page.wait_for_selector("text=Nothing said yet.")
    page.set_input_files("#import-file", download.value.path())
    page.wait_for_selector("article.user >> text=the end")
    page.fill("#search", "no such thing")
    page.wait_for_selector("text=Nothing found.")
    page.fill("#search", "THE END")
    page.wait_for_selector("#conversations button.open")

    rows = json_lines((tmp_path / "said" / "pairs.jsonl").read_text(encoding="utf-8"))
    assert (
        rows[0]["prompt"] == [{"role": "user", "content": "the end"}] and rows[0]["chosen"][0]["content"] == "As it should be"
    )
    assert json.loads((tmp_path / "said" / "labels.jsonl").read_text(encoding="utf-8"))["label"] is True


def test_stop_stops_the_server_and_keys_work(page, start, engine):
    def babble(_):
        while True:
            yield "word "

    endless = FakeEngine(babble, context_length=10**9)
    opened(page, start(served=endless))
    page.evaluate("document.querySelector('[name=max_tokens]').value = ''")
    ask(page, "go on")
    while len(page.inner_text("article.assistant .text")) < 200:
        page.wait_for_timeout(20)
    page.keyboard.press("Escape")
    page.wait_for_selector("text=stopped")
    assert endless.stopped.wait(timeout=10)
    page.keyboard.press("Alt+n")
    page.wait_for_selector("#welcome")


def test_this_token_opens_and_another_one_goes_on(page, start):
    opened(page, start())
    ask(page, "the end")
    page.wait_for_selector(ANSWER)
    page.get_by_role("button", name="Tokens").click()
    page.wait_for_selector("#token-lens table")
    page.locator(".tokens.pressable button").nth(3).click()
    page.wait_for_selector("text=/token 4 of/")
    page.get_by_role("button", name="Look", exact=True).click()
    page.wait_for_selector(".looked-at span")
    before = page.locator(".tokens.pressable button").all_inner_texts()[:3]
    page.locator("#token-numbers dd").nth(3).wait_for()
    page.locator(".sliders input").nth(2).fill("1")
    page.wait_for_selector("#token-numbers dd >> text=/^1 of/")
    page.locator(".alternatives button:not([disabled])").first.click()
    page.wait_for_selector("article.assistant:not(.working) .place >> text=2 / 2")
    page.get_by_role("button", name="Tokens").click()
    page.wait_for_selector(".tokens.pressable")
    assert page.locator(".tokens.pressable button").all_inner_texts()[:3] == before


def test_two_answers_stand_side_by_side_and_one_is_kept(page, start, tmp_path):
    answers = iter(["one answer", "another answer"])  # equal ones, as a model may give, would be no preference
    opened(page, start(web={"feedback": tmp_path / "said"}, served=FakeEngine(lambda _: iter(next(answers)))))
    page.click("#show-settings")
    page.check("#beside")
    page.evaluate("for (const input of document.querySelectorAll('[name=max_tokens]')) input.value = 20")
    page.keyboard.press("Escape")
    ask(page, "the end")
    for column in (0, 1):
        page.wait_for_selector(f".pair .column >> nth={column} >> article.assistant:not(.working)")
    kept = page.locator(".pair .text").nth(1).inner_text()
    with page.expect_response("**/feedback"):
        page.get_by_role("button", name="Keep this one").nth(1).click()
    page.wait_for_selector("text=2 / 2")
    assert page.inner_text("article.assistant .text") == kept
    page.wait_for_selector(".pair", state="detached")
    pair = json.loads((tmp_path / "said" / "pairs.jsonl").read_text(encoding="utf-8"))
    assert pair["chosen"][0]["content"] == kept and {kept, pair["rejected"][0]["content"]} == {"one answer", "another answer"}


def test_typing_on_beside_two_answers_is_no_preference(page, start, tmp_path):
    answers = iter(["one answer", "another answer", "the third", "the fourth"])
    opened(page, start(web={"feedback": tmp_path / "said"}, served=FakeEngine(lambda _: iter(next(answers)))))
    page.click("#show-settings")
    page.check("#beside")
    page.keyboard.press("Escape")
    page.evaluate("for (const input of document.querySelectorAll('[name=max_tokens]')) input.value = 20")
    for number, question in enumerate(("first", "second")):
        ask(page, question)
        page.wait_for_selector(f"article.user >> text={question}")
        for column in (0, 1):
            page.wait_for_selector(f".pair .column >> nth={column} >> article.assistant:not(.working)")
        assert page.locator("article.assistant").count() == number + 2
    # the second pair is chosen of, which comes behind whatever was told of the first
    with page.expect_response("**/feedback"):
        page.get_by_role("button", name="Keep this one").first.click()
    (pair,) = json_lines((tmp_path / "said" / "pairs.jsonl").read_text(encoding="utf-8"))
    assert pair["prompt"][-1]["content"] == "second" and not (tmp_path / "said" / "labels.jsonl").exists()


def test_two_tabs_on_one_conversation_lose_nothing_of_each_other(page, start):
    opened(page, start())
    ask(page, "the end")
    page.wait_for_selector(ANSWER)
    other = page.context.new_page()
    opened(other, page.url)
    other.wait_for_selector(ANSWER)
    # as tabs of a browser that tells them nothing of each other
    for tab in (page, other):
        tab.evaluate("import('./static/store.js').then((store) => store.onOthers(() => {}))")
    for tab, question in ((page, "the thin"), (other, "in the"), (page, "thin end")):
        ask(tab, question)
        tab.wait_for_selector(f"article.user:has-text('{question}') ~ article.assistant:not(.working) .below button")
    other.get_by_role("button", name="Good", exact=True).first.click()
    # the other tab's rename and this one's question, both on what they read before
    other.hover("#conversations li")
    other.get_by_role("button", name="Rename").click()
    other.fill("#conversations input", "Our talk")
    other.press("#conversations input", "Enter")
    other.wait_for_selector("#conversations >> text=Our talk")
    ask(page, "at last")
    page.wait_for_selector("article.user:has-text('at last') ~ article.assistant:not(.working) .below button")
    # a conversation is written a moment after it is shown
    page.wait_for_function(
        """async () => {
            const [one] = await (await import('./static/store.js')).all();
            const answers = Object.values(one.nodes).filter((node) => node.role === 'assistant');
            return one.title === 'Our talk' && answers.length === 5 && answers.every((node) => node.stats);
        }"""
    )
    (conversation,) = page.evaluate("import('./static/store.js').then((store) => store.all())")
    asked = [node for node in conversation["nodes"].values() if node["role"] == "user"]
    assert sorted(node["content"] for node in asked) == ["at last", "in the", "the end", "the thin", "thin end"]
    answered = [node for node in conversation["nodes"].values() if node["role"] == "assistant"]
    assert all(node["content"] for node in answered) and [node["thumb"] for node in answered if "thumb" in node] == [True]


@pytest.mark.slow
def test_what_one_tab_says_is_shown_in_the_other(page, start):
    opened(page, start())
    ask(page, "the end")
    page.wait_for_selector(ANSWER)
    other = page.context.new_page()
    opened(other, page.url)
    other.wait_for_selector(ANSWER)
    ask(page, "the thin")
    other.wait_for_selector("article.user:has-text('the thin') ~ article.assistant .facts-of-answer:has-text('tokens')")
    page.keyboard.press("Alt+n")
    ask(page, "in the")
    other.wait_for_selector("#conversations >> text=in the")
    other.wait_for_selector("article.user >> text=the thin")


def test_markdown_becomes_elements_and_html_stays_text(page, start):
    text = (
        "# Title\n\nSome **bold**, *slanted* and `code` with [a link](https://example.org/a)"
        " and <img src=x onerror=alert(1)>.\n\n- one\n  - inner\n- two\n\n1. first\n2. second\n\n> said\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nprint('<b>')\n```\n\n[bad](javascript:alert(1)) ends"
    )
    opened(page, start(served=FakeEngine(lambda _: iter(text), context_length=10**6)))
    page.evaluate("document.querySelector('[name=max_tokens]').value = ''")
    ask(page, "show")
    page.wait_for_selector(ANSWER)
    page.wait_for_selector(COLOURED)
    shown = page.locator("article.assistant .text")
    for selector, content in {
        "h3": "Title",
        "strong": "bold",
        "em": "slanted",
        "p code": "code",
        "ul ul li": "inner",
        "ol li >> nth=1": "second",
        "blockquote p": "said",
        "td >> nth=1": "2",
        "pre code": "print('<b>')",
        "figcaption span": "python",
    }.items():
        assert shown.locator(selector).first.inner_text() == content, selector
    assert shown.locator("img, b").count() == 0 and "<img src=x onerror=alert(1)>" in shown.inner_text()
    assert [link.get_attribute("href") for link in shown.locator("a").all()] == ["https://example.org/a"]
    # as it would have been drawn at once
    whole = shown.inner_html()
    page.reload()
    page.wait_for_selector(COLOURED)
    assert page.locator("article.assistant .text").inner_html() == whole


def test_a_key_is_asked_for_and_kept_in_the_tab(page, start):
    page.goto(start(api_key="secret"))
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    page.wait_for_selector("[name=model] option", state="attached")
    # the browser's own line about the 401
    page.wrong[:] = [line for line in page.wrong if "401" not in line]
    assert page.evaluate("localStorage.getItem('bessemer-key')") is None


# the widest of them by default
@pytest.mark.parametrize("path", [slow("/"), slow("/xray"), "/api"])
def test_no_page_is_wider_than_a_phone(page, start, path):
    page.set_viewport_size({"width": 400, "height": 800})
    page.goto(start() + path)
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


@pytest.mark.chromium("its theme is not set from outside")
def test_it_is_there_at_360_pixels_in_the_dark(page, start):
    page.set_viewport_size({"width": 360, "height": 640})
    page.emulate_media(color_scheme="dark")
    url = start()
    for path in ("/", "/xray"):
        page.goto(url + path)
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 26)"


@pytest.mark.chromium("Playwright is told of no download there")
def test_an_xray_shows_the_attention_of_its_sentence_and_is_saved_as_one_file(page, start, tmp_path):
    page.goto(start() + "/xray?text=the+end+in+the+thin")
    page.wait_for_selector("#attention .pictures i")
    assert page.evaluate("getComputedStyle(document.querySelector('#attention .pictures i')).backgroundImage").startswith("url")
    # all of it is drawn, and nothing moves under the pointer any more
    page.wait_for_selector("#state:empty", state="attached")
    page.locator("#attention .pictures label").last.click()
    page.locator("#silence button").click()
    page.wait_for_selector("#answers .column, #answers .failure")
    assert page.locator("#answers .column").count() == 2, page.inner_text("#answers")
    with page.expect_download() as download:
        page.click("#export-page")
    download.value.save_as(tmp_path / "saved.html")
    saved = (tmp_path / "saved.html").read_text(encoding="utf-8")
    assert saved.startswith("<!doctype html>") and "<script" not in saved and "Logit lens" in saved
    page.goto((tmp_path / "saved.html").as_uri())
    assert page.evaluate("getComputedStyle(document.querySelector('#attention .pictures i')).backgroundImage").startswith("url")
