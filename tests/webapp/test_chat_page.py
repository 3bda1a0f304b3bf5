"""Reading and writing in the chat: Markdown, what is shown of an answer, and the way through conversations."""

from __future__ import annotations

import json
import threading

import pytest

from tests.serving.engine import FakeEngine
from tests.webapp.test_accessibility import faults
from tests.webapp.test_chat import ANSWER, ask, opened
from tests.webapp.test_pages import wait_for

MARKDOWN = r"""Title
=====

***both*** and ~~gone~~, `$x$` and \(E = mc^2\), for $5 or $6.

- [x] done
- [ ] to do

| a | b |
|:--|--:|
| 1 | $\frac{a}{b}$ |

$$
\int_0^1 x\,dx = \frac12
$$

See [the book][1] and ![a picture](https://example.org/x.png).

[1]: https://example.org/book

[bad](javascript:alert(1)) <script>alert(1)</script> $\href{javascript:alert(1)}{x}$

```python
def f(x): return "<b>"
```
"""


def test_markdown_formulas_and_code_are_drawn_and_nothing_of_them_runs(page, start):
    opened(page, start(served=FakeEngine(lambda _: iter(MARKDOWN), context_length=10**6)))
    page.evaluate("document.querySelector('[name=max_tokens]').value = ''")
    ask(page, "show")
    page.wait_for_selector(ANSWER)
    shown = page.locator("article.assistant > .text")
    page.wait_for_selector(".formula.display .katex-html")
    page.wait_for_selector("pre code .hljs-keyword")
    assert [shown.locator(one).first.inner_text() for one in ("h3", "em strong", "s", "p code")] == [
        "Title",
        "both",
        "gone",
        "$x$",
    ]
    assert [box.is_checked() for box in shown.locator("li.task input").all()] == [True, False]
    assert "$5 or $6" in shown.inner_text() and shown.locator("td.right .katex").count() == 1
    assert [one.get_attribute("href") for one in shown.locator("a").all()] == [
        "https://example.org/book",
        "https://example.org/x.png",
    ]
    assert shown.locator("img, script, b").count() == 0 and "<script>alert(1)</script>" in shown.inner_text()
    page.wait_for_function("() => document.fonts.check('12px KaTeX_Main')")
    whole = shown.inner_html()
    page.reload()
    page.wait_for_selector("pre code .hljs-keyword")
    page.wait_for_selector(".formula.display .katex-html")
    assert page.locator("article.assistant > .text").inner_html() == whole
    # what was drawn to warm up is gone
    page.wait_for_function("() => !document.querySelector('#scroll > .text')")


def test_code_is_coloured_as_it_is_written_and_unknown_languages_are_left(page, start):
    code = "def f(x):\n    return '<b>&amp;' # " + "é" * 40
    answer = f"```python\n{code}\n```\n\n```nolanguage\nfor x\n```\n\n~~~PYTHON\nreturn 1\n~~~\n\nend"
    opened(page, start(served=FakeEngine(lambda _: iter(answer), context_length=10**6)))
    page.evaluate("document.querySelector('[name=max_tokens]').value = ''")
    ask(page, "show")
    page.wait_for_selector("article.assistant:not(.working)")
    page.wait_for_function("() => document.querySelectorAll('pre code .hljs-keyword').length === 3")
    assert page.locator("pre code").all_text_contents() == [code, "for x", "return 1"]
    assert page.locator("pre code .hljs-string").all_text_contents() == ["'<b>&amp;'"]
    assert page.locator("figure.code >> nth=1 >> css=span.hljs-keyword").count() == 0
    if page.context.browser.browser_type.name == "chromium":  # Playwright is told of no workers in Firefox
        assert [worker.url.split("/")[-1] for worker in page.workers] == ["colouring.js"]


def test_who_reads_above_is_not_moved_and_who_reads_the_end_goes_with_it(page, start):
    may_go_on = [threading.Event(), threading.Event(), threading.Event()]

    def reply(prompt):
        for event in may_go_on:
            yield from ["word\n\n"] * 60
            while not event.wait(0.01):
                yield "."
            yield "more\n\n"

    opened(page, start(served=FakeEngine(reply, context_length=10**6)))
    page.evaluate("document.querySelector('[name=max_tokens]').value = ''")
    place = "[scroll.scrollTop, scroll.scrollHeight - scroll.clientHeight - scroll.scrollTop]"
    look = f"() => {{ const scroll = document.querySelector('#scroll'); return {place}; }}"
    grown = "(count) => document.querySelectorAll('article.assistant p').length >= count"
    ask(page, "go on")
    page.wait_for_function(grown, arg=60)
    page.wait_for_function(f"() => {{ const [top, left] = ({look})(); return top > 500 && left < 80; }}")
    page.evaluate("document.querySelector('#scroll').scrollTop = 300")
    page.wait_for_selector("#to-end", state="visible")
    may_go_on[0].set()
    page.wait_for_function(grown, arg=120)
    assert page.evaluate(look)[0] == 300
    page.click("#to-end")
    may_go_on[1].set()
    page.wait_for_function(grown, arg=180)
    page.wait_for_function(f"() => {{ const [top, left] = ({look})(); return top > 2000 && left < 80; }}")
    may_go_on[2].set()
    page.wait_for_selector(ANSWER)


def test_what_is_nested_a_thousand_times_is_shown_and_stops_nothing(page, start):
    texts = [">" * 3000 + " deep", "*" * 3000 + "a", "[" * 3000, "- " * 3000 + "a", "$" * 3001]
    answers = iter(texts)
    opened(page, start(served=FakeEngine(lambda _: iter([next(answers), "\n\nafter it"]), context_length=10**6)))
    for text in texts:
        ask(page, "show")
        page.wait_for_selector("article.assistant:not(.working) .text >> text=after it")
        assert text[:1] in page.inner_text("article.assistant .text") or "deep" in text
        page.keyboard.press("Alt+n")
        page.wait_for_selector("#welcome")


def test_an_answer_goes_on_while_another_conversation_is_read_and_back_leads_to_it(page, start):
    may_end = threading.Event()

    def reply(prompt):
        yield from ("one ", "two ")
        while not may_end.wait(0.01):
            yield "."
        yield "three"

    url = start(served=FakeEngine(reply, context_length=10**9))
    opened(page, url)
    page.evaluate("document.querySelector('[name=max_tokens]').value = ''")
    ask(page, "first")
    page.wait_for_selector("article.assistant.working >> text=one two")
    page.keyboard.press("Alt+n")
    page.wait_for_selector("#welcome")
    ask(page, "second")
    page.wait_for_selector("article.assistant.working >> text=one two")
    page.go_back()
    page.wait_for_selector("article.user >> text=first")
    page.wait_for_selector("article.assistant.working >> text=one two")
    may_end.set()
    page.wait_for_selector("article.assistant:not(.working)")
    assert page.inner_text("article.assistant .text").endswith("three") and "stopped" not in page.inner_text("#log")
    page.go_forward()
    page.wait_for_selector("article.user >> text=second")
    page.wait_for_selector("article.assistant:not(.working) >> text=three")


def answer_of(page):
    """The one answer of the one conversation, as it is kept."""
    (conversation,) = page.evaluate("import('./static/store.js').then((store) => store.all())")
    return next(node for node in conversation["nodes"].values() if node["role"] == "assistant")


def test_a_cut_answer_goes_on_and_says_its_model_settings_and_place_in_the_context(page, start):
    page.set_viewport_size({"width": 400, "height": 800})
    opened(page, start())
    page.click("#show-settings")
    page.locator("#system").press_sequentially("Be brief.")
    page.select_option("[data-side=first] [name=preset]", "precise")
    page.evaluate("document.querySelector('[name=max_tokens]').value = 6")
    page.keyboard.press("Escape")
    question = "the end of the thin line\n" * 60
    page.fill("#prompt", question)
    page.press("#prompt", "Enter")
    page.wait_for_selector("article.assistant:not(.working)")
    # a question longer than the window is shown from its beginning
    places = "['article.user', '#scroll'].map((one) => document.querySelector(one).getBoundingClientRect().top)"
    question, window = page.evaluate(places)
    assert abs(question - window) < 30
    page.wait_for_selector("article.system >> text=System message")
    said = " ".join(page.locator(".facts-of-answer").all_inner_texts())
    assert "tiny · temperature 0.2 · top p 0.9" in said and "cut at the most tokens" in said
    before = answer_of(page)
    page.get_by_role("button", name="Continue").click()
    page.wait_for_selector("article.assistant.working", state="detached")
    page.wait_for_selector("article.assistant .below button")
    after = answer_of(page)
    assert len(after["ids"]) > len(before["ids"]) and after["content"].startswith(before["content"])
    assert len(after["top"]) == len(after["ids"])
    assert "of 4,096 tokens" in page.inner_text("#context")
    # the box to edit in is as wide as the conversation, and Ctrl+Enter asks
    page.locator("article.user").get_by_role("button", name="Edit").click()
    width = page.evaluate(
        "document.querySelector('.editing textarea').clientWidth / document.querySelector('#log').clientWidth"
    )
    assert width > 0.85
    page.fill("article.user textarea", "the end")
    page.press("article.user textarea", "Control+Enter")
    page.wait_for_selector("article.user .place >> text=2 / 2")
    page.wait_for_selector("article.assistant:not(.working) .below button")
    # every token can be reached beside the panel
    page.get_by_role("button", name="Tokens").click()
    page.wait_for_selector("#token-lens table")
    for button in page.locator(".tokens.pressable button").all():
        button.click(timeout=20_000)
    page.wait_for_selector("#side[data-place]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert faults(page) == []


def test_two_answers_are_compared_without_their_names_and_nothing_is_kept_until_it_is_said(page, start, tmp_path):
    answers = iter(["one answer", "another answer"] * 2)
    url = start(web={"feedback": tmp_path}, served=FakeEngine(lambda _: iter(next(answers)), context_length=1000))
    opened(page, url)
    page.click("#show-settings")
    page.check("#beside")
    page.check("#blind")
    page.evaluate("document.querySelector('[data-side=second] [name=temperature]').value = 0.1")
    page.keyboard.press("Escape")
    ask(page, "first")
    page.wait_for_selector("#verdicts >> text=A is better")
    assert page.locator(".pair h2").all_inner_texts() == ["Answer A", "Answer B"]
    assert "temperature" not in page.inner_text(".pair") and not list(tmp_path.iterdir())
    # "1 / 2" would say which settings an answer is of
    assert page.locator(".pair .place").count() == 0 and "/ 2" not in page.inner_text(".pair")
    page.get_by_role("button", name="Skip").click()
    ask(page, "second")
    page.wait_for_selector("#verdicts >> text=A is better")
    assert not list(tmp_path.iterdir()) and page.evaluate("localStorage.getItem('bessemer-comparisons')") is None
    better = page.locator(".pair .text").nth(1).inner_text()
    with page.expect_response("**/feedback"):
        page.get_by_role("button", name="B is better").click()
    assert f'"content": "{better}"' in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").split("rejected")[0]
    page.click("#show-settings")
    (row,) = page.locator("#comparisons tbody tr").all_inner_texts()
    # Wilson's interval of one win of one, or of none
    assert "(21 % – 100 %)" in row or "(0 % – 79 %)" in row


@pytest.mark.slow
def test_the_result_of_blind_comparisons_trains_a_model(page, start, tmp_path):
    feedback, runs = tmp_path / "feedback", tmp_path / "runs"
    feedback.mkdir()
    said = [({"role": "user", "content": f"say {n}"}, "yes please", "no") for n in range(7)]
    rows = ({"prompt": [asked], "chosen": one, "rejected": other} for asked, one, other in said)
    (feedback / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    answers = iter(["one answer", "another answer"])
    engine = FakeEngine(lambda _: iter(next(answers)), context_length=1000)
    opened(page, start(web={"feedback": feedback, "runs": runs}, served=engine))
    page.click("#show-settings")
    page.check("#beside")
    page.check("#blind")
    page.keyboard.press("Escape")
    ask(page, "first")
    with page.expect_response("**/feedback"):
        page.get_by_role("button", name="A is better").click()
    page.click("#show-settings")
    found = faults(page)
    assert not found, "\n".join(map(str, found))
    page.get_by_role("button", name="Learn from the preferences").click()
    page.wait_for_selector("#training >> text=Learning from 8 pairs: preferences-1")
    page.get_by_role("button", name="Learn from the preferences").wait_for()
    # a run at a time
    assert page.get_by_role("button", name="Learn from the preferences").is_disabled()
    page.click("#training a")
    page.wait_for_selector("li.done >> text=preference", timeout=300_000)
    record = runs / "preferences-1" / "stages" / "preference"
    assert (runs / "preferences-1" / "model" / "model.safetensors").is_file() and record.is_dir()
    wait_for(lambda: "preferences-1: done" in (feedback / "preference.log").read_text(encoding="utf-8"))
