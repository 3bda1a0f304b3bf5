"""What the pages once lost or did not say: labels, failed answers, wrong keys, how far work is, a token's own numbers."""

from __future__ import annotations

import threading

import httpx
import pytest

from bessemer.core.errors import RequestError
from bessemer.core.records import json_lines
from bessemer.serving.runtime.models import ModelPool
from bessemer.webapp import xray_api
from bessemer.webapp.app import WebSettings, web_pages
from tests.serving.engine import FakeEngine
from tests.serving.running import servers
from tests.webapp.test_chat import ANSWER, ask, opened
from tests.webapp.test_pages import requests_of, wait_for


def test_an_answer_has_one_label_whatever_is_pressed(page, start, tmp_path):
    opened(page, start(web={"feedback": tmp_path}, served=FakeEngine()))
    ask(page, "abc")
    page.wait_for_selector(ANSWER)
    for name, method in (("Good", "POST"), ("Good", "DELETE"), ("Bad", "POST"), ("Good", "POST")):
        with page.expect_response(lambda answer, method=method: "feedback" in answer.url and answer.request.method == method):
            page.get_by_role("button", name=name, exact=True).click()
    assert [row["label"] for row in json_lines((tmp_path / "labels.jsonl").read_text(encoding="utf-8"))] == [True]


def test_an_answer_that_failed_is_not_sent_on_as_an_empty_message(page, start):
    prompts = []

    def reply(prompt):
        prompts.append(prompt)
        if len(prompts) == 1:
            raise RequestError("the engine has no room")
        yield "fine"

    opened(page, start(served=FakeEngine(reply, context_length=1000)))
    ask(page, "first")
    page.wait_for_selector(".failure >> text=the engine has no room")
    ask(page, "second")
    page.wait_for_selector("article.assistant:not(.working) .text >> text=fine")
    assert prompts[1] == "user: first\n\nsecond\n"


def test_a_wrong_key_is_said_until_the_right_one_comes(page, start):
    page.goto(start(served=FakeEngine(), api_key="secret"))
    for key in ("wrong", "wrong again"):
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", key)
        page.press("#key", "Enter")
        page.wait_for_selector("#key-wrong:visible")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    page.wait_for_selector("[name=model] option", state="attached")
    page.wait_for_selector("#welcome:not(:has(.failure))")
    page.wrong[:] = [line for line in page.wrong if "401" not in line]


def test_a_branch_is_made_by_a_model_whose_context_is_not_known(page, start):
    def without_context(route):
        answer = route.fetch()
        body = answer.json()
        body["data"][0]["max_model_len"] = None
        route.fulfill(response=answer, json=body)

    page.route("**/v1/models", without_context)
    opened(page, start())
    ask(page, "the end")
    page.click("article.assistant:not(.working) >> text=Tokens")
    page.locator(".alternatives button:not([disabled])").first.click()
    page.wait_for_selector("article.assistant:not(.working) .place >> text=2 / 2")
    assert page.locator("article .failure").count() == 0


def test_a_model_that_is_being_opened_says_so_until_it_answers(page, tmp_path):
    may_open = threading.Event()

    def open_engine(place):
        assert may_open.wait(30)
        return FakeEngine()

    (tmp_path / "other.gguf").write_text("weights", encoding="utf-8")
    pool = ModelPool({"other": tmp_path / "other.gguf"}, open_engine, max_waiting=4)
    with servers() as begin:
        opened(page, begin(FakeEngine(), web_pages(WebSettings()), pool=pool))
        page.select_option("#model-picker", "other")
        ask(page, "hello")
        page.wait_for_selector("article.assistant .opening >> text=/Opening other, 0.00 GiB: [0-9]+ s/")
        may_open.set()
        page.wait_for_selector("article.assistant:not(.working) .text >> text=user: hello")
        assert page.locator(".opening").count() == 0
        page.wait_for_selector("#context >> text=of 128 tokens")


def test_an_xray_shows_what_it_has_says_how_far_it_is_and_is_cancelled(page, start, monkeypatch):
    begun, may_go_on = threading.Event(), threading.Event()

    def held(model, tokens, on_layer):
        on_layer(1, 4)
        begun.set()
        while not may_go_on.wait(0.01):
            on_layer(1, 4)

    monkeypatch.setattr(xray_api, "head_losses", held)
    url = start()
    page.goto(url + "/xray")
    page.click("text=Look inside")
    page.wait_for_selector("#lens table")
    page.wait_for_selector("#state >> text=without each head of layer 1")
    assert begun.is_set() and 0 < page.evaluate("document.querySelector('#state progress').value") < 1
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_selector("#state >> text=Cancelled.")
    wait_for(lambda: requests_of(url) == 0)
    may_go_on.set()
    # the thread is free again
    assert httpx.post(url + "/inspect/without", json={"text": "the end", "layer": 0, "head": 0}, timeout=60).json()["whole"]


@pytest.mark.chromium("Playwright is not told there what a request sends")
def test_the_numbers_of_a_token_are_those_it_was_sampled_with_and_are_there_at_once(page, start):
    asked = []
    # the server's own computation never comes
    page.route("**/inspect/token", lambda route: asked.append(route.request.post_data_json))
    with_ids = {"logprobs": True, "top_logprobs": 20, "return_tokens_as_token_ids": True}
    answers = []
    page.on("request", lambda request: answers.append(request.post_data_json) if "chat/completions" in request.url else None)
    url = start()
    opened(page, url)
    ask(page, "the end")
    page.click("article.assistant:not(.working) >> text=Tokens")
    page.wait_for_selector(".alternatives button.same")
    assert with_ids.items() <= answers[0].items()
    again = httpx.post(
        url + "/v1/chat/completions", json=answers[0] | {"stream": False, "stream_options": None}, timeout=60
    ).json()
    expected = again["choices"][0]["logprobs"]["content"][0]
    (node,) = (
        node
        for node in page.evaluate("import('./static/store.js').then((store) => store.all())")[0]["nodes"].values()
        if node["role"] == "assistant"
    )
    assert len(node["top"]) == len(node["ids"]) and f"token_id:{node['ids'][0]}" == expected["token"]
    assert abs(node["top"][0][0] - expected["logprob"]) < 1e-4
    assert [f"token_id:{id}" for id in node["top"][0][1]] == [one["token"] for one in expected["top_logprobs"]]
    # arrows move, and numbers follow without the server
    page.locator(".tokens.pressable button").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    count = len(node["ids"])
    page.wait_for_selector(f"text=/token {count - 1} of {count}/")
    assert page.evaluate("document.activeElement.getAttribute('aria-current')") == "true"
    assert page.locator(".spark .surprise").count() == count
    page.locator(".tokens.pressable button").nth(2).hover()
    assert "bits" in page.inner_text(".reading") and asked
