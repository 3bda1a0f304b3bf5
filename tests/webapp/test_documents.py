"""Documents in the chat page, in a real browser: dropped, answered from, and opened at a citation."""

from __future__ import annotations

import httpx
import pytest

from bessemer.serving.retrieval import stores
from tests.assistant.conftest import tokenizer  # noqa: F401
from tests.serving.documents import written_index
from tests.serving.engine import ScriptedEngine
from tests.webapp.test_accessibility import faults
from tests.webapp.test_chat import ANSWER, ask, opened

pytest.importorskip("lancedb")

IRON = b"# Iron\n\nIron rusts in water. It is heavy.\n\n# Copper\n\nCopper turns green in air.\n"
SAID = "Iron **rusts** in water [1]. [1](x) Gold is dear [2]. And [9]."


@pytest.fixture(autouse=True)
def words_only(monkeypatch):
    monkeypatch.setattr(stores, "packaged_minilm", lambda: None)


def drop(page, name, content):
    """Drop a file onto the page."""
    page.evaluate(
        """([name, content]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(content)], name));
            for (const kind of ["dragover", "drop"]) {
                document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true }));
            }
        }""",
        [name, list(content)],
    )


def all_files_gone(page):
    """Wait until the server has no file. `wait_for_function` takes a promise for an answer."""
    while page.evaluate("fetch('v1/files').then((answer) => answer.json()).then((list) => list.data.length)"):
        page.wait_for_timeout(20)


def test_a_dropped_file_is_answered_from_and_a_citation_opens_it_at_its_sentence(page, start, tokenizer):  # noqa: F811
    engine = ScriptedEngine(tokenizer, SAID)
    url = start(served=engine)
    opened(page, url)
    page.evaluate("document.querySelector('[name=max_tokens]').value = ''")
    drop(page, "metals.md", IRON)
    page.wait_for_selector("#attached li.completed >> text=metals.md")
    ask(page, "What rusts in water, and what of copper?")
    page.wait_for_selector(ANSWER)
    assert "Iron rusts in water. It is heavy." in engine.prompts[0]
    text = page.locator("article.assistant .text")
    # what names no source stays text, and no citation is a link
    assert text.locator(".cite").all_inner_texts() == ["1", "1", "2"] and "[9]" in text.inner_text()
    assert text.locator("a").count() == 0 and text.locator("strong").inner_text() == "rusts"
    assert page.locator("article.assistant .sources button").all_inner_texts() == ["metals.md › Iron", "metals.md › Copper"]
    assert "1 of 2 sentences not in the sources" in page.inner_text(".facts-of-answer")

    text.locator(".cite").first.click()
    page.wait_for_selector("#side mark")
    assert page.inner_text("#side mark") == "Iron rusts in water."
    assert page.locator("#side .meant").inner_text() == "Iron rusts in water. It is heavy."
    assert page.locator("#side h3").all_inner_texts() == ["Iron", "Copper"]
    assert page.evaluate("document.activeElement.tagName") == "H2"
    assert faults(page) == []
    for width, height in ((1280, 800), (400, 700)):
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.keyboard.press("Escape")
    page.wait_for_selector("#side", state="hidden")

    # the citations are there after a reload, and the passage where the server has lost its file
    page.reload()
    page.wait_for_selector(ANSWER)
    page.locator("article.assistant .sources button").first.click()
    page.wait_for_selector("#side mark")
    page.get_by_role("button", name="Close", exact=True).click()
    page.get_by_role("button", name="Remove metals.md").click()
    page.wait_for_selector("#attached", state="hidden")
    all_files_gone(page)
    page.locator("article.assistant .cite").first.click()
    page.wait_for_selector("#side >> text=Only the passage is here")
    assert page.inner_text("#side mark") == "Iron rusts in water."
    # the browser's own line about the 404
    page.wrong[:] = [line for line in page.wrong if "404" not in line]


def test_answers_come_from_the_servers_index_until_another_choice_is_made(page, start, tokenizer, tmp_path):  # noqa: F811
    engine = ScriptedEngine(tokenizer, "Iron rusts [1].", "No.")
    opened(page, start(served=engine, indexes={"docs": written_index(tmp_path / "index")}))
    page.wait_for_selector("#answer-from option[value=docs]", state="attached")
    page.evaluate("document.querySelector('[name=max_tokens]').value = ''")
    ask(page, "iron in water")
    page.wait_for_selector("article.assistant .sources >> text=metal.md")
    page.click("#show-settings")
    page.select_option("#answer-from", label="What the model knows")
    page.keyboard.press("Escape")
    ask(page, "iron in water")
    page.wait_for_selector("article.assistant >> nth=1 >> text=No.")
    assert "Sources:" in engine.prompts[0] and "Sources:" not in engine.prompts[1].rpartition("[1].")[2]


def test_what_a_closed_connection_kept_from_the_server_is_deleted_all_the_same(page, start, tokenizer):  # noqa: F811
    url = start(served=ScriptedEngine(tokenizer))
    opened(page, url)
    drop(page, "metals.md", IRON)
    page.wait_for_selector("#attached li.completed")
    failed = []

    def once(route):
        if route.request.method == "DELETE" and not failed:
            failed.append(route.request.url)
            route.abort("connectionreset")
        else:
            route.continue_()

    page.route("**/v1/vector_stores/*", once)
    page.once("dialog", lambda dialog: dialog.accept())
    page.hover("#conversations li")
    page.get_by_role("button", name="Delete").click()
    all_files_gone(page)
    assert failed and httpx.get(url + "/v1/vector_stores").json()["data"] == []
    # Chromium tells of it
    page.wrong[:] = [said for said in page.wrong if "ERR_CONNECTION_RESET" not in said]


def test_what_cannot_be_read_says_why_and_a_deleted_conversation_leaves_nothing(page, start, tokenizer):  # noqa: F811
    url = start(served=ScriptedEngine(tokenizer))
    opened(page, url)
    page.set_input_files("#attach-files", [{"name": "blank.md", "mimeType": "text/plain", "buffer": b" "}])
    page.wait_for_selector("#attached li.failed >> text=no text is in it")
    drop(page, "metals.md", IRON)
    page.wait_for_selector("#attached li.completed")
    page.once("dialog", lambda dialog: dialog.accept())
    page.hover("#conversations li")
    page.get_by_role("button", name="Delete").click()
    all_files_gone(page)
    assert httpx.get(url + "/v1/vector_stores").json()["data"] == []
